/** Messages however they are laid out, and monitors that send what nobody expects: linear work, bounded memory, typed errors. */
import { createServer, type Server } from 'node:net'
import { join } from 'node:path'
import { writeFileSync } from 'node:fs'
import fc from 'fast-check'
import { describe, expect, onTestFinished, test } from 'vitest'
import { maxSocketPath } from '../../src/core/socket-path.ts'
import { QmpClient } from '../../src/qmp/client.ts'
import { MessageSplitter } from '../../src/qmp/lines.ts'
import { connectSocket } from '../../src/qmp/socket.ts'
import { tempFolder } from '../support/temp.ts'
import { FakeMonitor, greeting } from './monitor.ts'

const bytes = (text: string): Uint8Array => new TextEncoder().encode(text)

describe('framing', () => {
  test('any JSON, in any layout and any chunks, comes out whole and in order', () => {
    const layout = fc.constantFrom<string | number | undefined>(undefined, 2, 4, '\t')
    const message = fc.tuple(fc.object({ withNullPrototype: false, maxDepth: 4 }), layout, fc.constantFrom('\n', '\r\n', '', '\r\n\r\n  '))
    fc.assert(fc.property(fc.array(message, { minLength: 1, maxLength: 5 }), fc.array(fc.integer({ min: 1, max: 50 }), { minLength: 1 }), (messages, sizes) => {
      const texts = messages.map(([value, space]) => JSON.stringify(value, undefined, space))
      const stream = bytes(messages.map(([, , end], at) => texts[at]! + end).join(''))
      const splitter = new MessageSplitter()
      const found: string[] = []
      for (let at = 0, turn = 0; at < stream.length; turn++) {
        const size = sizes[turn % sizes.length]!
        found.push(...splitter.push(stream.subarray(at, at + size)))
        at += size
      }
      expect(found).toEqual(texts)
    }), { numRuns: 300 })
  })

  test('what is no JSON is a line; JSON after it is a message', () => {
    const splitter = new MessageSplitter()
    expect(splitter.push(bytes('HTTP/1.1 400 {oops\r\n{"a":"}\\"{"}[1]'))).toEqual(['HTTP/1.1 400 {oops', '{"a":"}\\"{"}', '[1]'])
  })

  test('a message in pieces of one byte takes its own size, once', () => {
    const splitter = new MessageSplitter()
    const one = new Uint8Array([0x78])
    splitter.push(bytes('{"'))
    const before = process.memoryUsage()
    for (let n = 0; n < 4_000_000; n++) splitter.push(one)
    const after = process.memoryUsage()
    expect(after.arrayBuffers - before.arrayBuffers).toBeLessThan(40 << 20)
    expect(splitter.push(bytes('":1}'))[0]!.length).toBe(4_000_000 + 6)
  })

  test.each([
    ['levels', '['.repeat(2000)],
    ['values', `[${'0,'.repeat(1_100_000)}`],
  ])('too many %s are refused before anything is parsed', (_name, text) => {
    expect(() => new MessageSplitter().push(bytes(text))).toThrow(expect.objectContaining({ code: 'ERR_QMP' }) as Error)
  })
})

test('a conversation with bytes changed anywhere ends in an answer, a typed error or a time-out', async () => {
  const valid = bytes(`${greeting}\r\n{"id":1,"return":{}}\r\n{"id":2,"return":[{"device":"d","inserted":{"drv":"qcow2","file":"f","image":{"filename":"f","virtual-size":1}}}]}\r\n`)
  const change = fc.record({ at: fc.nat(valid.length - 1), bytes: fc.oneof(fc.uint8Array({ minLength: 1, maxLength: 6 }), fc.constantFrom(...['{', '}', '[', ']', '"', '\\\\', 'null', '1e999', ',,'].map(bytes))) })
  await fc.assert(fc.asyncProperty(fc.array(change, { minLength: 1, maxLength: 3 }), async (changes) => {
    const said = valid.slice()
    for (const { at, bytes: other } of changes) said.set(other.subarray(0, said.length - at), at)
    const monitor = new FakeMonitor(() => undefined, false)
    const connecting = QmpClient.connect(monitor.client, { timeout: 20 })
    setImmediate(() => monitor.raw(said.subarray(0, greeting.length + 2)))
    setTimeout(() => monitor.raw(said.subarray(greeting.length + 2)), 2)
    const outcome = await connecting.then(async (qmp) => qmp.execute('query-block').finally(() => qmp.close())).catch((error: unknown) => error)
    if (outcome instanceof Error) expect(outcome).toMatchObject({ code: 'ERR_QMP' })
  }), { numRuns: 200 })
})

test('a pretty monitor is served', async () => {
  const monitor = new FakeMonitor((command, self) => self.raw(`${JSON.stringify({ return: { running: true, status: 'running' }, id: command.id }, undefined, 4)}\r\n`), false)
  monitor.raw(`${JSON.stringify(JSON.parse(greeting), undefined, 4)}\r\n`)
  await using qmp = await QmpClient.connect(monitor.client)
  expect(await qmp.execute('query-status')).toEqual({ running: true, status: 'running' })
})

describe('answers of another shape are typed errors', () => {
  test.each([
    '{"id":0,"return":{}}', '{"id":0,"return":null}', '[]', '[{"QMP":1}]', '{"QMP":{"version":{},"capabilities":[]}}',
    '{"QMP":{"version":{"qemu":{"major":"7","minor":2,"micro":0}},"capabilities":[]}}', '{"QMP":{"version":{"qemu":{"major":7,"minor":2,"micro":0}},"capabilities":[1,null]}}',
    '{"id":0,"error":{"class":"x","desc":"y"}}', '{"event":5}', '"text"', '{"__proto__":{"QMP":{}}}',
  ])('in place of the greeting: %s', async (text) => {
    const monitor = new FakeMonitor(() => undefined, false)
    monitor.say(text)
    await expect(QmpClient.connect(monitor.client, { timeout: 50 })).rejects.toMatchObject({ code: 'ERR_QMP' })
  })

  const hostile = [null, 5, 'text', [], {}, [null], [5], [{}], { running: 'yes' }, [{ device: 5 }], [{ device: 'd', inserted: null }], [{ device: 'd', inserted: { 'node-name': 'n', 'drv': 'q', 'file': 'f' } }], { qemu: null }, { ram: null }]
  const commands = ['query-status', 'query-version', 'query-kvm', 'query-cpus-fast', 'query-pci', 'qom-list', 'query-migrate', 'query-migrate-capabilities', 'query-migrate-parameters', 'query-block', 'query-named-block-nodes', 'human-monitor-command']
  test.each(commands)('to %s', async (command) => {
    for (const value of hostile) {
      const monitor = new FakeMonitor((asked, self) => self.answer(asked, value))
      await using qmp = await QmpClient.connect(monitor.client)
      const fits = await qmp.execute(command).then(() => true, (error: unknown) => {
        expect(error).toMatchObject({ code: 'ERR_QMP', command })
        return false
      })
      if (fits) expect(JSON.stringify(value)).toMatch(command === 'human-monitor-command' ? /text/ : /^(\[\]|\{.*\})$/)
    }
  })

  test.each(['"x"', '{}', '{"desc":5}', '5'])('an error that is %s', async (error) => {
    const monitor = new FakeMonitor((command, self) => self.say(`{"id":${command.id},"error":${error}}`))
    await using qmp = await QmpClient.connect(monitor.client)
    await expect(qmp.execute('stop')).rejects.toMatchObject({ code: 'ERR_QMP' })
  })

  test('events that nobody reads end their subscription, not the memory', async () => {
    const monitor = new FakeMonitor(() => undefined)
    await using qmp = await QmpClient.connect(monitor.client)
    const [unread, read] = [qmp.events(), qmp.events('STOP')]
    for (let n = 0; n < 700; n++) monitor.raw('{"event":"RTC_CHANGE"}\r\n'.repeat(100))
    monitor.say('{"event":"STOP"}')
    expect((await read.next()).value).toMatchObject({ event: 'STOP' })
    let seen = 0
    await expect(async () => {
      for await (const event of unread) seen += event.event === 'RTC_CHANGE' ? 1 : 0
    }).rejects.toMatchObject({ code: 'ERR_QMP' })
    expect(seen).toBe(65_536)
  })
})

async function listening(path: string, onSocket: (text: (line: string) => void) => void = () => undefined): Promise<Server> {
  const server = createServer((socket) => {
    socket.on('error', () => undefined)
    onSocket((line) => socket.write(line))
  })
  await new Promise<void>((resolve) => server.listen(path, resolve))
  onTestFinished(() => void server.close())
  return server
}

describe('connecting', () => {
  test('a monitor that another client has says so', async () => {
    const path = join(tempFolder(), 'qmp')
    await listening(path)
    await expect(QmpClient.connect(path, { timeout: 50 })).rejects.toMatchObject({ code: 'ERR_BUSY', message: expect.stringContaining('one client at a time') as string })
  })

  test('what listens and is no monitor is not called busy', async () => {
    const path = join(tempFolder(), 'qmp')
    await listening(path, (say) => say("QEMU 7.2.22 monitor - type 'help' for more information\r\n(qemu) "))
    await expect(QmpClient.connect(path)).rejects.toMatchObject({ code: 'ERR_QMP', message: expect.stringContaining('-qmp') as string })
  })

  test('an abort while the greeting is due', async () => {
    const path = join(tempFolder(), 'qmp')
    await listening(path)
    await expect(QmpClient.connect(path, { signal: AbortSignal.timeout(20) })).rejects.toMatchObject({ name: 'TimeoutError' })
  })

  test('it waits for a socket that appears, as long as it is told to', async () => {
    const path = join(tempFolder(), 'qmp')
    setTimeout(() => void listening(path, (say) => say('{"id":1,"return":{}}')), 120)
    const stream = await connectSocket(path, { wait: 5000 })
    stream.destroy()
    await expect(connectSocket(`${path}-never`, { wait: 60 })).rejects.toMatchObject({ code: 'ERR_QMP', message: expect.stringContaining('no such socket') as string })
    const abort = new AbortController()
    const enough = new Error('enough')
    setTimeout(() => abort.abort(enough), 30)
    await expect(connectSocket(`${path}-never`, { wait: 60_000, signal: abort.signal })).rejects.toBe(enough)
  })

  test('messages say what is there instead of a listener', async () => {
    const folder = tempFolder()
    writeFileSync(join(folder, 'file'), '')
    await expect(connectSocket(join(folder, 'file'))).rejects.toThrow('is no socket')
    await expect(connectSocket(join(folder, 'nothing'))).rejects.toThrow(`${join(folder, 'nothing')}: there is no such socket`)
    const long = join(folder, 'x'.repeat(maxSocketPath))
    await expect(connectSocket(long)).rejects.toThrow(`at most ${maxSocketPath} bytes`)
    await expect(connectSocket({ port: 1 })).rejects.toThrow('localhost:1')
  })

  test('a time-out of 0 is none', async () => {
    const path = join(tempFolder(), 'qmp')
    await listening(path, (say) => {
      say(`${greeting}\r\n`)
      setTimeout(() => say('{"id":1,"return":{}}\r\n'), 50)
    })
    await using qmp = await QmpClient.connect(path, { timeout: 0 })
    expect(qmp.greeting.version.qemu.major).toBe(7)
  })
})
