/**
 * What a name on the command line means: a file, an NBD export, a web address; with the driver and
 * the options of `json:` and `--image-opts`. Owns the grammar of names; opens nothing.
 */
import { redacted } from '../../core/redact.ts'
import type { NbdAddress } from '../../nbd/socket.ts'
import { UsageError } from '../errors.ts'
import { optionSize } from '../size.ts'
import { injectedError, type InjectedError } from './blkdebug.ts'
import { isImageFormat } from './formats.ts'
import { jsonTree, optionTree, type OptionTree } from './key-values.ts'
import { nbdUri, parseNbdName } from './nbd-name.ts'

/** Where the bytes are. */
export type Place =
  | {
      readonly kind: 'file'
      readonly path: string
      /** False: opened whoever else uses it. */
      readonly locking?: boolean
    }
  | {
      readonly kind: 'nbd'
      readonly address: NbdAddress
      readonly name: string
      /** The metadata context that a map shows, instead of `base:allocation`. */
      readonly context?: string
    }
  | { readonly kind: 'http'; readonly url: URL }
  /** Zeroes that take anything: QEMU's `null-co`. */
  | { readonly kind: 'null'; readonly size: number }
  /** Fails requests: by rules, and those of a configuration file. */
  | { readonly kind: 'blkdebug'; readonly inner: Place; readonly rules: readonly InjectedError[]; readonly configuration: string | undefined }
  /** A format within a format: the outer one's bytes are the inner one's guest view. */
  | { readonly kind: 'image'; readonly spec: ImageSpec }

/** An image as the user named it. */
export interface ImageSpec {
  /** How messages and listings call it. */
  readonly shown: string
  /** As the user wrote its options, where there are any. */
  readonly given?: string
  /** The format; `undefined` to find out. */
  readonly format: string | undefined
  readonly place: Place
  /** Instead of the backing file the image names; `null` for none. */
  readonly backing?: ImageSpec | null
  /** Instead of the data file the image names. */
  readonly dataFile?: Place
  /** The id of the secret for an encrypted image. */
  readonly keySecret?: string
  readonly readOnly?: boolean
  /** With format raw: the image is only this part of the bytes; `size` without a value reaches to their end. */
  readonly part?: { readonly offset: number; readonly size: number | undefined }
}

/** Options that tune QEMU's own machinery and change no result. */
const harmless = new Set([
  'auto-read-only', 'cache', 'cache-clean-interval', 'cache-size', 'detect-zeroes', 'discard', 'discard-no-unref', 'force-share',
  'l2-cache-entry-size', 'l2-cache-size', 'locking', 'lazy-refcounts', 'node-name', 'overlap-check', 'pass-discard-other',
  'pass-discard-request', 'pass-discard-snapshot', 'refcount-cache-size', 'x-check-cache-dropped',
])

/**
 * The meaning of a plain name: a path, `file:PATH`, `json:{...}`, `nbd:` and `nbd+unix:` and `http(s):` addresses.
 * @throws UsageError for a protocol that is not known
 */
export function parseName(name: string, format: string | undefined): ImageSpec {
  if (name.startsWith('json:')) return { ...fromTree(jsonTree(name.slice(5)), name, format), given: name }
  const place = parsePlace(name)
  return { shown: shownPlace(place, name), format, place }
}

/** The meaning of `--image-opts`. */
export function parseImageOpts(text: string): ImageSpec {
  return { ...fromTree(optionTree(text), text, undefined), given: text }
}

/** The bytes a plain name stands for. */
export function parsePlace(name: string): Place {
  const protocol = protocolOf(name)
  switch (protocol) {
    case undefined:
      return { kind: 'file', path: name }
    case 'file':
      return { kind: 'file', path: name.startsWith('file:///') ? decodeURIComponent(name.slice(7)) : plainPath(name.slice(5)) }
    case 'nbd':
    case 'nbd+unix':
    case 'nbd+tcp':
      return { kind: 'nbd', ...parseNbdName(name) }
    case 'http':
    case 'https':
      return webPlace(name)
    case 'blkdebug':
      return blkdebugName(name)
    default:
      throw new UsageError(`Unknown protocol '${protocol}'${protocol.startsWith('nbds') ? ': TLS is not supported' : ''}`)
  }
}

/** What stands before a name's first colon, if no slash does. A single letter is a drive of Windows: `C:\disk.qcow2`, `C:/disk.qcow2`. */
export function protocolOf(name: string): string | undefined {
  const colon = name.indexOf(':')
  const slash = name.indexOf('/')
  if (colon <= 0 || (slash >= 0 && slash < colon) || /^[A-Za-z]:[\\/]/.test(name)) return undefined
  return name.slice(0, colon)
}

/** @throws UsageError if the text is no address */
function webPlace(text: string): Place {
  const url = URL.canParse(text) ? new URL(text) : undefined
  if (url === undefined || url.hostname === '' || !/^https?:$/.test(url.protocol)) throw new UsageError(`'${redacted(text)}' is no URL of a web server`)
  return { kind: 'http', url }
}

/** With its folder, where the path alone would be read as a protocol. */
function plainPath(path: string): string {
  return /^[^/]+:/.test(path) ? `./${path}` : path
}

/** `blkdebug:CONFIGURATION:NAME`, where the first may be empty. */
function blkdebugName(name: string): Place {
  const match = /^blkdebug:([^:]*):(.+)$/s.exec(name)
  if (match === null) throw new UsageError(`${name}: the form is blkdebug:CONFIGURATION:FILENAME`)
  return { kind: 'blkdebug', inner: parsePlace(match[2]!), rules: [], configuration: match[1] === '' ? undefined : match[1] }
}

function fromTree(tree: OptionTree, text: string, format: string | undefined): ImageSpec {
  const options = new Options(tree)
  const driver = options.text('driver') ?? format
  const readOnly = options.text('read-only')
  const common = readOnly === undefined ? {} : { readOnly: readOnly === 'on' || readOnly === 'true' }
  if (driver !== undefined && !isImageFormat(driver)) {
    const place = placeOf(driver, options)
    options.end()
    return { shown: shownPlace(place, text), format: undefined, place, ...common }
  }
  const spec = formatSpec(driver, options, text)
  options.end()
  return { ...spec, ...common }
}

/** An image of a format (or one to be found out) over its `file`. */
function formatSpec(format: string | undefined, options: Options, text: string): ImageSpec {
  const filename = options.text('filename')
  const below = options.tree('file')
  if (filename === undefined && below === undefined) throw new UsageError(`${text}: a 'file' is needed`)
  const place = below === undefined ? parsePlace(filename!) : nestedPlace(below)
  const part = format === 'raw' ? partOf(options) : undefined
  const keySecret = format === 'luks' ? options.text('key-secret') : options.tree('encrypt')?.['key-secret']
  const backing = options.either('backing')
  const data = options.tree('data-file')
  return {
    shown: shownPlace(place, text),
    format,
    place,
    ...(part === undefined ? {} : { part }),
    ...(typeof keySecret === 'string' ? { keySecret } : {}),
    ...(backing === undefined ? {} : { backing: backing === '' ? null : fromTree(requireTree(backing, 'backing'), 'backing', undefined) }),
    ...(data === undefined ? {} : { dataFile: nestedPlace(data) }),
  }
}

function partOf(options: Options): ImageSpec['part'] {
  const [offset, size] = [options.text('offset'), options.text('size')]
  if (offset === undefined && size === undefined) return undefined
  return { offset: offset === undefined ? 0 : optionSize('offset', offset), size: size === undefined ? undefined : optionSize('size', size) }
}

function nestedPlace(tree: OptionTree): Place {
  const { driver } = tree
  if (typeof driver === 'string' && isImageFormat(driver)) return { kind: 'image', spec: fromTree(tree, 'file', undefined) }
  const options = new Options(tree)
  const place = placeOf(options.text('driver') ?? 'file', options)
  options.end()
  return place
}

function placeOf(driver: string, options: Options): Place {
  switch (driver) {
    case 'file':
    case 'host_device': {
      const path = options.text('filename')
      if (path === undefined) throw new UsageError(`The '${driver}' block driver requires a file name`)
      const place = parsePlace(path)
      const locking = options.text('locking')
      return place.kind === 'file' && locking === 'off' ? { ...place, locking: false } : place
    }
    case 'null-co':
    case 'null-aio':
      for (const ignored of ['latency-ns', 'read-zeroes', 'filename']) options.text(ignored)
      return { kind: 'null', size: optionSize('size', options.text('size') ?? '1G') }
    case 'nbd':
      return nbdPlace(options)
    case 'blkdebug':
      return blkdebugPlace(options)
    case 'http':
    case 'https': {
      const url = options.text('url') ?? options.text('filename')
      if (url === undefined) throw new UsageError(`The '${driver}' block driver requires a url`)
      return webPlace(url)
    }
    default:
      throw new UsageError(`Unknown driver '${driver}'`)
  }
}

function blkdebugPlace(options: Options): Place {
  const image = options.tree('image')
  if (image === undefined) throw new UsageError("The 'blkdebug' block driver requires an image")
  // limits cut requests, and without rules that ask for a state setting one changes nothing
  for (const without of ['align', 'max-transfer', 'opt-write-zero', 'max-write-zero', 'opt-discard', 'max-discard', 'set-state']) options.either(without)
  const rules = Object.values(options.tree('inject-error') ?? {}).map((rule) => injectedError(requireTree(rule, 'inject-error')))
  return { kind: 'blkdebug', inner: nestedPlace(image), rules, configuration: options.text('config') }
}

function nbdPlace(options: Options): Place {
  const server = options.tree('server') ?? {}
  const field = (name: string): string | undefined => (typeof server[name] === 'string' ? server[name] : options.text(name))
  const name = options.text('export') ?? ''
  const context = options.text('x-dirty-bitmap')
  const common = { kind: 'nbd', name, ...(context === undefined ? {} : { context }) } as const
  options.text('type')
  const path = field('path')
  if (path !== undefined) return { ...common, address: { path } }
  const host = field('host')
  if (host === undefined) throw new UsageError("The 'nbd' block driver requires server.path or server.host")
  return { ...common, address: { host, port: Number(field('port') ?? 10809) } }
}

function requireTree(value: string | OptionTree, name: string): OptionTree {
  if (typeof value === 'string') throw new UsageError(`'${name}' must hold options, not a node name`)
  return value
}

function shownPlace(place: Place, text: string): string {
  if (place.kind === 'file') return place.path
  if (place.kind === 'image') return place.spec.shown
  if (place.kind === 'nbd' && place.context === undefined) return nbdUri(place)
  return place.kind === 'http' ? redacted(place.url.href) : text
}

/** Takes options out one by one, so that those nobody knew are left. */
class Options {
  readonly #tree: OptionTree

  constructor(tree: OptionTree) {
    this.#tree = { ...tree }
  }

  text(key: string): string | undefined {
    const value = this.#tree[key]
    if (typeof value !== 'string') return undefined
    this.#take(key)
    return value
  }

  tree(key: string): OptionTree | undefined {
    const value = this.#tree[key]
    if (typeof value !== 'object') return undefined
    this.#take(key)
    return value
  }

  either(key: string): string | OptionTree | undefined {
    return this.text(key) ?? this.tree(key)
  }

  end(): void {
    const left = Object.keys(this.#tree).filter((key) => !harmless.has(key))
    if (left.length > 0) throw new UsageError(`Block option '${left[0]!}' is not known`)
  }

  #take(key: string): void {
    // eslint-disable-next-line @typescript-eslint/no-dynamic-delete -- a copy of its own
    delete this.#tree[key]
  }
}
