/**
 * QEMU's `blkdebug`: an image or file whose requests fail as rules say, so that scripts can see what a program makes of it.
 * Owns the rules and the device; where they come from (options, a configuration file) is the grammar's.
 */
import { constants } from 'node:os'
import type { BlockDevice, CallOptions, Extent, MapOptions, WriteOptions, WriteZeroesOptions } from '../../block/device.ts'
import { FilterDevice } from '../../block/filter.ts'
import { IoError, type IoOperation } from '../../core/errors.ts'
import { UsageError } from '../errors.ts'
import type { OptionTree } from './key-values.ts'

/** The kinds of requests a rule can be about. */
export type RequestKind = 'read' | 'write' | 'write-zeroes' | 'discard' | 'flush' | 'block-status'

/** Requests that fail. */
export interface InjectedError {
  /** Of the guest, to the disk of an image above; else to the bytes of the file. */
  readonly guest: boolean
  /** Undefined: of all kinds. */
  readonly kind: RequestKind | undefined
  /** As the system numbers errors. */
  readonly errno: number
  /** Only requests that touch this sector of 512 bytes; undefined: all. */
  readonly sector: number | undefined
  /** Only the first. */
  readonly once: boolean
}

const kinds: readonly RequestKind[] = ['read', 'write', 'write-zeroes', 'discard', 'flush', 'block-status']

/** The events that are known: any request, and the guest's. The others are steps of QEMU's own code. */
const events: Readonly<Record<string, RequestKind | undefined>> = { none: undefined, read_aio: 'read', write_aio: 'write' }

/**
 * A rule as options have it.
 * @throws UsageError for what is not known, rather than not to fail where it should
 */
export function injectedError(options: OptionTree): InjectedError {
  const { event, iotype, errno = '5', sector, once = 'off', ...others } = options
  const [unknown] = Object.keys(others).filter((key) => key !== 'immediately')
  if (unknown !== undefined) throw new UsageError(`blkdebug: inject-error.${unknown} is not supported`)
  if (typeof event !== 'string' || !Object.hasOwn(events, event)) throw new UsageError(`blkdebug: event ${JSON.stringify(event)} is not supported, only ${Object.keys(events).join(' and ')} are`)
  const kind = events[event] ?? kinds.find((known) => known === iotype)
  if (iotype !== undefined && kind !== iotype) throw new UsageError(`blkdebug: iotype ${JSON.stringify(iotype)} is not supported for event ${event}`)
  const guest = event !== 'none'
  if (guest && sector !== undefined) throw new UsageError(`blkdebug: a sector is not supported for event ${event}`)
  return { guest, kind, errno: Number(errno), sector: sector === undefined || sector === '-1' ? undefined : Number(sector), once: once === 'on' || once === 'true' }
}

/**
 * The rules of a configuration file: sections of `key = "value"`. What is wrong is told by its line, never by its words: a name in an
 * image may have led to the file.
 * @throws UsageError for other sections and rules than {@link injectedError} knows
 */
export function rulesOf(configuration: string): InjectedError[] {
  const sections: { readonly line: number; readonly options: OptionTree }[] = []
  for (const [index, line] of configuration.split('\n').map((text) => text.trim()).entries()) {
    if (line === '' || line.startsWith('#')) continue
    const pair = /^(\S+)\s*=\s*"(.*)"$/.exec(line)
    if (line === '[inject-error]') sections.push({ line: index + 1, options: {} })
    else if (pair !== null && sections.length > 0) sections.at(-1)!.options[pair[1]!] = pair[2]!
    else throw new UsageError(`blkdebug: line ${index + 1} of the configuration file is not supported`)
  }
  return sections.map(({ line, options }) => {
    try {
      return injectedError(options)
    } catch {
      throw new UsageError(`blkdebug: the rule at line ${line} of the configuration file is not supported`)
    }
  })
}

/** Passes all requests but those that the rules for a file, or for the guest, let fail. The device owns the inner one. */
export function blkdebug(inner: BlockDevice, rules: readonly InjectedError[], side: 'file' | 'guest'): BlockDevice {
  const mine = rules.filter(({ guest }) => guest === (side === 'guest'))
  return mine.length === 0 ? inner : new BlkdebugDevice(inner, mine)
}

class BlkdebugDevice extends FilterDevice {
  #rules: readonly InjectedError[]

  constructor(inner: BlockDevice, rules: readonly InjectedError[]) {
    super(inner)
    this.#rules = rules
  }

  protected override onRead(offset: number, target: Uint8Array, options?: CallOptions): Promise<void> {
    return this.#failure('read', 'read', offset, target.length) ?? super.onRead(offset, target, options)
  }

  protected override onWrite(offset: number, source: Uint8Array, options?: WriteOptions): Promise<void> {
    return this.#failure('write', 'write', offset, source.length) ?? super.onWrite(offset, source, options)
  }

  protected override onWriteZeroes(offset: number, length: number, options?: WriteZeroesOptions): Promise<void> {
    return this.#failure('write-zeroes', 'write zeroes', offset, length) ?? super.onWriteZeroes(offset, length, options)
  }

  protected override onDiscard(offset: number, length: number, options?: CallOptions): Promise<void> {
    return this.#failure('discard', 'discard', offset, length) ?? super.onDiscard(offset, length, options)
  }

  protected override onFlush(options?: CallOptions): Promise<void> {
    return this.#failure('flush', 'flush', 0, 0) ?? super.onFlush(options)
  }

  /** A range whose status fails ends the map before it. */
  protected override async *onMap(offset: number, length: number, options?: MapOptions): AsyncGenerator<Extent, void, undefined> {
    const bad = this.#rules
      .filter(({ kind, sector }) => (kind ?? 'block-status') === 'block-status' && (sector === undefined || (sector * 512 >= offset && sector * 512 < offset + length)))
      .map(({ sector }) => (sector === undefined ? offset : sector * 512))
    const end = Math.min(offset + length, ...bad)
    if (end > offset) yield* super.onMap(offset, end - offset, options)
    if (end < offset + length) await this.#failure('block-status', 'map', end, 512)
  }

  #failure(kind: RequestKind, operation: IoOperation, offset: number, length: number): Promise<never> | undefined {
    const rule = this.#rules.find((each) => {
      const at = each.sector === undefined ? undefined : each.sector * 512
      return (each.kind ?? kind) === kind && (at === undefined || (at < offset + length && at + 512 > offset))
    })
    if (rule === undefined) return undefined
    if (rule.once) this.#rules = this.#rules.filter((each) => each !== rule)
    const code = Object.entries(constants.errno).find(([, number]) => number === rule.errno)?.[0] ?? 'EIO'
    const cause = Object.assign(new Error(code), { code })
    return Promise.reject(new IoError(operation, cause, { offset, length, code: code === 'ENOSPC' ? 'ERR_NO_SPACE' : 'ERR_IO' }))
  }
}
