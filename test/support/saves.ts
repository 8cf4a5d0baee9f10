/** Saved VMs of every kind, made by real QEMUs. */
import { existsSync, rmSync } from 'node:fs'
import { join } from 'node:path'
import { expect } from 'vitest'
import { openFile } from '../../src/block/file.ts'
import { openSaved } from '../../src/snapshot/open-saved.ts'
import { RamImageWriter } from '../../src/snapshot/ram-image-writer.ts'
import { deviceStreamSink } from '../../src/snapshot/save-sink.ts'
import { saveTo } from '../../src/snapshot/save.ts'
import { checkGuestMemory, Guest, mainMemory, type GuestMemory, type GuestOptions } from './guest.ts'
import type { Qemu } from './qemu.ts'
import { tempFolder } from './temp.ts'

const everywhere = ['RAM image', 'RAM image on another elsewhere', 'stream file', 'savevm', 'savevm in an overlay', 'savevm without the base'] as const

/** What holds a saved VM. */
export type SaveKind = (typeof everywhere)[number] | 'mapped-ram'

/** The kinds a QEMU can make. */
export function saveKinds(qemu: Qemu): SaveKind[] {
  return qemu.major >= 9 ? [...everywhere, 'mapped-ram'] : [...everywhere]
}

/** A saved VM on disk and what its memory says. */
export interface Save {
  readonly file: string
  readonly memory: GuestMemory
}

/** Boots a guest, lets it run, saves it, and ends it. */
export async function makeSave(qemu: Qemu, kind: SaveKind, options: GuestOptions = {}): Promise<Save> {
  const folder = tempFolder()
  const file = join(folder, /image|savevm/.test(kind) ? 'saved.qcow2' : 'saved.mig')
  const base = join(folder, 'base.qcow2')
  // The image for savevm has no device, so that every kind is of the same machine.
  const args = [...(options.args ?? [])]
  if (kind.startsWith('savevm')) {
    const overlay = kind === 'savevm' ? [] : ['-b', base, '-F', 'qcow2']
    if (kind !== 'savevm') await qemu.imgOk('create', '-f', 'qcow2', base, '1M')
    await qemu.imgOk('create', '-f', 'qcow2', ...overlay, file, '1M')
    args.push('-blockdev', `driver=qcow2,node-name=vmstate,file.driver=file,file.filename=${file}`)
  }
  const guest = await Guest.boot(qemu, { ...options, args })
  await guest.run(5)
  await save(guest, kind, file)
  await guest.kill()
  if (kind === 'savevm without the base') rmSync(base)
  return { file, memory: await memoryOf(file) }
}

/** What the memory of a saved VM says. */
export async function memoryOf(file: string): Promise<GuestMemory> {
  await using saved = await openSaved(file, { references: 'any' })
  const { content } = saved.blocks.find(({ name }) => name === mainMemory)!
  const memory = await checkGuestMemory((offset, length) => content.read(offset, length))
  expect(memory.problems).toEqual([])
  return memory
}

async function save(guest: Guest, kind: SaveKind, file: string): Promise<void> {
  const { qmp } = guest
  switch (kind) {
    case 'RAM image':
      await saveTo(qmp, RamImageWriter.to(file))
      break
    case 'RAM image on another elsewhere': {
      const backing = join(tempFolder(), 'earlier.qcow2')
      await saveTo(qmp, RamImageWriter.to(backing))
      await guest.run(2)
      await saveTo(qmp, RamImageWriter.to(file, { backing: { file: backing, format: 'qcow2' }, references: 'any' }))
      break
    }
    case 'stream file': {
      await using device = await openFile(file, { create: 'w' })
      await saveTo(qmp, deviceStreamSink(device))
      break
    }
    case 'savevm':
    case 'savevm in an overlay':
    case 'savevm without the base':
      expect(await qmp.execute('human-monitor-command', { 'command-line': 'savevm snap' })).toBe('')
      break
    case 'mapped-ram':
      await qmp.execute('stop')
      await qmp.execute('migrate-set-capabilities', { capabilities: [{ capability: 'mapped-ram', state: true }] })
      await qmp.execute('migrate', { uri: `file:${file}` })
      await expect.poll(async () => (await qmp.execute('query-migrate')).status, { timeout: 20_000, interval: 10 }).toBe('completed')
      expect(existsSync(file)).toBe(true)
  }
}
