/**
 * A file on a web server as a read-only device, by range requests (RFC 9110, section 14). Owns the checks
 * that the server answers with exactly the bytes asked for, of the same file every time.
 */
import { IoError, Qcow2Error, UnsupportedError } from '../core/errors.ts'
import { redacted } from '../core/redact.ts'
import type { CallOptions } from './device.ts'
import { ask, readBody, withRetries, type HttpAddress, type HttpAnswer, type HttpSettings, type Patience } from './http-request.ts'
import { ReadOnlyDevice } from './read-only.ts'

/** Options of {@link openHttp}. */
export interface HttpOptions extends CallOptions {
  /**
   * Sent with every request to the host of the address, for example `authorization`; not to other hosts that it
   * redirects to (a browser decides that itself).
   */
  readonly headers?: Readonly<Record<string, string>> | undefined
  /** Used in place of the global `fetch`. */
  readonly fetch?: typeof globalThis.fetch | undefined
  /**
   * Milliseconds for an answer to begin, and then for each further 4 KiB of it; then the request is given up and not
   * repeated. Default 30 000; 0 for ever.
   */
  readonly timeout?: number | undefined
  /**
   * How often a request is repeated that failed by a lost connection or by a status that may pass (408, 425, 429, 5xx), after pauses
   * from 0.1 s on, three times as long each, or what `Retry-After` says, 10 s at most. Default 3. A connection that cannot be
   * made while opening is not tried again.
   */
  readonly retries?: number | undefined
}

/**
 * Opens a file on a web server that supports range requests. Every read is one request, so wrap the
 * device in `readAhead()` to read much of it. A redirect is followed when the file is opened, and its end is then asked
 * directly, until that refuses: addresses with a signature expire. A user name and password in the address
 * become an `authorization` header; errors tell neither them nor the values of a query.
 * @throws Qcow2Error `ERR_NOT_FOUND`, `ERR_UNSUPPORTED` (no range requests, no web address), `ERR_IO`
 * @throws TypeError for text that is no URL, and for headers that are none
 */
export async function openHttp(url: string | URL, options: HttpOptions = {}): Promise<HttpDevice> {
  const { headers = {}, timeout = 30_000, retries = 3 } = options
  const address = webAddress(url)
  const name = redacted(String(url))
  const settings: HttpSettings = { headers: { ...credentials(address), ...checked(headers) }, fetch: options.fetch ?? globalThis.fetch, timeout, retries }
  address.username = address.password = ''
  const origin: HttpAddress = { url: address, own: true }
  const signal = options.signal ?? undefined
  try {
    return await withRetries(settings, signal, async (patience) => {
      const answer = await askRange(settings, origin, { offset: 0, length: 1 }, patience).catch((error: unknown) => {
        // nobody there: a mistake in the address is told at once
        throw error instanceof Error && error.cause !== undefined ? new Error(error.message, { cause: error.cause }) : error
      })
      void answer.response.body?.cancel().catch(() => undefined)
      const size = await sizeOf(settings, answer, name, patience)
      return new HttpDevice(String(url), settings, { origin, pinned: answer.address, size, version: versionOf(answer.response) })
    })
  } catch (cause) {
    signal?.throwIfAborted()
    throw Qcow2Error.is(cause) ? cause : new IoError('open', cause, { name })
  }
}

/** A page's own address is where a relative one in a browser begins. */
function webAddress(text: string | URL): URL {
  const base = (globalThis as { readonly location?: { readonly href?: string } }).location?.href
  if (!URL.canParse(String(text), base)) throw new TypeError(`'${redacted(String(text))}' is no URL`)
  const url = new URL(String(text), base)
  if (url.protocol === 'http:' || url.protocol === 'https:') return url
  throw new UnsupportedError(`${url.protocol} URLs are not supported; use http: or https:`, [url.protocol])
}

function credentials({ username, password }: URL): Record<string, string> {
  if (username === '' && password === '') return {}
  const bytes = new TextEncoder().encode(`${decoded(username)}:${decoded(password)}`)
  return { authorization: `Basic ${btoa(String.fromCharCode(...bytes))}` }
}

function decoded(text: string): string {
  try {
    return decodeURIComponent(text)
  } catch {
    return text // a percent sign that begins no code
  }
}

/** With names in lower case, so that none is sent twice. @throws TypeError for what cannot be a header */
function checked(headers: Readonly<Record<string, string>>): Record<string, string> {
  return Object.fromEntries(new Headers(headers))
}

/** What is known of the file. */
interface HttpFile {
  readonly origin: HttpAddress
  /** Where the last answer came from. */
  readonly pinned: HttpAddress
  readonly size: number
  readonly version: Version
}

/** A file on a web server, as {@link openHttp} found it. */
export class HttpDevice extends ReadOnlyDevice {
  readonly size: number
  /** The address the device was opened with. It may hold credentials. */
  readonly url: string
  readonly #settings: HttpSettings
  readonly #name: string
  readonly #origin: HttpAddress
  #pinned: HttpAddress
  #version: Version

  /** @internal */
  constructor(url: string, settings: HttpSettings, { origin, pinned, size, version }: HttpFile) {
    super()
    this.url = url
    this.size = size
    this.#name = redacted(url)
    this.#settings = settings
    this.#origin = origin
    this.#pinned = pinned
    this.#version = version
  }

  protected async onRead(offset: number, target: Uint8Array, options?: CallOptions): Promise<void> {
    const { length } = target
    const signal = options?.signal
    try {
      await withRetries(this.#settings, signal, (patience) => this.#read(offset, target, patience))
    } catch (cause) {
      signal?.throwIfAborted()
      throw new IoError('read', cause, { offset, length, name: this.#name })
    }
  }

  async #read(offset: number, target: Uint8Array, patience: Patience): Promise<void> {
    const range = { offset, length: target.length }
    const pinned = this.#pinned
    let answer = await askRange(this.#settings, pinned, range, patience)
    if (refusals.has(answer.response.status) && pinned !== this.#origin) {
      void answer.response.body?.cancel().catch(() => undefined)
      answer = await askRange(this.#settings, this.#origin, range, patience)
    }
    try {
      const version = this.#check(answer, range)
      await readBody(answer.response, target, patience)
      this.#version = version
      this.#pinned = answer.address
    } finally {
      if (answer.response.body?.locked === false) void answer.response.body.cancel().catch(() => undefined)
    }
  }

  /** The version to compare with from now on. */
  #check({ response, address }: HttpAnswer, { offset, length }: Range): Version {
    if (response.status !== 206) throw new Error(`status ${response.status} in place of the range`)
    const range = contentRange(response)
    if (range === undefined) checkHidden(response, length)
    else if (range.first !== offset || range.last !== offset + length - 1) throw new Error('the server sent another range')
    const version = versionOf(response)
    const moved = address.url.host !== this.#pinned.url.host
    if ((range !== undefined && range.size !== this.size) || differs(this.#version, version, moved)) throw new Error('the file changed on the server')
    return moved ? version : this.#version
  }
}

interface Range {
  readonly offset: number
  readonly length: number
}

/** How a server says that an address with a signature is no longer good. */
const refusals: ReadonlySet<number> = new Set([400, 401, 403, 404, 410])

function askRange(settings: HttpSettings, address: HttpAddress, { offset, length }: Range, patience: Patience): Promise<HttpAnswer> {
  const headers = { 'range': `bytes=${offset}-${offset + length - 1}`, 'accept-encoding': 'identity' }
  return ask(settings, address, { method: 'GET', headers }, patience)
}

/** Bytes of the file, by the answer to a request for its first byte. */
async function sizeOf(settings: HttpSettings, { response, address }: HttpAnswer, name: string, patience: Patience): Promise<number> {
  const { status } = response
  const range = contentRange(response)
  if (status === 206 && range?.first === 0 && range.last === 0) return range.size
  if (status === 416 && range?.size === 0) return 0
  if (status === 404 || status === 410) throw new Qcow2Error('ERR_NOT_FOUND', `${name}: status ${status}`)
  if (response.ok && status !== 206) {
    if (response.headers.get('content-length') === '0') return 0
    throw new UnsupportedError(`${name}: the server does not support range requests`, ['range requests'])
  }
  if (status !== 206 || response.headers.has('content-range')) {
    throw new IoError('open', status === 206 || status === 416 ? 'the server sent another range' : `status ${status} ${response.statusText}`.trim(), { name })
  }
  checkHidden(response, 1)
  return hiddenSize(await ask(settings, address, { method: 'HEAD', headers: { 'accept-encoding': 'identity' } }, patience), name)
}

/** What a page of another origin may always see: the length in an answer to HEAD. */
function hiddenSize({ response }: HttpAnswer, name: string): number {
  const size = /^\d+$/.test(response.headers.get('content-length') ?? '') ? Number(response.headers.get('content-length')) : Number.NaN
  if (response.ok && Number.isSafeInteger(size)) return size
  throw new UnsupportedError(`${name}: the server sends ranges but does not tell the size of the file: let it send Access-Control-Expose-Headers: Content-Range`, ['Content-Range'])
}

/** A range whose place is not shown, as to a page of another origin, is trusted; parts with headers of their own are none. */
function checkHidden(response: Response, length: number): void {
  if (response.headers.has('content-range')) throw new Error('the server sent another range')
  if (/^multipart\//i.test(response.headers.get('content-type') ?? '')) throw new Error('the server sent several ranges')
  const told = response.headers.get('content-length')
  if (told !== null && Number(told) !== length) throw new Error(`the server sent ${told} bytes, not ${length}`)
}

/** `bytes first-last/size`, or `bytes * /size` (without the space) of an empty file. */
function contentRange(response: Response): { first: number; last: number; size: number } | undefined {
  const match = /^bytes (?:(\d+)-(\d+)|\*)\/(\d+)$/.exec(response.headers.get('content-range') ?? '')
  if (match === null) return undefined
  const size = Number(match[3])
  if (!Number.isSafeInteger(size)) return undefined
  return { first: Number(match[1] ?? 0), last: Number(match[2] ?? -1), size }
}

/** What changes when the file does, as far as the server tells. */
interface Version {
  readonly tag: string | undefined
  readonly modified: string | undefined
}

function versionOf({ headers }: Response): Version {
  return { tag: headers.get('etag')?.replace(/^W\//, ''), modified: headers.get('last-modified') ?? undefined }
}

/** By the tag, or by the date where there is none; `moved`: tags are a host's own, so another host's says nothing. */
function differs(known: Version, found: Version, moved: boolean): boolean {
  if (moved) return known.modified !== undefined && found.modified !== undefined ? known.modified !== found.modified : known.tag !== found.tag
  if (known.tag !== undefined || found.tag !== undefined) return known.tag !== found.tag
  return known.modified !== found.modified
}
