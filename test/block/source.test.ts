import { writeFileSync } from 'node:fs'
import { open } from 'node:fs/promises'
import { createServer, type Server, type ServerResponse } from 'node:http'
import type { AddressInfo } from 'node:net'
import { join } from 'node:path'
import { pathToFileURL } from 'node:url'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { BlobDevice, MemoryDevice, openFile, openHttp, openSource, readAhead, type BlockDevice } from '../../src/block.ts'
import { withSource } from '../../src/block/source.ts'
import { blockDeviceSuite, pattern } from '../suites/block-device.ts'
import { expectBytes } from '../support/bytes.ts'
import { tempFolder } from '../support/temp.ts'

blockDeviceSuite('blob', (content) => new BlobDevice(new Blob([content.slice()])))

describe('openSource', () => {
  const content = pattern(10_000)

  test('takes a path, a file URL and a FileHandle', async () => {
    const path = join(tempFolder(), 'disk')
    writeFileSync(path, content)
    for (const source of [path, pathToFileURL(path), await open(path, 'r+')]) {
      await using device = await openSource(source)
      expectBytes(await device.read(0, 10_000), content)
      await device.write(0, content.subarray(0, 10))
      expect(device.readOnly).toBe(false)
    }
    await using direct = await openSource(path, { direct: true, readOnly: true })
    expectBytes(await direct.read(1, 9999), content.subarray(1))
  })

  test('takes bytes, in place', async () => {
    const bytes = content.slice()
    await using device = await openSource(bytes)
    await device.write(5, new Uint8Array(5))
    expect(bytes.subarray(5, 10)).toEqual(new Uint8Array(5))
    expect((await openSource(bytes, { readOnly: true })).readOnly).toBe(true)
  })

  test('takes a Blob', async () => {
    await using device = await openSource(new Blob([content]))
    expectBytes(await device.read(100, 9000), content.subarray(100, 9100))
    await expect(device.write(0, content)).rejects.toMatchObject({ code: 'ERR_READ_ONLY' })
  })

  test('takes a device, padded and read-only where needed', async () => {
    const memory = new MemoryDevice(content.slice(0, 8192), { limits: { requestAlignment: 512 } })
    await using device = await openSource(memory, { readOnly: true })
    expectBytes(await device.read(3, 100), content.subarray(3, 103))
    await expect(device.write(0, new Uint8Array(1))).rejects.toMatchObject({ code: 'ERR_READ_ONLY' })
    const plain = new MemoryDevice(1)
    expect(await openSource(plain)).toBe(plain)
  })

  test('refuses anything else', async () => {
    await expect(openSource(new URL('ftp://host/disk'))).rejects.toMatchObject({ code: 'ERR_UNSUPPORTED' })
    await expect(openSource({} as never)).rejects.toThrow(TypeError)
    for (const wrong of [undefined, null, 7]) await expect(openSource(wrong as never)).rejects.toThrow('a source is a path')
    await expect(openSource('/none/such')).rejects.toMatchObject({ code: 'ERR_NOT_FOUND' })
  })
})

describe('a task on a source', () => {
  test('closes what it opened, also when the task fails, and leaves a given device open', async () => {
    const path = join(tempFolder(), 'file')
    writeFileSync(path, pattern(10))
    let opened: BlockDevice | undefined
    expect(await withSource(path, {}, async (device) => ((opened = device), (await device.read(3, 1))[0]))).toBe(pattern(10)[3])
    expect(opened!.closed).toBe(true)
    await expect(withSource(path, {}, (device) => ((opened = device), Promise.reject(new Error('no'))))).rejects.toThrow('no')
    expect(opened!.closed).toBe(true)
    const given = new MemoryDevice(10)
    expect(await withSource(given, { readOnly: true }, (device) => Promise.resolve(device))).toBe(given)
    expect(given.closed).toBe(false)
  })
})

describe('a file on a web server', () => {
  const content = pattern(256 << 10)
  let server: Server
  let base: string
  /** What the server does; the default serves ranges of `content`. */
  let behaviour: 'right' | 'whole' | 'short' | 'long' | 'shifted' | 'changed' | 'drops' | 'missing' | 'fails' | 'empty' = 'right'

  beforeAll(async () => {
    server = createServer((request, response) => {
      const match = /^bytes=(\d+)-(\d+)$/.exec(request.headers.range ?? '')
      answer(response, Number(match?.[1] ?? 0), Number(match?.[2] ?? 0) + 1)
    })
    await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
    base = `http://127.0.0.1:${(server.address() as AddressInfo).port}/disk.qcow2`
  })
  afterAll(() => {
    server.closeAllConnections()
    server.close()
  })

  function answer(response: ServerResponse, first: number, end: number): void {
    if (behaviour === 'missing' || behaviour === 'fails') {
      response.writeHead(behaviour === 'missing' ? 404 : 503).end()
    } else if (behaviour === 'empty') {
      response.writeHead(416, { 'content-range': 'bytes */0' }).end()
    } else if (behaviour === 'whole') {
      response.writeHead(200).end(content)
    } else {
      const last = Math.min(end, content.length) - 1
      const shown = behaviour === 'shifted' ? first + 1 : first
      response.writeHead(206, {
        'content-range': `bytes ${shown}-${last}/${content.length}`,
        etag: behaviour === 'changed' ? '"2"' : '"1"',
      })
      const body = content.subarray(first, last + 1)
      if (behaviour === 'drops') {
        response.write(body.subarray(0, 10), () => response.destroy())
        return
      }
      if (behaviour === 'long') response.write(body)
      response.end(behaviour === 'short' ? body.subarray(1) : body)
    }
  }

  // the suite changes the content of a range to zeroes, so it gets a server of its own for each device
  const servers: Server[] = []
  afterAll(() => {
    for (const each of servers) {
      each.closeAllConnections()
      each.close()
    }
  })
  blockDeviceSuite('HTTP', async (bytes) => {
    const own = createServer((request, response) => {
      const [, first = '0', last = '0'] = /^bytes=(\d+)-(\d+)$/.exec(request.headers.range ?? '') ?? []
      const end = Math.min(Number(last) + 1, bytes.length)
      response.writeHead(206, { 'content-range': `bytes ${first}-${end - 1}/${bytes.length}` })
      response.end(bytes.subarray(Number(first), end))
    })
    servers.push(own)
    await new Promise<void>((resolve) => own.listen(0, '127.0.0.1', resolve))
    return openHttp(`http://127.0.0.1:${(own.address() as AddressInfo).port}/`)
  })

  test('reads ranges, also ahead', async () => {
    behaviour = 'right'
    await using device = readAhead(await openSource(new URL(base)), { chunkSize: 64 << 10 })
    expect(device.size).toBe(content.length)
    for (let at = 0; at < content.length; at += 10_000) {
      const length = Math.min(10_000, content.length - at)
      expectBytes(await device.read(at, length), content.subarray(at, at + length))
    }
  })

  test('an empty file', async () => {
    behaviour = 'empty'
    expect((await openHttp(base)).size).toBe(0)
  })

  test('what the server cannot do is said when it is opened', async () => {
    behaviour = 'whole'
    await expect(openHttp(base)).rejects.toMatchObject({ code: 'ERR_UNSUPPORTED', features: ['range requests'] })
    behaviour = 'missing'
    await expect(openHttp(base)).rejects.toMatchObject({ code: 'ERR_NOT_FOUND' })
    behaviour = 'fails'
    await expect(openHttp(base)).rejects.toMatchObject({ code: 'ERR_IO', operation: 'open' })
    await expect(openHttp('http://127.0.0.1:1/')).rejects.toMatchObject({ code: 'ERR_IO' })
  })

  test.each(['whole', 'short', 'long', 'shifted', 'changed', 'drops', 'missing', 'fails'] as const)(
    'a server that answers wrongly (%s) gives an error, never wrong bytes',
    async (kind) => {
      behaviour = 'right'
      const device = await openHttp(base)
      behaviour = kind
      await expect(device.read(1000, 5000)).rejects.toMatchObject({ code: 'ERR_IO', operation: 'read', offset: 1000, length: 5000 })
      behaviour = 'right'
      expectBytes(await device.read(1000, 5000), content.subarray(1000, 6000))
    },
  )
})

test('an option that does not exist is refused, not ignored', async () => {
  const path = join(tempFolder(), 'disk')
  writeFileSync(path, new Uint8Array(512))
  const misspelled = { readonly: true } as object
  await expect(openFile(path, misspelled)).rejects.toThrow("openFile: there is no option 'readonly'; there are create, direct, locking, mode, readOnly, signal, syncLimit")
  await expect(openSource(path, misspelled)).rejects.toThrow(TypeError)
  await using device = await openFile(path, { nothing: undefined } as object)
  expect(device.size).toBe(512)
})
