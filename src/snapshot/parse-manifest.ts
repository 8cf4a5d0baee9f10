/** Reads the text of a manifest, which anybody may have edited: every field is checked. Owns what older versions mean. */
import { FormatError } from '../core/errors.ts'
import { parseJson } from '../core/json.ts'
import type { DiskFreeze, Manifest, SavedDisk } from './manifest.ts'

/**
 * Reads the text of a manifest of version 1 or 2. Fields that it does not know are left out.
 * @throws FormatError (`ERR_FORMAT`) naming the first field that is not what it must be.
 */
export function parseManifest(text: string): Manifest {
  let value: unknown
  try {
    value = parseJson(text)
  } catch (cause) {
    throw damaged('JSON', 'not valid JSON', cause)
  }
  if (typeof value !== 'object' || value === null || !('format' in value) || value.format !== 'qcow2 saved VM') {
    throw damaged('format', 'not the manifest of a saved VM')
  }
  const of = new Fields(value)
  const version = (value as { version?: unknown }).version
  if (version !== 1 && version !== 2) throw damaged('version', `version is ${String(version)}, expected 1 or 2`)
  const running = of.boolean('running')
  const cpus = of.optional('cpus', () => of.object('cpus'))
  return {
    format: 'qcow2 saved VM',
    version: 2,
    created: of.text('created'),
    qemu: qemuOf(of.object('qemu')),
    machine: of.text('machine'),
    accelerator: acceleratorOf(of.text('accelerator')),
    running,
    status: of.optional('status', () => of.text('status')) ?? (running ? 'running' : 'paused'),
    ...(cpus !== undefined && { cpus: { count: cpus.number('count'), type: cpus.text('type') } }),
    ...of.where('devices', () => ({ devices: of.list('devices').map(textOf) })),
    memory: memoryOf(of.object('memory')),
    pageSize: of.number('pageSize'),
    ramBlocks: of.objects('ramBlocks').map((block) => ({ name: block.text('name'), length: block.number('length') })),
    disks: of.objects('disks').map(version === 1 ? diskOfVersion1 : diskOf),
  }
}

function qemuOf(version: Fields): Manifest['qemu'] {
  const qemu = version.object('qemu')
  return {
    qemu: { major: qemu.number('major'), minor: qemu.number('minor'), micro: qemu.number('micro') },
    package: version.optional('package', () => version.text('package')) ?? '',
  }
}

function acceleratorOf(name: string): Manifest['accelerator'] {
  if (name !== 'kvm' && name !== 'tcg') throw damaged('accelerator', `accelerator is ${JSON.stringify(name)}, expected "kvm" or "tcg"`)
  return name
}

function memoryOf(memory: Fields): Manifest['memory'] {
  return { kind: memory.text('kind'), ...memory.texts('file', 'snapshot') }
}

function diskOf(disk: Fields): SavedDisk {
  const frozen = disk.isFalse('frozen') ? false : freezeOf(disk.object('frozen'))
  const size = disk.where('size', () => ({ size: disk.number('size') }))
  const node = disk.text('node')
  return { node, activeNode: disk.optional('activeNode', () => disk.text('activeNode')) ?? node, ...disk.texts('device', 'qdev'), file: disk.text('file'), format: disk.text('format'), ...size, frozen }
}

function freezeOf(freeze: Fields): DiskFreeze {
  if (freeze.has('internal')) return { internal: freeze.text('internal') }
  return { overlay: freeze.text('overlay'), ...freeze.texts('modified') }
}

/** Version 1 listed the frozen disks only, each with the node that the guest went on with. */
function diskOfVersion1(disk: Fields): SavedDisk {
  const frozen = disk.has('internal') ? { internal: disk.text('internal') } : { overlay: disk.text('overlay') }
  const node = disk.text('node')
  return { node, activeNode: 'internal' in frozen ? node : disk.text('activeNode'), file: disk.text('file'), format: '', frozen }
}

function textOf(value: unknown, index: number): string {
  if (!isText(value)) throw damaged(`devices[${index}]`, `devices[${index}] is not a text`)
  return value
}

function damaged(field: string, detail: string, cause?: unknown): FormatError {
  return new FormatError(detail, { structure: 'manifest', field }, 'ERR_FORMAT', cause === undefined ? undefined : { cause })
}

/** The fields of one object, each with its type asserted. */
class Fields {
  readonly #values: ReadonlyMap<string, unknown>
  readonly #path: string

  constructor(value: object, path = '') {
    this.#values = new Map(Object.entries(value))
    this.#path = path
  }

  has(field: string): boolean {
    return this.#values.has(field)
  }

  isFalse(field: string): boolean {
    return this.#values.get(field) === false
  }

  /** What `read` gives, where the field is there. */
  optional<T>(field: string, read: () => T): T | undefined {
    return this.has(field) ? read() : undefined
  }

  /** As `optional`, to be spread into an object. */
  where<T extends object>(field: string, read: () => T): T | Record<string, never> {
    return this.has(field) ? read() : {}
  }

  text(field: string): string {
    return this.#typed(field, 'a text', isText)
  }

  /** Those of the fields that are there. */
  texts<Name extends string>(...fields: Name[]): { readonly [name in Name]?: string } {
    const there = fields.filter((field) => this.has(field)).map((field) => [field, this.text(field)])
    return Object.fromEntries(there) as { readonly [name in Name]?: string }
  }

  boolean(field: string): boolean {
    return this.#typed(field, 'true or false', (value) => typeof value === 'boolean')
  }

  /** A count: none of the manifest's numbers is negative or has a fraction. */
  number(field: string): number {
    return this.#typed(field, 'a whole number', isCount)
  }

  list(field: string): readonly unknown[] {
    return this.#typed(field, 'a list', isList)
  }

  object(field: string): Fields {
    return new Fields(this.#typed(field, 'an object', isObject), `${this.#path}${field}.`)
  }

  objects(field: string): Fields[] {
    return this.list(field).map((value, index) => {
      const name = `${this.#path}${field}[${index}]`
      if (!isObject(value)) throw damaged(name, `${name} is not an object`)
      return new Fields(value, `${name}.`)
    })
  }

  #typed<T>(field: string, what: string, is: (value: unknown) => value is T): T {
    const name = this.#path + field
    if (!this.has(field)) throw damaged(name, `${name} is missing`)
    const value = this.#values.get(field)
    if (!is(value)) throw damaged(name, `${name} is not ${what}`)
    return value
  }
}

function isText(value: unknown): value is string {
  return typeof value === 'string'
}

function isCount(value: unknown): value is number {
  return Number.isSafeInteger(value) && (value as number) >= 0
}

function isList(value: unknown): value is readonly unknown[] {
  return Array.isArray(value)
}

function isObject(value: unknown): value is object {
  return typeof value === 'object' && value !== null && !Array.isArray(value)
}
