/** Web servers as they are: they redirect, expire, fail for a while, hide headers, change files, drip and stay silent. */
import { createServer, type IncomingMessage, type ServerResponse } from 'node:http'
import type { AddressInfo } from 'node:net'
import fc from 'fast-check'
import { describe, expect, onTestFinished, test } from 'vitest'
import { openHttp, openSource } from '../../src/block.ts'

const content = Uint8Array.from({ length: 100_000 }, (_, at) => (at * 31) % 253)

type Handler = (request: IncomingMessage, response: ServerResponse) => void

async function serving(handler: Handler): Promise<string> {
  const server = createServer(handler)
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
  onTestFinished(() => {
    server.closeAllConnections()
    server.close()
  })
  return `http://127.0.0.1:${(server.address() as AddressInfo).port}`
}

function rangeOf(request: IncomingMessage): [number, number] {
  const [, first = '0', last = '0'] = /^bytes=(\d+)-(\d+)$/.exec(request.headers.range ?? '') ?? []
  return [Number(first), Math.min(Number(last), content.length - 1)]
}

function sendRange(request: IncomingMessage, response: ServerResponse, headers: Record<string, string> = { etag: '"1"' }): void {
  const [first, last] = rangeOf(request)
  response.writeHead(206, { 'content-range': `bytes ${first}-${last}/${content.length}`, ...headers }).end(content.subarray(first, last + 1))
}

const expected = (offset: number, length: number): Uint8Array => content.slice(offset, offset + length)

describe('redirects', () => {
  test('are followed once: every read goes to the end of the way', async () => {
    let chosen = 0
    let served = 0
    const mirror = await serving((request, response) => {
      served++
      sendRange(request, response)
    })
    const chooser = await serving((_request, response) => {
      chosen++
      response.writeHead(302, { location: `${mirror}/disk` }).end()
    })
    const device = await openHttp(`${chooser}/latest`)
    for (let at = 0; at < 5; at++) expect(await device.read(at * 1000, 500)).toEqual(expected(at * 1000, 500))
    expect([chosen, served]).toEqual([1, 6])
    await device.close()
  })

  test.each([403, 404, 410, 400, 401])('an address that expires with %i is asked for again, once', async (status) => {
    let valid = 0
    const store = await serving((request, response) => {
      if (request.url === `/signed?n=${valid}`) sendRange(request, response)
      else response.writeHead(status).end()
    })
    const origin = await serving((_request, response) => void response.writeHead(307, { location: `${store}/signed?n=${valid}` }).end())
    const device = await openHttp(`${origin}/disk`)
    expect(await device.read(0, 10)).toEqual(expected(0, 10))
    valid++
    expect(await device.read(10, 10)).toEqual(expected(10, 10))
    valid = 99
    const reading = device.read(20, 10)
    expect(await reading).toEqual(expected(20, 10))
    await device.close()
    const gone = await openHttp(`${store}/signed?n=99`)
    valid = 100
    await expect(gone.read(0, 10)).rejects.toMatchObject({ code: 'ERR_IO', message: expect.stringContaining(`status ${status}`) as string })
  })

  test('another mirror of the same file will do, another file will not', async () => {
    let date = 'Mon, 01 Jan 2024 00:00:00 GMT'
    let down = false
    const [first, second] = [
      await serving((request, response) => (down ? void response.writeHead(404).end() : sendRange(request, response, { 'etag': '"first"', 'last-modified': date }))),
      await serving((request, response) => sendRange(request, response, { 'etag': '"second"', 'last-modified': date })),
    ]
    const chooser = await serving((_request, response) => void response.writeHead(302, { location: down ? second : first }).end())
    const device = await openHttp(chooser)
    down = true
    expect(await device.read(0, 10)).toEqual(expected(0, 10))
    expect(await device.read(10, 10)).toEqual(expected(10, 10))
    down = false
    const other = await openHttp(chooser)
    down = true
    date = 'Tue, 02 Jan 2024 00:00:00 GMT'
    await expect(other.read(0, 10)).rejects.toThrow('the file changed on the server')
  })

  test("the caller's own headers and credentials stay with their host", async () => {
    const seen: IncomingMessage[] = []
    const other = await serving((request, response) => {
      seen.push(request)
      sendRange(request, response)
    })
    const own: IncomingMessage[] = []
    const origin = await serving((request, response) => {
      own.push(request)
      if (request.url === '/here') response.writeHead(302, { location: '/again' }).end()
      else response.writeHead(302, { location: `${other}/internal` }).end()
    })
    const device = await openHttp(`${origin.replace('//', '//me:p%40ss@')}/here`, { headers: { 'X-Api-Key': 'K', 'cookie': 'c=1' } })
    await device.read(0, 10)
    expect(own.map(({ headers }) => [headers['x-api-key'], headers.authorization])).toEqual([0, 1].map(() => ['K', `Basic ${Buffer.from('me:p@ss').toString('base64')}`]))
    expect(seen).toHaveLength(2)
    for (const { headers } of seen) expect([headers['x-api-key'], headers.authorization, headers.cookie]).toEqual([undefined, undefined, undefined])
  })

  test.each([['file:///etc/passwd', 'file:'], ['/loop', '20 redirects'], ['http://[', 'no address']])('to %s are refused', async (location, words) => {
    const base = await serving((_request, response) => void response.writeHead(302, { location }).end())
    await expect(openHttp(`${base}/loop`)).rejects.toMatchObject({ code: 'ERR_IO', message: expect.stringContaining(words) as string })
  })
})

describe('failures that pass', () => {
  const failing = async (failures: number, fail: Handler): Promise<{ base: string; requests: () => number }> => {
    let requests = 0
    const base = await serving((request, response) => {
      requests++
      if (requests > 1 && requests <= 1 + failures) fail(request, response)
      else sendRange(request, response)
    })
    return { base, requests: () => requests }
  }
  const failures: [string, Handler][] = [
    ['503', (_request, response) => void response.writeHead(503).end('busy')],
    ['429 with Retry-After', (_request, response) => void response.writeHead(429, { 'retry-after': '0' }).end()],
    ['500', (_request, response) => void response.writeHead(500).end()],
    ['a lost connection', (request) => void request.socket.destroy()],
    ['a body that ends early', (request, response) => {
      const [first, last] = rangeOf(request)
      response.writeHead(206, { 'content-range': `bytes ${first}-${last}/${content.length}`, 'etag': '"1"' })
      response.write(content.subarray(first, first + 10), () => response.destroy())
    }],
  ]
  test.each(failures)('%s: the read is repeated', async (_name, fail) => {
    const { base, requests } = await failing(2, fail)
    const device = await openHttp(base)
    expect(await device.read(1000, 5000)).toEqual(expected(1000, 5000))
    expect(requests()).toBe(4)
  })

  test.each(failures)('%s: not for ever', async (_name, fail) => {
    const { base, requests } = await failing(Infinity, fail)
    const device = await openHttp(base, { retries: 2 })
    await expect(device.read(1000, 5000)).rejects.toMatchObject({ code: 'ERR_IO', operation: 'read', offset: 1000, length: 5000 })
    expect(requests()).toBe(4)
  })

  test('a signal ends the pause between two attempts', async () => {
    const { base } = await failing(Infinity, (_request, response) => void response.writeHead(503, { 'retry-after': '9' }).end())
    const device = await openHttp(base)
    const abort = AbortSignal.timeout(50)
    await expect(device.read(0, 10, { signal: abort })).rejects.toMatchObject({ name: 'TimeoutError' })
  })

  test('what will not pass is not repeated', async () => {
    const { base, requests } = await failing(Infinity, (_request, response) => void response.writeHead(403).end())
    const device = await openHttp(base)
    await expect(device.read(0, 10)).rejects.toThrow('status 403')
    expect(requests()).toBe(2)
  })
})

describe('time-outs', () => {
  test('a server that never answers', async () => {
    const base = await serving(() => undefined)
    await expect(openHttp(base, { timeout: 50 })).rejects.toMatchObject({ code: 'ERR_IO', message: expect.stringContaining('nothing for 50 ms') as string })
    await expect(openHttp(base, { signal: AbortSignal.timeout(50) })).rejects.toMatchObject({ name: 'TimeoutError' })
  })

  test('a fetch that hears no signal', async () => {
    const fetch = (): Promise<Response> => new Promise(() => undefined)
    await expect(openHttp('http://x/', { timeout: 50, fetch })).rejects.toMatchObject({ code: 'ERR_IO' })
  })

  test('a byte now and then is no progress; 4 KiB are', async () => {
    let piece = 1
    const base = await serving((request, response) => {
      const [first, last] = rangeOf(request)
      response.writeHead(206, { 'content-range': `bytes ${first}-${last}/${content.length}` })
      if (first === last) {
        response.end(content.subarray(first, last + 1))
        return
      }
      let at = first
      const timer = setInterval(() => {
        const end = Math.min(at + piece, last + 1)
        response.write(content.subarray(at, end))
        at = end
        if (at > last) {
          clearInterval(timer)
          response.end()
        }
      }, 20)
      response.on('close', () => clearInterval(timer))
    })
    const device = await openHttp(base, { timeout: 200 })
    await expect(device.read(0, 50_000)).rejects.toMatchObject({ code: 'ERR_IO', message: expect.stringContaining('nothing for 200 ms') as string })
    piece = 3000
    expect(await device.read(0, 50_000)).toEqual(expected(0, 50_000))
  })

  test('an endless body is left', async () => {
    const base = await serving((request, response) => {
      const [first, last] = rangeOf(request)
      response.writeHead(206, { 'content-range': `bytes ${first}-${last}/${content.length}` })
      const more = (): void => void response.write(Buffer.alloc(1 << 16), () => !response.destroyed && more())
      if (first === last) response.end('x')
      else more()
    })
    const device = await openHttp(base)
    await expect(device.read(0, 4096)).rejects.toThrow('longer than 4096')
  })
})

describe('headers that a page does not see', () => {
  /** As a browser shows an answer of another origin without Access-Control-Expose-Headers. */
  const hiding: typeof globalThis.fetch = async (input, init) => {
    const response = await fetch(input, init)
    const headers = new Headers()
    for (const name of ['content-length', 'content-type', 'last-modified']) if (response.headers.has(name)) headers.set(name, response.headers.get(name)!)
    return new Response(response.body, { status: response.status, headers })
  }

  test('the size is that of HEAD, and a range of the length asked is trusted', async () => {
    const base = await serving((request, response) => {
      if (request.method === 'HEAD') response.writeHead(200, { 'content-length': content.length }).end()
      else sendRange(request, response)
    })
    const device = await openHttp(base, { fetch: hiding })
    expect(device.size).toBe(content.length)
    expect(await device.read(777, 5000)).toEqual(expected(777, 5000))
  })

  test('without a size either, the header is named', async () => {
    const base = await serving((request, response) => (request.method === 'HEAD' ? void response.writeHead(405).end() : sendRange(request, response)))
    await expect(openHttp(base, { fetch: hiding })).rejects.toMatchObject({ code: 'ERR_UNSUPPORTED', message: expect.stringContaining('Access-Control-Expose-Headers: Content-Range') as string })
  })

  test('several parts in one answer are no range', async () => {
    const base = await serving((_request, response) => void response.writeHead(206, { 'content-type': 'multipart/byteranges; boundary=x' }).end('--x'))
    await expect(openHttp(base)).rejects.toMatchObject({ code: 'ERR_IO' })
  })

  test('a stream that cannot be iterated is read', async () => {
    const base = await serving((request, response) => sendRange(request, response))
    const plain: typeof globalThis.fetch = async (input, init) => {
      const response = await fetch(input, init)
      Object.defineProperty(response.body, Symbol.asyncIterator, { value: undefined })
      return response
    }
    expect(await (await openHttp(base, { fetch: plain })).read(5, 5000)).toEqual(expected(5, 5000))
  })

  test('a browser that follows redirects itself', async () => {
    const base = await serving((request, response) => sendRange(request, response))
    let followed = 0
    const browser: typeof globalThis.fetch = async (input, init) => {
      if (input !== `${base}/start`) return fetch(input, init)
      if (init?.redirect === 'manual') return Object.defineProperty(new Response(null), 'type', { value: 'opaqueredirect' })
      followed++
      const response = await fetch(`${base}/end`, init)
      return response
    }
    const device = await openHttp(`${base}/start`, { fetch: browser })
    for (let n = 0; n < 3; n++) expect(await device.read(5, 5)).toEqual(expected(5, 5))
    expect(followed).toBe(1)
  })
})

describe('a file that changes', () => {
  test.each<[string, (n: number) => Record<string, string>]>([
    ['its tag', (n) => ({ etag: `"${n}"` })],
    ['its date, without a tag', (n) => ({ 'last-modified': `Mon, 0${n} Jan 2024 00:00:00 GMT` })],
    ['its size only', (n) => ({ 'x-size': String(content.length + n) })],
    ['by losing its tag', (n) => (n === 1 ? { etag: '"1"' } : {})],
  ])('is noticed by %s', async (_name, headers) => {
    let n = 1
    const base = await serving((request, response) => {
      const [first, last] = rangeOf(request)
      const { 'x-size': size = String(content.length), ...rest } = headers(n)
      response.writeHead(206, { 'content-range': `bytes ${first}-${last}/${size}`, ...rest }).end(content.subarray(first, last + 1))
    })
    const device = await openHttp(base)
    await device.read(0, 10)
    n = 2
    await expect(device.read(0, 10)).rejects.toThrow('the file changed on the server')
  })

  test('a weak tag is the same tag', async () => {
    let weak = ''
    const base = await serving((request, response) => sendRange(request, response, { etag: `${weak}"1"` }))
    const device = await openHttp(base)
    weak = 'W/'
    expect(await device.read(0, 10)).toEqual(expected(0, 10))
  })
})

describe('what is told', () => {
  test('no password, token or signature is in an error', async () => {
    const base = await serving((_request, response) => void response.writeHead(403).end())
    const secret = `${base.replace('//', '//user:PASSWORD@')}/disk?X-Signature=TOKEN&expires=SOON`
    for (const url of [secret, secret.replace(/:\d+\//, ':1/')]) {
      const error = await openHttp(url).catch((reason: unknown) => reason as Error)
      expect(error).toMatchObject({ code: 'ERR_IO' })
      expect((error as Error).message).toContain('/disk?X-Signature=***&expires=***')
      for (let each: unknown = error; each instanceof Error; each = each.cause) expect(each.message).not.toMatch(/PASSWORD|TOKEN|SOON/)
    }
  })

  test('what is no web address', async () => {
    await expect(openHttp('not a url')).rejects.toThrow("'not a url' is no URL")
    await expect(openHttp('ftp://h/x')).rejects.toMatchObject({ code: 'ERR_UNSUPPORTED', features: ['ftp:'] })
    await expect(openSource(new URL('ftp://h/x'))).rejects.toMatchObject({ code: 'ERR_UNSUPPORTED' })
    await expect(openHttp('http://h/', { headers: { 'x-a': 'b\r\nevil: 1' } })).rejects.toThrow(TypeError)
    await expect(openHttp('http://127.0.0.1:1/x')).rejects.toMatchObject({ code: 'ERR_IO', operation: 'open', message: expect.stringMatching(/ECONNREFUSED|bad port/) as string })
  })

  test.each<[string, number, Record<string, string>]>([
    ['a range that is refused though the file has a size', 416, { 'content-range': 'bytes */77' }],
    ['a size past what can be addressed', 206, { 'content-range': 'bytes 0-0/1152921504606846976' }],
    ['another range', 206, { 'content-range': 'bytes 5-5/100' }],
  ])('%s is an error', async (_name, status, headers) => {
    const base = await serving((_request, response) => void response.writeHead(status, headers).end(status === 206 ? 'x' : ''))
    await expect(openHttp(base)).rejects.toMatchObject({ code: 'ERR_IO' })
  })

  test('headers of any content give a size or a typed error', async () => {
    const number = fc.oneof(fc.nat(5), fc.constantFrom(-1, 2 ** 31, 2 ** 32, 2 ** 53 - 1, 2 ** 53, 2 ** 64, Number.NaN, Infinity), fc.constantFrom('', '*', '0x1', '1e3', ' 1'))
    const headers = fc.record({
      'content-range': fc.oneof(fc.tuple(number, number, number).map(([a, b, c]) => `bytes ${a}-${b}/${c}`), fc.stringMatching(/^[ -~]{0,30}$/)),
      'content-length': number.map(String),
      'content-type': fc.constantFrom('text/plain', 'multipart/byteranges'),
      'retry-after': number.map(String),
    }, { requiredKeys: [] })
    await fc.assert(fc.asyncProperty(fc.constantFrom(200, 204, 206, 301, 304, 401, 416, 503), headers, async (status, fields) => {
      const fetch = (): Promise<Response> => Promise.resolve(new Response([204, 304].includes(status) ? null : 'x', { status, headers: fields }))
      const outcome = await openHttp('http://x/', { fetch, retries: 0 }).then(({ size }) => size, (error: unknown) => error)
      if (typeof outcome === 'number') expect(Number.isSafeInteger(outcome) && outcome >= 0).toBe(true)
      else expect(outcome).toMatchObject({ code: expect.stringMatching(/^ERR_(IO|UNSUPPORTED|NOT_FOUND)$/) as string })
    }), { numRuns: 1000 })
  })

  test('an empty file without ranges has no bytes', async () => {
    const base = await serving((_request, response) => void response.writeHead(200, { 'content-length': '0' }).end())
    expect((await openHttp(base)).size).toBe(0)
  })
})
