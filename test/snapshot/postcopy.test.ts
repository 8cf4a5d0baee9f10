/** A saved VM started by postcopy in a real QEMU: the guest runs before its memory is there. */
import { join } from 'node:path'
import { expect, test } from 'vitest'
import { connectSocket } from '../../src/qmp/socket.ts'
import type { QmpEvent } from '../../src/qmp/events.ts'
import { PostcopySource } from '../../src/snapshot/postcopy-source.ts'
import { checkGuestMemory, Guest } from '../support/guest.ts'
import { describeWithQemu } from '../support/qemu.ts'
import { captureStream, memorySource } from '../support/saved.ts'

describeWithQemu('postcopy', (qemu) => {
  test('a background snapshot goes on in another QEMU', async () => {
    const first = await Guest.boot(qemu)
    await first.run(5)
    const source = memorySource(await captureStream(first))
    await first.kill()
    const memory = await checkGuestMemory((offset, length) => source.blocks[0]!.content.read(offset, length))
    expect(memory.problems).toEqual([])

    const second = await Guest.boot(qemu, { incoming: 'defer' })
    const path = join(second.folder, 'incoming')
    await second.qmp.execute('migrate-set-capabilities', {
      capabilities: [{ capability: 'postcopy-ram', state: true }, { capability: 'events', state: true }],
    })
    const events = second.qmp.events('MIGRATION', 'RESUME')
    await second.qmp.execute('migrate-incoming', { uri: `unix:${path}` })
    const report = await new PostcopySource(source, await connectSocket(path)).start()
    await second.expectGoesOn(memory.tick)
    const seen = [(await events.next()).value, (await events.next()).value, (await events.next()).value, (await events.next()).value]
    expect(seen.map((event: QmpEvent) => event.data?.['status'] ?? event.event)).toEqual(['setup', 'active', 'postcopy-active', 'RESUME'])
    expect(report.requests).toBeGreaterThan(0)
    expect(report.pages).toBeGreaterThan(500)
    expect(await second.qmp.execute('query-migrate')).toMatchObject({ status: 'completed' })
  })
})
