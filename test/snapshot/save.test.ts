/** Saving a running VM through its monitor, with real QEMUs: what is kept, and what a failure leaves behind. */
import { existsSync } from 'node:fs'
import { join } from 'node:path'
import { expect, test } from 'vitest'
import { MemoryDevice } from '../../src/block/memory.ts'
import type { Qmp } from '../../src/qmp/client.ts'
import { differences } from '../../src/snapshot/differences.ts'
import { parseRamBlocks, ramBlocksOf } from '../../src/snapshot/machine-facts.ts'
import { parseManifest } from '../../src/snapshot/parse-manifest.ts'
import type { SaveMode } from '../../src/snapshot/save-task.ts'
import { saveTo } from '../../src/snapshot/save.ts'
import { deviceStreamSink, type SaveSink } from '../../src/snapshot/save-sink.ts'
import { MigrationListener } from '../../src/snapshot/socket.ts'
import { checkGuestMemory, Guest, type GuestMemory } from '../support/guest.ts'
import { describeWithQemu, type Qemu } from '../support/qemu.ts'
import { memorySource } from '../support/saved.ts'

const memory = (): MemoryDevice => new MemoryDevice(0, { growable: true })

async function memoryOf(stream: MemoryDevice): Promise<GuestMemory> {
  const source = memorySource(stream.bytes)
  return checkGuestMemory((offset, length) => source.blocks[0]!.content.read(offset, length))
}

async function disk(qemu: Qemu, folder: string): Promise<string> {
  const file = join(folder, 'disk.qcow2')
  await qemu.imgOk('create', '-f', 'qcow2', file, '8M')
  return file
}

/** The guest is as before: running, with its capabilities, and its memory sound. */
async function expectUnharmed(guest: Guest): Promise<void> {
  expect(await guest.qmp.execute('query-status')).toMatchObject({ running: true })
  const capabilities = await guest.qmp.execute('query-migrate-capabilities')
  expect(capabilities.filter(({ state, capability }) => state && !['events'].includes(capability))).toEqual([])
  await guest.run(3)
  expect(guest.errors).toEqual([])
}

async function activeFiles(qmp: Qmp): Promise<string[]> {
  const drives = await qmp.execute('query-block')
  return drives.flatMap(({ inserted }) => (inserted === undefined ? [] : [inserted.file]))
}

test('the table of RAM blocks', () => {
  const table = [
    '              Block Name    PSize              Offset               Used              Total                HVA  RO',
    '                  pc.ram    4 KiB  0x0000000000000000 0x0000000000400000 0x0000000000400000 0x00007f1f9be00000  rw',
    '    /rom@etc/acpi/tables    2 MiB  0x0000000000460000 0x0000000000020000 0x0000000000200000 0x00007f1f9b800000  ro',
    '',
  ].join('\r\n')
  expect(parseRamBlocks(table)).toEqual([
    { name: 'pc.ram', pageSize: 4096, length: 0x400000 },
    { name: '/rom@etc/acpi/tables', pageSize: 2 << 20, length: 0x20000 },
  ])
  expect(parseRamBlocks('unknown command')).toEqual([])
})

test.each([
  ['', 'not valid JSON'],
  ['null', 'not the manifest of a saved VM'],
  ['{"format":"qcow2 saved VM","version":3}', 'version is 3, expected 1 or 2'],
  ['{"format":"qcow2 saved VM","version":1}', 'running is missing'],
])('manifest %s is refused', (text, message) => {
  expect(() => parseManifest(text)).toThrow(message)
})

describeWithQemu('save', (qemu) => {
  const modes: SaveMode[] = qemu.major < 8 ? ['background', 'stop'] : ['background', 'stop', 'precopy']

  test.each(modes)('%s: a consistent memory, and the guest goes on', async (mode) => {
    const guest = await Guest.boot(qemu)
    await guest.run(3)
    const stream = memory()
    const report = await saveTo(guest.qmp, deviceStreamSink(stream), { mode })
    expect(report.mode).toBe(mode)
    expect(report.stoppedFor).toBeGreaterThan(0)
    expect(stream.size).toBe(report.summary.length)
    expect(parseManifest(JSON.stringify(report.manifest))).toEqual(report.manifest)
    expect(await differences({ ...report.manifest }, guest.qmp)).toEqual([])
    const saved = await memoryOf(stream)
    expect(saved.problems).toEqual([])
    expect(saved.tick).toBeGreaterThanOrEqual(3)
    await expectUnharmed(guest)
  })

  test('stop: the guest runs again before its memory is durable', async () => {
    const guest = await Guest.boot(qemu)
    await guest.run(3)
    const stream = memory()
    const kept = deviceStreamSink(stream)
    const sink: SaveSink = {
      ...kept,
      finish: async (summary) => {
        await guest.run(2)
        await kept.finish(summary)
      },
    }
    const report = await saveTo(guest.qmp, sink, { mode: 'stop' })
    expect(report.stoppedFor).toBeLessThan(report.took)
    expect((await memoryOf(stream)).problems).toEqual([])
    await expectUnharmed(guest)
  })

  test('stop: memory that cannot be made durable leaves the VM running and its disks as they were', async () => {
    const folder = (await Guest.boot(qemu, { paused: true })).folder
    const image = await disk(qemu, folder)
    const guest = await Guest.boot(qemu, { disks: [image] })
    const overlay = join(guest.folder, 'overlay.qcow2')
    const kept = deviceStreamSink(memory())
    const sink: SaveSink = { ...kept, finish: () => guest.run(2).then(() => Promise.reject(new Error('no room'))) }
    await expect(saveTo(guest.qmp, sink, { mode: 'stop', disks: [{ node: 'd0', overlay }] })).rejects.toThrow('no room')
    expect(await activeFiles(guest.qmp)).toEqual([image])
    await expectUnharmed(guest)
  })

  test('a paused guest stays paused', async () => {
    const guest = await Guest.boot(qemu)
    await guest.run(3)
    await guest.qmp.execute('stop')
    const stream = memory()
    const report = await saveTo(guest.qmp, deviceStreamSink(stream))
    expect(report.stoppedFor).toBe(0)
    expect(report.manifest.running).toBe(false)
    expect(await guest.qmp.execute('query-status')).toMatchObject({ running: false })
    expect((await memoryOf(stream)).problems).toEqual([])
    await guest.qmp.execute('cont')
    await expectUnharmed(guest)
  })

  test('again and again', async () => {
    const guest = await Guest.boot(qemu)
    let before = 0
    for (let round = 0; round < 5; round++) {
      await guest.run(2)
      const stream = memory()
      await saveTo(guest.qmp, deviceStreamSink(stream))
      const { problems, tick } = await memoryOf(stream)
      expect(problems).toEqual([])
      expect(tick).toBeGreaterThan(before)
      before = tick
    }
    await expectUnharmed(guest)
  })

  test.each(modes)('%s: disks are frozen at the same instant', async (mode) => {
    const folder = (await Guest.boot(qemu, { paused: true })).folder
    const image = await disk(qemu, folder)
    const guest = await Guest.boot(qemu, { disks: [image] })
    await guest.run(3)
    const overlay = join(guest.folder, 'overlay.qcow2')
    const { manifest } = await saveTo(guest.qmp, deviceStreamSink(memory()), { mode, disks: [{ node: 'd0', overlay }] })
    expect(manifest.disks).toMatchObject([{ node: 'd0', activeNode: 'd0-1', qdev: 'disk0', file: image, format: 'qcow2', size: 8 << 20, frozen: { overlay } }])
    expect(await activeFiles(guest.qmp)).toEqual([overlay])
    await expectUnharmed(guest)
  })

  test('an internal disk snapshot belongs to the save, too', async () => {
    const folder = (await Guest.boot(qemu, { paused: true })).folder
    const image = await disk(qemu, folder)
    const guest = await Guest.boot(qemu, { disks: [image] })
    await saveTo(guest.qmp, deviceStreamSink(memory()), { disks: [{ node: 'd0', internal: 'moment' }] })
    await guest.kill()
    expect(await qemu.imgOk('snapshot', '-l', image)).toContain('moment')
  })

  test('a failure leaves the VM running and its disks as they were', async () => {
    const folder = (await Guest.boot(qemu, { paused: true })).folder
    const image = await disk(qemu, folder)
    const guest = await Guest.boot(qemu, { disks: [image] })
    await guest.run(3)
    const overlay = join(guest.folder, 'overlay.qcow2')
    let aborted = 0
    const full: SaveSink = {
      write: () => Promise.reject(new Error('no space')),
      finish: () => Promise.resolve(),
      abort: () => {
        aborted++
        return Promise.resolve()
      },
    }
    const saving = saveTo(guest.qmp, full, { disks: [{ node: 'd0', overlay }] })
    await expect(saving).rejects.toThrow('no space')
    expect(aborted).toBe(1)
    expect(existsSync(overlay)).toBe(false)
    expect(await activeFiles(guest.qmp)).toEqual([image])
    await expectUnharmed(guest)
    await saveTo(guest.qmp, deviceStreamSink(memory()), { disks: 'none' })
    await expectUnharmed(guest)
  })

  test('an aborted save leaves the VM running', async () => {
    const guest = await Guest.boot(qemu)
    await guest.run(3)
    const abort = new AbortController()
    const saving = saveTo(guest.qmp, deviceStreamSink(memory()), {
      signal: abort.signal,
      onProgress: ({ done }) => done > 100_000 && abort.abort(new Error('enough')),
    })
    await expect(saving).rejects.toThrow('enough')
    await expectUnharmed(guest)
  })

  test.each(['background', 'stop'] as const)('aborted before the connection of QEMU is accepted, the VM runs on: %s', async (mode) => {
    const guest = await Guest.boot(qemu)
    await guest.run(3)
    await using listener = await MigrationListener.open()
    await using silent = await MigrationListener.open()
    const abort = new AbortController()
    const saving = saveTo(guest.qmp, deviceStreamSink(memory()), {
      mode,
      signal: abort.signal,
      receiver: {
        uri: listener.uri,
        accept(options) {
          setTimeout(() => abort.abort(new Error('enough')), 0)
          // a background snapshot has to be accepted all the same; the other is aborted while nobody connects
          return (mode === 'background' ? listener : silent).accept(options)
        },
      },
    })
    await expect(saving).rejects.toThrow('enough')
    await expectUnharmed(guest)
  })

  test('no background snapshot of memory in a disk file: said clearly, or saved otherwise if asked', async () => {
    const folder = (await Guest.boot(qemu, { paused: true })).folder
    const backend = `memory-backend-file,id=ram,size=4M,mem-path=${join(folder, 'ram')},share=on`
    const guest = await Guest.boot(qemu, { machine: 'pc,memory-backend=ram', args: ['-object', backend] })
    await guest.run(3)
    await expect(saveTo(guest.qmp, deviceStreamSink(memory()))).rejects.toThrow(
      /no background snapshot of this VM: .*not compatible with guest memory configuration.*fallback/,
    )
    await expectUnharmed(guest)
    const report = await saveTo(guest.qmp, deviceStreamSink(memory()), { fallback: 'stop' })
    expect(report.mode).toBe('stop')
    await expectUnharmed(guest)
  })

  test('capabilities and parameters of the VM are put back', async () => {
    const guest = await Guest.boot(qemu)
    const xbzrle = { capability: 'xbzrle', state: true }
    await guest.qmp.execute('migrate-set-capabilities', { capabilities: [xbzrle] })
    await guest.qmp.execute('migrate-set-parameters', { 'max-bandwidth': 12_345_678 })
    await saveTo(guest.qmp, deviceStreamSink(memory()))
    const on = (await guest.qmp.execute('query-migrate-capabilities')).filter(({ state }) => state)
    expect(on).toEqual([xbzrle])
    expect((await guest.qmp.execute('query-migrate-parameters'))['max-bandwidth']).toBe(12_345_678)
  })

  test('differences of machine and memory are explained', async () => {
    const guest = await Guest.boot(qemu, { paused: true })
    const found = await differences({ machine: 'pc-q35-2.0', accelerator: 'kvm', ramBlocks: [{ name: 'pc.ram', length: 8 << 20 }, { name: 'vga', length: 1 }] }, guest.qmp)
    expect(found).toHaveLength(4)
    expect(found.join('\n')).toMatch(/machine type: saved pc-q35-2.0.*\naccelerator.*\nRAM block pc.ram: saved 8388608 bytes, here 4194304\nRAM block vga.*missing/)
    expect((await ramBlocksOf(guest.qmp)).find(({ name }) => name === 'pc.ram')).toEqual({ name: 'pc.ram', length: 4 << 20, pageSize: 4096 })
  })

  if (qemu.major < 8) {
    test('a live precopy that would lose pages is refused', async () => {
      const guest = await Guest.boot(qemu)
      await expect(saveTo(guest.qmp, deviceStreamSink(memory()), { mode: 'precopy' })).rejects.toMatchObject({ code: 'ERR_UNSUPPORTED' })
      await expectUnharmed(guest)
    })
  }
})
