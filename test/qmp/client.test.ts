/** The QMP client against a fake monitor: what it sends, and how it takes every kind of answer. */
import fc from 'fast-check'
import { expect, test } from 'vitest'
import { Qcow2Error } from '../../src/core/errors.ts'
import { QmpClient } from '../../src/qmp/client.ts'
import { maxMessage } from '../../src/qmp/lines.ts'
import { FakeMonitor, greeting } from './monitor.ts'

const silent = (): void => undefined

test('reads the greeting and negotiates out-of-band execution', async () => {
  const monitor = new FakeMonitor((command, self) => self.answer(command, {}))
  await using qmp = await QmpClient.connect(monitor.client)
  expect(qmp.greeting.version.qemu).toEqual({ major: 7, minor: 2, micro: 22 })
  expect(qmp.outOfBand).toBe(true)
  await qmp.execute('migrate-recover', { uri: 'unix:x' }, { outOfBand: true })
  await qmp.execute('stop')
  expect(monitor.commands.map(({ verb, name, arguments: parameters }) => [verb, name, parameters])).toEqual([
    ['execute', 'qmp_capabilities', { enable: ['oob'] }],
    ['exec-oob', 'migrate-recover', { uri: 'unix:x' }],
    ['execute', 'stop', undefined],
  ])
})

test('without out-of-band execution the same command goes in band', async () => {
  const monitor = new FakeMonitor((command, self) => self.answer(command, {}))
  await using qmp = await QmpClient.connect(monitor.client, { outOfBand: false })
  await qmp.execute('migrate-recover', { uri: 'unix:x' }, { outOfBand: true })
  expect(monitor.commands.map(({ verb, arguments: parameters }) => [verb, parameters])).toEqual([
    ['execute', {}],
    ['execute', { uri: 'unix:x' }],
  ])
})

test('answers find their command whatever the order', async () => {
  const waiting: (() => void)[] = []
  const monitor = new FakeMonitor((command, self) => waiting.unshift(() => self.answer(command, command.name)))
  await using qmp = await QmpClient.connect(monitor.client)
  const answers = Promise.all(['a', 'b', 'c'].map((name) => qmp.execute(name)))
  await expect.poll(() => waiting.length).toBe(3)
  for (const answer of waiting) answer()
  expect(await answers).toEqual(['a', 'b', 'c'])
})

test('a refusal is ERR_QMP with the words of QEMU', async () => {
  const desc = 'Background-snapshot is not compatible with guest memory configuration'
  const monitor = new FakeMonitor((command, self) =>
    self.say(JSON.stringify({ error: { class: 'GenericError', desc }, id: command.id })),
  )
  await using qmp = await QmpClient.connect(monitor.client)
  const error: unknown = await qmp.execute('migrate', { uri: 'unix:x' }).catch((reason: unknown) => reason)
  expect(Qcow2Error.is(error, 'ERR_QMP')).toBe(true)
  expect(error).toMatchObject({ message: `migrate: ${desc}`, command: 'migrate', qmpClass: 'GenericError', desc })
})

test('a call that times out or is aborted rejects, and its late answer harms nobody', async () => {
  const late: (() => void)[] = []
  const monitor = new FakeMonitor((command, self) => {
    if (command.name === 'stop') late.push(() => self.answer(command, {}))
    else self.answer(command, { running: true, status: 'running' })
  })
  await using qmp = await QmpClient.connect(monitor.client)
  await expect(qmp.execute('stop', undefined, { timeout: 5 })).rejects.toThrow('no answer to stop in 5 ms')
  const abort = new AbortController()
  const aborted = qmp.execute('stop', undefined, { signal: abort.signal })
  abort.abort(new Error('enough'))
  await expect(aborted).rejects.toThrow('enough')
  await expect(qmp.execute('stop', undefined, { signal: abort.signal })).rejects.toThrow('enough')
  for (const answer of late) answer()
  expect(await qmp.execute('query-status')).toEqual({ running: true, status: 'running' })
})

test('events queue from the moment of subscription, filtered by name', async () => {
  const monitor = new FakeMonitor(silent)
  await using qmp = await QmpClient.connect(monitor.client)
  const all = qmp.events()
  const stops = qmp.events('STOP')
  for (const event of ['STOP', 'RESUME', 'STOP']) monitor.say(JSON.stringify({ event, timestamp: { seconds: 1, microseconds: 2 } }))
  const seen: string[] = []
  for await (const { event } of all) {
    seen.push(event)
    if (seen.length === 3) break
  }
  expect(seen).toEqual(['STOP', 'RESUME', 'STOP'])
  expect((await stops.next()).value).toMatchObject({ event: 'STOP', timestamp: { seconds: 1 } })
  await qmp.close()
  expect(await stops.next()).toMatchObject({ value: { event: 'STOP' } })
  expect(await stops.next()).toEqual({ done: true, value: undefined })
})

test('when QEMU goes away, calls and events reject', async () => {
  const monitor = new FakeMonitor(silent)
  await using qmp = await QmpClient.connect(monitor.client)
  const events = qmp.events()
  const next = expect(events.next()).rejects.toThrow('QEMU closed the monitor connection')
  const call = expect(qmp.execute('stop')).rejects.toMatchObject({ code: 'ERR_QMP', command: 'stop' })
  monitor.hangUp()
  await Promise.all([next, call])
  await expect(qmp.execute('stop')).rejects.toMatchObject({ code: 'ERR_QMP' })
})

test('after close, calls reject with ERR_CLOSED', async () => {
  const monitor = new FakeMonitor(silent)
  const qmp = await QmpClient.connect(monitor.client)
  const call = expect(qmp.execute('stop')).rejects.toMatchObject({ code: 'ERR_CLOSED' })
  await qmp.close()
  await call
  await expect(qmp.execute('stop')).rejects.toMatchObject({ code: 'ERR_CLOSED' })
  expect(monitor.client.destroyed).toBe(true)
})

test('no greeting, and something that is no monitor, are told apart', async () => {
  const mute = new FakeMonitor(silent, false)
  await expect(QmpClient.connect(mute.client, { timeout: 10 })).rejects.toThrow('no answer to the greeting in 10 ms')
  const web = new FakeMonitor(silent, false)
  web.say('HTTP/1.1 400 Bad Request')
  await expect(QmpClient.connect(web.client)).rejects.toThrow('not a QMP message: "HTTP/1.1 400 Bad Request"')
  await expect(QmpClient.connect('/nonexistent/qmp')).rejects.toMatchObject({ code: 'ERR_QMP' })
  const abort = AbortSignal.abort(new Error('enough'))
  await expect(QmpClient.connect('/nonexistent/qmp', { signal: abort })).rejects.toThrow('enough')
})

test.each(['null', '5', '{}', '{"version":null,"capabilities":[]}', '{"version":{},"capabilities":5}'])('a greeting of %s is ERR_QMP', async (content) => {
  const monitor = new FakeMonitor(silent, false)
  const connecting = QmpClient.connect(monitor.client, { timeout: 1000 })
  monitor.say(`{"QMP":${content}}`)
  await expect(connecting).rejects.toMatchObject({ code: 'ERR_QMP', message: expect.stringContaining('a greeting without version') as string })
})

test('an answer whose error is nothing is ERR_QMP for this call and later ones', async () => {
  const monitor = new FakeMonitor((command, self) => self.say(JSON.stringify({ error: null, id: command.id })))
  await using qmp = await QmpClient.connect(monitor.client)
  await expect(qmp.execute('stop')).rejects.toMatchObject({ code: 'ERR_QMP' })
  await expect(qmp.execute('stop')).rejects.toMatchObject({ code: 'ERR_QMP' })
})

test('a message without end is refused, not collected for ever', async () => {
  const monitor = new FakeMonitor(silent)
  await using qmp = await QmpClient.connect(monitor.client)
  const call = expect(qmp.execute('stop')).rejects.toThrow('without a line end')
  const piece = new Uint8Array(maxMessage / 4).fill(0x20)
  for (let sent = 0; sent <= maxMessage; sent += piece.length) monitor.raw(piece)
  await call
})

test('any chunking of the bytes gives the same messages', async () => {
  const text = new TextEncoder().encode(
    `${greeting}\r\n{"event":"STOP","data":{"reason":"\u00fcber \u{1f600}"}}\r\n\r\n{"event":"RESUME"}\r\n`,
  )
  await fc.assert(
    fc.asyncProperty(fc.array(fc.integer({ min: 1, max: 40 }), { maxLength: 12 }), async (sizes) => {
      const monitor = new FakeMonitor(silent, false)
      const connecting = QmpClient.connect(monitor.client)
      monitor.raw(text.subarray(0, greeting.length + 2))
      await using qmp = await connecting
      const events = qmp.events()
      let at = greeting.length + 2
      for (const size of [...sizes, text.length]) {
        monitor.raw(text.subarray(at, Math.min(at + size, text.length)))
        at = Math.min(at + size, text.length)
      }
      expect((await events.next()).value).toEqual({ event: 'STOP', data: { reason: '\u00fcber \u{1f600}' } })
      expect((await events.next()).value).toEqual({ event: 'RESUME' })
    }),
    { numRuns: process.env['QCOW2_LONG'] === '1' ? 1000 : 100 },
  )
})
