/**
 * What `-o` says of a new image: parsing, qemu-img's `Formatting` line, and the rules between the
 * options in qemu-img's words, which scripts match. The layout itself is the engine's.
 */
import type { CreateOptions } from '../../qcow2/new-image.ts'
import { ExitError, UsageError } from '../errors.ts'
import { didYouMean } from '../nearest.ts'
import type { ImageFormat } from './formats.ts'
import { optionSize } from '../size.ts'
import { keyValues } from './key-values.ts'
import { parsePlace } from './spec.ts'

/** The options of a new image as text, by name: what the user gave and the defaults that always show. */
export type CreateValues = Map<string, string>

type Kind = 'text' | 'size' | 'switch' | 'number'

interface KnownOption {
  readonly kind: Kind
  readonly help: string
  /** The `Formatting` line shows it even where nobody gave it. */
  readonly always?: string
  /** `amend` can change it, or nothing else takes it. */
  readonly amend?: true | 'only'
  /** Of the file, not of the format. Taken for scripts that give it; Node has no way to ask a file system for it. */
  readonly ofFile?: true
}

/** In the order of the `Formatting` line. */
const qcow2Options: Readonly<Record<string, KnownOption>> = {
  encryption: { kind: 'switch', help: "the old name of encrypt.format=aes" },
  'encrypt.format': { kind: 'text', help: "encrypt the image, format choices: 'aes', 'luks'" },
  ...cipherOptions('encrypt.', 'image'),
  'encrypt.state': { kind: 'text', amend: 'only', help: "'active' to add a passphrase, 'inactive' to erase one" },
  'encrypt.keyslot': { kind: 'number', amend: 'only', help: 'the key slot, 0 to 7; by itself the first free one, or all of the old secret' },
  'encrypt.new-secret': { kind: 'text', amend: 'only', help: 'ID of the secret to add' },
  'encrypt.old-secret': { kind: 'text', amend: 'only', help: 'ID of the secret whose key slots are erased' },
  cluster_size: { kind: 'size', always: '65536', help: 'qcow2 cluster size' },
  extended_l2: { kind: 'switch', always: 'off', help: 'extended L2 tables: 32 subclusters in each cluster' },
  preallocation: { kind: 'text', help: 'off, metadata, falloc or full' },
  compression_type: { kind: 'text', always: 'zlib', help: 'how compressed clusters are compressed: zlib or zstd' },
  size: { kind: 'size', amend: true, help: 'virtual disk size' },
  compat: { kind: 'text', amend: true, help: 'compatibility level: v2 (0.10) or v3 (1.1)' },
  backing_file: { kind: 'text', amend: true, help: 'name of the backing file' },
  backing_fmt: { kind: 'text', amend: true, help: 'format of the backing file' },
  data_file: { kind: 'text', amend: true, help: 'name of an external data file' },
  data_file_raw: { kind: 'switch', amend: true, help: 'the external data file must stay valid as a raw image' },
  lazy_refcounts: { kind: 'switch', always: 'off', amend: true, help: 'postpone refcount updates' },
  refcount_bits: { kind: 'number', always: '16', amend: true, help: 'width of a reference count entry in bits' },
  ...fileOptions('nocow', 'extent_size_hint'),
}

/** Of formats in which a disk lies as it is. */
const flatFileOptions: Readonly<Record<string, KnownOption>> = {
  ...fileOptions('nocow'),
  preallocation: { kind: 'text', ofFile: true, help: 'off, falloc or full' },
  ...fileOptions('extent_size_hint'),
}

const rawOptions: Readonly<Record<string, KnownOption>> = { size: { kind: 'size', help: 'virtual disk size' }, ...flatFileOptions }

const luksOptions: Readonly<Record<string, KnownOption>> = { size: { kind: 'size', help: 'virtual disk size' }, ...cipherOptions('', 'volume'), ...flatFileOptions }

/** How a LUKS header is made. */
function cipherOptions(prefix: 'encrypt.' | '', opened: 'image' | 'volume'): Readonly<Record<string, KnownOption>> {
  return {
    [`${prefix}key-secret`]: { kind: 'text', help: `ID of the secret that opens the ${opened}` },
    [`${prefix}cipher-alg`]: { kind: 'text', help: 'name of the encryption cipher algorithm' },
    [`${prefix}cipher-mode`]: { kind: 'text', help: 'name of the encryption cipher mode' },
    [`${prefix}ivgen-alg`]: { kind: 'text', help: 'name of the IV generator algorithm' },
    [`${prefix}ivgen-hash-alg`]: { kind: 'text', help: 'name of the IV generator hash algorithm' },
    [`${prefix}hash-alg`]: { kind: 'text', help: 'name of the encryption hash algorithm' },
    [`${prefix}iter-time`]: { kind: 'number', amend: true, help: 'time to spend in PBKDF in milliseconds' },
  }
}

function fileOptions(...names: readonly ('nocow' | 'extent_size_hint')[]): Readonly<Record<string, KnownOption>> {
  return Object.fromEntries(names.map((name) => [name, { kind: name === 'nocow' ? 'switch' : 'size', ofFile: true, help: 'accepted for compatibility' }]))
}

function knownOptions(format: ImageFormat, isAmend = false): Readonly<Record<string, KnownOption>> {
  if (format === 'raw') return rawOptions
  if (format === 'luks') return luksOptions
  return isAmend ? qcow2Options : Object.fromEntries(Object.entries(qcow2Options).filter(([, { amend }]) => amend !== 'only'))
}

/**
 * True if the user asks what there is: `help` or `?` between single commas.
 * @throws ExitError for a list that begins or ends with a comma, where another list is asked to be joined
 */
export function asksForHelp(texts: readonly string[]): boolean {
  const malformed = texts.find((text) => /^,|(?<!,)(?:,,)*,$/.test(text))
  if (malformed !== undefined) throw new ExitError(1, `Invalid option list: ${malformed}`)
  return texts.some((text) => text.split(/(?<!,)(?:,,)*,(?!,)/).some((part) => part === 'help' || part === '?'))
}

/** The list of what `-o` takes; for an image to be made in a file, what is of the file too. */
export function createHelp(format: ImageFormat, which: 'create' | 'create file' | 'amend' = 'create'): string {
  const units: Record<Kind, string> = { text: '<str>', size: '<size>', switch: '<bool (on/off)>', number: '<num>' }
  const lines = Object.entries(knownOptions(format, which === 'amend'))
    .filter(([, option]) => (which === 'amend' ? option.amend !== undefined : which === 'create file' || option.ofFile !== true))
    .sort(([a], [b]) => (a < b ? -1 : 1))
    .map(([name, { kind, help }]) => `  ${`${name}=${units[kind]}`.padEnd(22)} - ${help}`)
  return [`${which === 'amend' ? `Amend options for '${format}'` : `Supported ${format} options`}:`, ...lines].join('\n')
}

/**
 * Parses `-o` texts. Values come out as qemu-img shows them: sizes in bytes, switches in the words given.
 * @throws UsageError for a name or a value that cannot be
 */
export function parseCreateOptions(format: ImageFormat, texts: readonly string[], isAmend = false): CreateValues {
  const known = knownOptions(format, isAmend)
  const values: CreateValues = new Map()
  for (const text of texts) {
    if (text === '' || text.startsWith(',')) throw new UsageError(`Invalid option list: ${text}`)
    for (const [given, value] of keyValues(text)) {
      const negated = !Object.hasOwn(known, given) && given.startsWith('no') && known[given.slice(2)]?.kind === 'switch'
      const name = negated ? given.slice(2) : given
      const option = Object.hasOwn(known, name) ? known[name] : undefined
      if (option === undefined) throw new UsageError(`Invalid parameter '${name}'${didYouMean(name, Object.keys(known))}`)
      values.set(name, shownValue(name, option.kind, negated ? 'off' : value))
    }
  }
  return values
}

const switchWords = { on: ['on', 'yes', 'true', 'y'], off: ['off', 'no', 'false', 'n'] }

/** What a switch was set to; `undefined` where it was not. */
export function switchOf(values: CreateValues, name: string): boolean | undefined {
  const value = values.get(name)
  return value === undefined ? undefined : switchWords.on.includes(value)
}

/** True if `amend` can change the option. */
export function isAmendable(name: string): boolean {
  return qcow2Options[name]?.amend !== undefined
}

function shownValue(name: string, kind: Kind, value: string): string {
  switch (kind) {
    case 'size':
      return String(optionSize(name, value))
    case 'switch':
      if (switchWords.on.includes(value) || switchWords.off.includes(value)) return value
      throw new UsageError(`Parameter '${name}' expects 'on' or 'off'`)
    case 'number':
      if (/^-?\d+$/.test(value)) return String(Number(value))
      throw new UsageError(`Parameter '${name}' expects a number`)
    default:
      return value
  }
}

/** `Formatting 'F', fmt=qcow2 cluster_size=65536 ...`, in qemu-img's order. */
export function formattingLine(filename: string, format: ImageFormat, values: CreateValues): string {
  const shown = Object.entries(knownOptions(format)).flatMap(([name, { always }]) => {
    const value = values.get(name) ?? always
    // as it would have to be written in -o
    return value === undefined ? [] : [`${name}=${value.replaceAll(',', ',,')}`]
  })
  return `Formatting '${filename}', ${[`fmt=${format}`, ...shown].join(' ')}`
}

const preallocations = ['off', 'metadata', 'falloc', 'full'] as const
type Preallocation = (typeof preallocations)[number]

/** The `preallocation` option. @throws ExitError for a value there is not */
export function preallocationOf(values: CreateValues): Preallocation {
  const value = values.get('preallocation') ?? 'off'
  const found = preallocations.find((known) => known === value)
  if (found === undefined) throw new ExitError(1, `Parameter 'preallocation' does not accept value '${value}'${didYouMean(value, preallocations)}`)
  return found
}

/**
 * What the engine is asked for.
 * @throws ExitError in qemu-img's words where options exclude each other or a value is out of range
 */
export function layoutOf(values: CreateValues): CreateOptions & { size: number } {
  const flag = (name: string): boolean => switchOf(values, name) === true
  const clusterSize = Number(values.get('cluster_size') ?? 65536)
  check(Number(values.get('size') ?? 0) < 2 ** 53, tooLarge('qcow2'))
  const version = versionOf(values.get('compat') ?? '1.1')
  const refcountBits = Number(values.get('refcount_bits') ?? 16)
  const compressionType = compressionOf(values.get('compression_type') ?? 'zlib')
  const backingFile = values.get('backing_file')
  const dataFile = dataFilePath(values)
  check(clusterSize >= 512 && clusterSize <= 2 << 20 && Number.isInteger(Math.log2(clusterSize)), 'Cluster size must be a power of two between 512 and 2048k')
  check(version === 3 || !flag('extended_l2'), needsV3('Extended L2 entries are only supported'))
  check(!flag('extended_l2') || clusterSize >= 16384, 'Extended L2 entries are only supported with cluster sizes of at least 16384 bytes')
  check(refcountBits >= 1 && refcountBits <= 64 && Number.isInteger(Math.log2(refcountBits)), 'Refcount width must be a power of two and may not exceed 64 bits')
  check(version === 3 || refcountBits === 16, 'Different refcount widths than 16 bits require compatibility level 1.1 or above (use version=v3 or greater)')
  check(version === 3 || !flag('lazy_refcounts'), needsV3('Lazy refcounts only supported'))
  check(version === 3 || dataFile === undefined, needsV3('External data files are only supported'))
  check(version === 3 || compressionType === 'zlib', needsV3('Non-zlib compression type is only supported'))
  check(!flag('data_file_raw') || dataFile !== undefined, 'data-file-raw requires data-file')
  check(!flag('data_file_raw') || backingFile === undefined, 'Backing file and data-file-raw cannot be used at the same time')
  const preallocation = preallocationOf(values)
  check(preallocation === 'off' || backingFile === undefined || flag('extended_l2'), 'Backing file and preallocation can only be used at the same time if extended_l2 is on')
  check(backingFile !== undefined || values.get('backing_fmt') === undefined, 'Backing format cannot be used without backing file')
  return {
    size: Number(values.get('size') ?? 0),
    clusterSize,
    version,
    refcountBits,
    extendedL2: flag('extended_l2'),
    lazyRefcounts: flag('lazy_refcounts'),
    compressionType,
    preallocation,
    ...(backingFile === undefined ? {} : { backing: { file: backingFile, format: values.get('backing_fmt') ?? 'raw' } }),
    ...(dataFile === undefined ? {} : { dataFile, dataFileRaw: flag('data_file_raw') }),
  }
}

/** The data file is a file: `file:` before its path is not stored, as in QEMU. */
function dataFilePath(values: CreateValues): string | undefined {
  const name = values.get('data_file')
  if (name === undefined || !name.startsWith('file:')) return name
  const place = parsePlace(name)
  return place.kind === 'file' ? place.path : name
}

/** `compat` as the header's version. @throws ExitError */
export function versionOf(compat: string): 2 | 3 {
  if (compat === '0.10' || compat === 'v2') return 2
  if (compat === '1.1' || compat === 'v3') return 3
  throw new ExitError(1, `Parameter 'version' does not accept value '${compat}'`)
}

function compressionOf(value: string): 'zlib' | 'zstd' {
  if (value === 'zlib' || value === 'zstd') return value
  throw new ExitError(1, `Parameter 'compression-type' does not accept value '${value}'${didYouMean(value, ['zlib', 'zstd'])}`)
}

/** What a size is that the format, or this program, does not reach. */
export function tooLarge(format: ImageFormat): string {
  return `The image size is too large for file format '${format}'${format === 'qcow2' ? ' (try using a larger cluster size)' : ''}`
}

function needsV3(what: string): string {
  return `${what} with compatibility level 1.1 and above (use version=v3 or greater)`
}

function check(holds: boolean, message: string): void {
  if (!holds) throw new ExitError(1, message)
}
