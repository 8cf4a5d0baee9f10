/** Names that are addresses: brackets, at signs, credentials and signatures belong to them; what is told of them keeps secrets. */
import { createServer, type IncomingMessage, type Server, type ServerResponse } from 'node:http'
import { copyFileSync, existsSync, readFileSync, writeFileSync } from 'node:fs'
import { createServer as listenTcp } from 'node:net'
import { join } from 'node:path'
import fc from 'fast-check'
import { describe, expect, onTestFinished, test } from 'vitest'
import { UsageError } from '../../src/cli/errors.ts'
import { resolveBacking, splitAddress, splitSnapshot } from '../../src/cli/image/names.ts'
import { nbdUri, parseNbdName } from '../../src/cli/image/nbd-name.ts'
import { parseImageOpts, parseName, parsePlace } from '../../src/cli/image/spec.ts'
import { redacted } from '../../src/core/redact.ts'
import { tempFolder } from '../support/temp.ts'
import { run } from './run.ts'

describe('places', () => {
  test.each([
    ['nbd://[::1]:10810/', { address: { host: '::1', port: 10810 }, name: '' }],
    ['nbd://[::1]', { address: { host: '::1', port: 10809 }, name: '' }],
    ['nbd://[fe80::1%25eth0]/a', { address: { host: 'fe80::1%eth0', port: 10809 }, name: 'a' }],
    ['nbd://[fe80::1%eth0]/a', { address: { host: 'fe80::1%eth0', port: 10809 }, name: 'a' }],
    ['nbd:[::1]:10810:exportname=x', { address: { host: '::1', port: 10810 }, name: 'x' }],
    ['nbd://host/x@y', { address: { host: 'host', port: 10809 }, name: 'x@y' }],
    ['nbd://user@host/x', { address: { host: 'host', port: 10809 }, name: 'x' }],
    ['nbd://h/a%40b%2Fc', { address: { host: 'h', port: 10809 }, name: 'a@b/c' }],
    ['nbd:///x', { address: { host: 'localhost', port: 10809 }, name: 'x' }],
    ['nbd+tcp://h:1/x', { address: { host: 'h', port: 1 }, name: 'x' }],
    ['nbd+unix:///?socket=/tmp/a+b@c%26d', { address: { path: '/tmp/a+b@c&d' }, name: '' }],
    ['nbd+unix:///e?x=1&socket=/s', { address: { path: '/s' }, name: 'e' }],
    ['nbd:unix:/a@b:exportname=c@d', { address: { path: '/a@b' }, name: 'c@d' }],
  ])('%s', (text, expected) => expect(parseNbdName(text)).toEqual(expected))

  test('what an export is called can be read again', () => {
    const host = fc.constantFrom('::1', 'fe80::2', 'localhost', '10.0.0.1')
    fc.assert(fc.property(host, fc.integer({ min: 1, max: 65535 }), fc.stringMatching(/^[a-z@.-]{0,12}$/), (host, port, name) => {
      expect(parseNbdName(nbdUri({ address: { host, port }, name }))).toEqual({ address: { host, port }, name })
    }))
  })

  test.each(['nbd://h:99999/', 'nbd://[::1', 'nbd+unix:///x', 'nbd+unix:///x?socket=', 'nbd:h', 'nbds://h/', 'http://', 'http://[::1', 'https:x y'])('%s is refused by its name', (text) => {
    expect(() => parsePlace(text)).toThrow(UsageError)
    expect(() => parsePlace(text)).toThrow(text.startsWith('nbds') ? 'TLS' : text)
  })

  test.each(['C:\\vm\\disk.qcow2', 'C:/vm/disk.qcow2', 'z:/d'])('%s is a path', (path) => {
    expect(parsePlace(path)).toEqual({ kind: 'file', path })
    expect(resolveBacking({ kind: 'file', path: '/x/y' }, path)).toBe(path)
  })

  test('a URL in options that is none is named', () => {
    expect(() => parseImageOpts('driver=https,url=nonsense')).toThrow("'nonsense' is no URL")
  })
})

describe('an @ in an address', () => {
  const never = [
    'https://host/x.qcow2?sig=a@b', 'https://host/v@2/x.qcow2', 'https://user:pass@host/x.qcow2', 'https://user@host', 'http://h/a@b/c#d@e',
    'nbd://user@host', 'nbd://a@h:1', 'https://h/x@y?z=1', 'json:{"driver":"nbd","server.path":"/a@b"}',
  ]
  test.each(never)('%s has no snapshot', (name) => {
    expect(splitSnapshot(name)).toBeUndefined()
    expect(splitAddress(name)).toBeUndefined()
  })

  test.each([
    ['https://h/x.qcow2@s', 'https://h/x.qcow2', 's'],
    ['https://u:p@h/v@2/x.qcow2@s', 'https://u:p@h/v@2/x.qcow2', 's'],
    ['nbd://h/x@y', 'nbd://h/x', 'y'],
    ['nbd://u@h/x@y@z', 'nbd://u@h/x@y', 'z'],
    ['nbd+unix:///?socket=/s@y', 'nbd+unix:///?socket=/s', 'y'],
    ['nbd:unix:/s@y', 'nbd:unix:/s', 'y'],
  ])('%s may have one, if nothing is there by the whole name', (name, file, snapshot) => {
    expect(splitSnapshot(name)).toBeUndefined()
    expect(splitAddress(name)).toEqual({ file, snapshot })
  })

  test('paths are looked up', () => {
    const folder = tempFolder()
    for (const name of ['a', 'a@b', 'c']) writeFileSync(join(folder, name), '')
    const at = (name: string): unknown => splitSnapshot(name)
    expect(at(join(folder, 'a@b'))).toBeUndefined()
    expect(at(`file:${join(folder, 'a@b')}`)).toBeUndefined()
    expect(at(`${join(folder, 'a@b')}@s`)).toEqual({ file: join(folder, 'a@b'), snapshot: 's' })
    expect(at(join(folder, 'c@d@e'))).toEqual({ file: join(folder, 'c'), snapshot: 'd@e' })
    expect(at(`file:${join(folder, 'c@d')}`)).toEqual({ file: `file:${join(folder, 'c')}`, snapshot: 'd' })
    expect(at(`blkdebug::${join(folder, 'c@d')}`)).toEqual({ file: `blkdebug::${join(folder, 'c')}`, snapshot: 'd' })
    expect(at(join(folder, 'none@d'))).toBeUndefined()
  })
})

test('messages have no credentials, tokens or signatures', () => {
  expect(redacted("Could not open 'https://user:secret@h:8/a@b?X-Sig=abc&t=1&flag#frag': no")).toBe("Could not open 'https://***@h:8/a@b?X-Sig=***&t=***&***#***': no")
  expect(redacted('https://a:b@c@h/ http://x/?k= plain?text=1 user@host')).toBe('https://***@h/ http://x/?k=*** plain?text=1 user@host')
  expect(parseName('https://u:p@h/x?k=v', undefined).shown).toBe('https://***@h/x?k=***')
})

/** A server of one folder's files, with ranges; it answers 404 for what is not there. */
async function webServer(folder: string, seen: IncomingMessage[] = []): Promise<string> {
  const server: Server = createServer((request: IncomingMessage, response: ServerResponse) => {
    seen.push(request)
    const path = join(folder, decodeURIComponent(new URL(request.url!, 'http://x').pathname))
    if (!existsSync(path)) {
      response.writeHead(404).end()
      return
    }
    const bytes = readFileSync(path)
    const [, first, last] = /^bytes=(\d+)-(\d+)$/.exec(request.headers.range ?? '') ?? [undefined, '0', String(bytes.length - 1)]
    const end = Math.min(Number(last), bytes.length - 1)
    response.writeHead(206, { 'content-range': `bytes ${first}-${end}/${bytes.length}`, 'etag': '"1"' }).end(bytes.subarray(Number(first), end + 1))
  })
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
  onTestFinished(() => {
    server.closeAllConnections()
    server.close()
  })
  const address = server.address()
  return `127.0.0.1:${typeof address === 'object' && address !== null ? address.port : 0}`
}

describe('every command takes them', () => {
  test('signed, with credentials, with an @ in a folder or a name, and at a snapshot', async () => {
    const folder = tempFolder()
    const image = join(folder, 'x.qcow2')
    await run(['create', '-q', '-f', 'qcow2', image, '1M'])
    await run(['snapshot', '-c', 'snap', image])
    const seen: IncomingMessage[] = []
    const host = await webServer(folder, seen)
    copyFileSync(image, join(folder, 'v@2.qcow2'))
    const urls = [`http://${host}/x.qcow2?sig=a@b`, `http://${host}/v@2.qcow2`, `http://user:secret@${host}/x.qcow2`, `http://${host}/x.qcow2@snap`]
    for (const url of urls) {
      for (const line of [['map'], ['measure', '-O', 'qcow2'], ['compare', image], ['convert', '-O', 'raw']]) {
        const result = await run([...line, url, ...(line[0] === 'convert' ? [join(folder, 'out')] : [])])
        expect(result, `${line.join(' ')} ${url}`).toMatchObject({ code: 0, stderr: '' })
      }
      if (!url.endsWith('@snap')) expect(await run(['info', url])).toMatchObject({ code: 0 })
    }
    expect(seen.some(({ headers }) => headers.authorization === `Basic ${Buffer.from('user:secret').toString('base64')}`)).toBe(true)
    const failed = await run(['map', `http://user:secret@${host}/none.qcow2?sig=TOKEN`])
    expect(failed.code).toBe(1)
    expect(failed.stderr).toContain('none.qcow2')
    expect(failed.stderr).not.toMatch(/secret|TOKEN/)
    expect((await run(['map', `http://${host}/x.qcow2@nothing`])).stderr).toContain('nothing')
  }, 60_000)

  test('a silent NBD server ends with the signal', async () => {
    const server = listenTcp((socket) => socket.on('error', () => undefined))
    await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
    onTestFinished(() => void server.close())
    const { port } = server.address() as { port: number }
    const before = performance.now()
    await run(['info', `nbd://127.0.0.1:${port}/`], { signal: AbortSignal.timeout(100) })
    expect(performance.now() - before).toBeLessThan(10_000)
  })
})
