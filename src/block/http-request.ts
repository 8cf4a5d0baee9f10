/**
 * One request to a web server, patiently: redirects, time-outs, and which failures another attempt may mend. Owns where
 * a caller's own headers may go; knows nothing of ranges. Uses `fetch` only, as a browser has it.
 */
import { pause } from '../core/pause.ts'
import { redacted } from '../core/redact.ts'

/** How a server is asked. */
export interface HttpSettings {
  /** Sent to the host of the address given, and to no other. */
  readonly headers: Readonly<Record<string, string>>
  readonly fetch: typeof globalThis.fetch
  /** Milliseconds, 0 for ever. */
  readonly timeout: number
  /** Attempts after the first. */
  readonly retries: number
}

/** Where a file is, and whether that is the host the caller's headers are for. */
export interface HttpAddress {
  readonly url: URL
  readonly own: boolean
}

/** An answer, and the address that gave it. */
export interface HttpAnswer {
  readonly response: Response
  readonly address: HttpAddress
}

/** A failure that may be gone at the next attempt. */
class PassingError extends Error {
  /** Milliseconds the server asks to wait. */
  readonly after: number | undefined

  constructor(message: string, options: ErrorOptions & { readonly after?: number | undefined } = {}) {
    super(message, options)
    this.after = options.after
  }
}

const maxRedirects = 20
/** Fewer bytes are no progress: a server could go on for ever with one now and then. */
const leastProgress = 4096
/** The longest pause before another attempt, in milliseconds. */
const maxPause = 10_000
const passing: ReadonlySet<number> = new Set([408, 425, 429, 500, 502, 503, 504])

/** Bounds one attempt: its own clock and the caller's signal, whichever ends first. */
export class Patience {
  readonly #abort = new AbortController()
  readonly #timeout: number
  readonly #signal: AbortSignal | undefined
  readonly #ended: Promise<never>
  #timer: ReturnType<typeof setTimeout> | undefined
  #unheard = 0

  constructor(timeout: number, signal: AbortSignal | undefined) {
    signal?.throwIfAborted()
    this.#timeout = timeout
    this.#signal = signal
    this.#ended = new Promise((_, reject) => {
      this.#abort.signal.addEventListener('abort', () => reject(this.#abort.signal.reason as Error), { once: true })
    })
    this.#ended.catch(() => undefined)
    signal?.addEventListener('abort', this.#onAbort, { once: true })
    this.#start()
  }

  get signal(): AbortSignal {
    return this.#abort.signal
  }

  /** The outcome of `work`, unless time is over first: also where it does not hear the signal. */
  wait<T>(work: Promise<T>): Promise<T> {
    return Promise.race([work, this.#ended])
  }

  /** Bytes came. */
  heard(bytes: number): void {
    this.#unheard += bytes
    if (this.#unheard >= leastProgress) this.#start()
  }

  end(): void {
    clearTimeout(this.#timer)
    this.#signal?.removeEventListener('abort', this.#onAbort)
  }

  #start(): void {
    this.#unheard = 0
    clearTimeout(this.#timer)
    if (this.#timeout > 0) this.#timer = setTimeout(() => this.#abort.abort(new Error(`the server said nothing for ${this.#timeout} ms`)), this.#timeout)
  }

  readonly #onAbort = (): void => this.#abort.abort(this.#signal?.reason)
}

/** Sends one request and follows where the server points. @throws Error a {@link PassingError} where asking again may help */
export async function ask(settings: HttpSettings, address: HttpAddress, init: { readonly method: 'GET' | 'HEAD'; readonly headers: Record<string, string> }, patience: Patience): Promise<HttpAnswer> {
  let at = address
  for (let hops = 0; hops <= maxRedirects; hops++) {
    let response = await call(settings, at, { ...init, redirect: 'manual' }, patience)
    // a browser does not show where a redirect leads, but follows it
    if (response.type === 'opaqueredirect') {
      response = await call(settings, at, { ...init, redirect: 'follow' }, patience)
      if (response.url !== '') at = follow(at, response.url)
      return { response, address: at }
    }
    const target = response.status >= 300 && response.status < 400 ? response.headers.get('location') : null
    if (target === null) {
      if (passing.has(response.status)) throw await passingAnswer(response)
      return { response, address: at }
    }
    await response.body?.cancel().catch(() => undefined)
    at = follow(at, target)
  }
  throw new Error(`more than ${maxRedirects} redirects`)
}

async function call({ headers, fetch }: HttpSettings, { url, own }: HttpAddress, init: { method: string; redirect: 'manual' | 'follow'; headers: Record<string, string> }, patience: Patience): Promise<Response> {
  try {
    const all = Object.assign({}, own ? headers : {}, init.headers)
    return await patience.wait(fetch(url.href, { ...init, headers: all, signal: patience.signal }))
  } catch (cause) {
    if (patience.signal.aborted) throw cause
    throw new PassingError(redacted(wordsOf(cause)), { cause })
  }
}

/** What happened, where `fetch` itself says no more than that it failed. */
function wordsOf(error: unknown): string {
  const { message = '', cause } = error as { readonly message?: string; readonly cause?: { readonly message?: string; readonly code?: string } }
  return [cause?.message, cause?.code, message].find((words) => typeof words === 'string' && words !== '') ?? String(error)
}

/** The address a redirect names. The caller's headers go along to the same host only, and not from https back to http. */
function follow(from: HttpAddress, location: string): HttpAddress {
  const url = URL.canParse(location, from.url.href) ? new URL(location, from.url.href) : undefined
  if (url === undefined || !/^https?:$/.test(url.protocol)) throw new Error(`a redirect to ${url === undefined ? 'no address' : `a ${url.protocol} address`} is not followed`)
  url.username = url.password = '' // fetch takes none
  const upgraded = url.protocol === 'https:' && from.url.protocol === 'http:' && url.hostname === from.url.hostname && url.port === '' && from.url.port === ''
  return { url, own: from.own && (url.origin === from.url.origin || upgraded) }
}

async function passingAnswer(response: Response): Promise<PassingError> {
  await response.body?.cancel().catch(() => undefined)
  const seconds = Number(response.headers.get('retry-after') ?? Number.NaN)
  return new PassingError(`status ${response.status} ${response.statusText}`.trim(), Number.isFinite(seconds) ? { after: seconds * 1000 } : {})
}

/**
 * Fills `target` with the body, which must have exactly as many bytes: a longer one is not read to its end.
 */
export async function readBody(response: Response, target: Uint8Array, patience: Patience): Promise<void> {
  if (response.body === null) throw new Error('the response has no body')
  // not by iteration: not every browser's streams have it
  const reader = (response.body as ReadableStream<Uint8Array>).getReader()
  let at = 0
  try {
    for (;;) {
      const { done, value } = await patience.wait(reader.read()).catch((cause: unknown) => {
        throw patience.signal.aborted ? cause : new PassingError(`the connection was lost after ${at} of ${target.length} bytes`, { cause })
      })
      if (done) break
      if (at + value.length > target.length) throw new Error(`the response is longer than ${target.length} bytes`)
      target.set(value, at)
      at += value.length
      patience.heard(value.length)
    }
  } catch (error) {
    void reader.cancel().catch(() => undefined)
    throw error
  }
  if (at < target.length) throw new PassingError(`the response ended after ${at} of ${target.length} bytes`)
}

/** Runs `task`, and again after a pause while it fails with what may pass. */
export async function withRetries<T>({ retries, timeout }: HttpSettings, signal: AbortSignal | undefined, task: (patience: Patience) => Promise<T>): Promise<T> {
  for (let attempt = 0; ; attempt++) {
    const patience = new Patience(timeout, signal)
    let failure: PassingError
    try {
      return await task(patience)
    } catch (error) {
      signal?.throwIfAborted()
      if (!(error instanceof PassingError) || attempt >= retries) throw error
      failure = error
    } finally {
      patience.end()
    }
    // not all at once where many reads failed together
    const own = 100 * 3 ** attempt * (0.75 + Math.random() / 2)
    await pause(Math.min(maxPause, Math.max(own, failure.after ?? 0)), signal)
  }
}
