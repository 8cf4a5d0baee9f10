/**
 * A file on a web server as a read-only device, by range requests (RFC 9110, section 14). Owns the checks
 * that the server answers with exactly the bytes asked for, of the same file every time. Uses the global
 * `fetch` only.
 */
import { IoError, Qcow2Error, UnsupportedError } from '../core/errors.ts'
import type { CallOptions } from './device.ts'
import { ReadOnlyDevice } from './read-only.ts'

/** Options of {@link openHttp}. */
export interface HttpOptions extends CallOptions {
  /** Sent with every request, for example `authorization`. */
  readonly headers?: Readonly<Record<string, string>> | undefined
  /** Used in place of the global `fetch`. */
  readonly fetch?: typeof globalThis.fetch | undefined
}

/**
 * Opens a file on a web server that supports range requests. Every read is one request, so wrap the
 * device in `readAhead()` to read much of it.
 * @throws Qcow2Error `ERR_NOT_FOUND`, `ERR_UNSUPPORTED` (no range requests), `ERR_IO`
 */
export async function openHttp(url: string | URL, options: HttpOptions = {}): Promise<HttpDevice> {
  const request = { url: String(url), headers: options.headers ?? {}, fetch: options.fetch ?? globalThis.fetch }
  const response = await send(request, 0, 1, options.signal)
  await response.body?.cancel()
  const size = sizeOf(response, request.url)
  return new HttpDevice(request, size, versionOf(response))
}

interface HttpRequest {
  readonly url: string
  readonly headers: Readonly<Record<string, string>>
  readonly fetch: typeof globalThis.fetch
}

/** A file on a web server, as {@link openHttp} found it. */
export class HttpDevice extends ReadOnlyDevice {
  readonly size: number
  readonly #request: HttpRequest
  readonly #version: string | undefined

  /** @internal */
  constructor(request: HttpRequest, size: number, version: string | undefined) {
    super()
    this.#request = request
    this.size = size
    this.#version = version
  }

  /** The address the device was opened with. */
  get url(): string {
    return this.#request.url
  }

  protected async onRead(offset: number, target: Uint8Array, options?: CallOptions): Promise<void> {
    const { length } = target
    const response = await send(this.#request, offset, length, options?.signal)
    try {
      this.#check(response, offset, length)
      await fill(target, response)
    } catch (cause) {
      await response.body?.cancel().catch(() => undefined)
      options?.signal?.throwIfAborted()
      throw new IoError('read', cause, { offset, length, name: this.url })
    }
  }

  #check(response: Response, offset: number, length: number): void {
    const range = contentRange(response)
    if (response.status !== 206 || range === undefined) throw new Error(`status ${response.status} in place of the range`)
    if (range.first !== offset || range.last !== offset + length - 1) throw new Error('the server sent another range')
    if (range.size !== this.size || versionOf(response) !== this.#version) throw new Error('the file changed on the server')
  }
}

async function send(request: HttpRequest, offset: number, length: number, signal: AbortSignal | null | undefined): Promise<Response> {
  const headers = { ...request.headers, range: `bytes=${offset}-${offset + length - 1}`, 'accept-encoding': 'identity' }
  try {
    // a browser's fetch must not be called as the method of another object
    const { fetch } = request
    return await fetch(request.url, { headers, signal: signal ?? null })
  } catch (cause) {
    signal?.throwIfAborted()
    throw new IoError('read', cause, { offset, length, name: request.url })
  }
}

/** Exactly as many bytes as `target` has: a longer body is not read to its end. */
async function fill(target: Uint8Array, response: Response): Promise<void> {
  if (response.body === null) throw new Error('the response has no body')
  let at = 0
  for await (const part of response.body as AsyncIterable<Uint8Array>) {
    if (at + part.length > target.length) throw new Error(`the response is longer than ${target.length} bytes`)
    target.set(part, at)
    at += part.length
  }
  if (at < target.length) throw new Error(`the response ended after ${at} of ${target.length} bytes`)
}

function sizeOf(response: Response, url: string): number {
  const range = contentRange(response)
  if ((response.status === 206 || response.status === 416) && range?.size !== undefined) return range.size
  if (response.status === 404 || response.status === 410) throw new Qcow2Error('ERR_NOT_FOUND', `${url}: status ${response.status}`)
  if (response.ok) throw new UnsupportedError(`${url}: the server does not support range requests`, ['range requests'])
  throw new IoError('open', `status ${response.status} ${response.statusText}`, { name: url })
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
function versionOf(response: Response): string | undefined {
  return response.headers.get('etag') ?? response.headers.get('last-modified') ?? undefined
}
