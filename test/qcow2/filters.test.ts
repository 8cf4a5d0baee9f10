/** A filter over a file keeps what the file is: names in an image are followed, and two writers see each other. */
import { rmSync, symlinkSync } from 'node:fs'
import { open } from 'node:fs/promises'
import { join } from 'node:path'
import { pathToFileURL } from 'node:url'
import { describe, expect, test } from 'vitest'
import { fault, openFile, pad, readAhead, record, Recording, SimulatedDisk, slice, trace, type BlockDevice } from '../../src/block.ts'
import { FilterDevice } from '../../src/block/filter.ts'
import { openSource } from '../../src/block/source.ts'
import { UncachedReads } from '../../src/block/uncached-reads.ts'
import { Qcow2Image } from '../../src/qcow2/image.ts'
import { keepOpen } from '../../src/testing/build-image.ts'
import { tempFolder } from '../support/temp.ts'

class Plain extends FilterDevice {}

const filters: [string, (file: BlockDevice) => BlockDevice][] = [
  ['no filter', (file) => file],
  ['a filter of the caller', (file) => new Plain(file)],
  ['trace', (file) => trace(file, [])],
  ['fault', (file) => fault(file, () => undefined)],
  ['pad', (file) => pad(file)],
  ['readAhead', (file) => readAhead(file)],
  ['SimulatedDisk', (file) => new SimulatedDisk(file)],
  ['record', (file) => record(file, new Recording())],
  ['a slice of all of it', (file) => slice(file, 0)],
  ['a read-only slice of all of it', (file) => slice(file, 0, file.size, { readOnly: true })],
  ['a device that stays open', (file) => keepOpen(file)],
  ['uncached reads', (file) => UncachedReads.over(file, 65_536)],
  ['several', (file) => trace(slice(readAhead(trace(file, [])), 0), [])],
]

/** An image on a base in the same folder, whose first byte is the base's. */
async function overlay(): Promise<string> {
  const folder = tempFolder()
  {
    await using base = await Qcow2Image.create(join(folder, 'base.qcow2'), { size: 1 << 20 })
    await base.write(0, Uint8Array.of(7))
  }
  const top = join(folder, 'top.qcow2')
  await (await Qcow2Image.create(top, { backing: { file: 'base.qcow2', format: 'qcow2' } })).close()
  return top
}

describe.each(filters)('%s', (_name, filter) => {
  test('over a file: its backing file is found beside it', async () => {
    await using image = await Qcow2Image.open(filter(await openFile(await overlay(), { readOnly: true })), { readOnly: true })
    expect(await image.read(0, 1)).toEqual(Uint8Array.of(7))
  })

  test('over a file with direct I/O, and over what opens any source', async () => {
    const path = await overlay()
    for (const source of [path, pathToFileURL(path)]) {
      await using direct = await Qcow2Image.open(filter(await openSource(source, { readOnly: true, direct: true })), { readOnly: true })
      expect(await direct.read(0, 1)).toEqual(Uint8Array.of(7))
    }
  })

  test('over a file: a chain that comes back to it loops', async () => {
    const path = await overlay()
    const base = join(path, '../base.qcow2')
    rmSync(base)
    symlinkSync(path, base)
    await expect(Qcow2Image.open(filter(await openFile(path, { readOnly: true })), { readOnly: true })).rejects.toThrow('loops')
  })

  test('over a file: one writer sees the other', async () => {
    const path = await overlay()
    const device = filter(await openFile(path))
    if (device.readOnly) return device.close()
    await using first = await Qcow2Image.open(device)
    await expect(Qcow2Image.open(path)).rejects.toMatchObject({ code: 'ERR_BUSY' })
    await using handle = await openFile(await open(path, 'r+'), { locking: false })
    await expect(Qcow2Image.open(filter(keepOpen(handle)))).rejects.toMatchObject({ code: 'ERR_BUSY' })
    await first.flush()
  })

  test('over a part of a file: another thing than the file', async () => {
    const part = filter(slice(await openFile(await overlay(), { readOnly: true }), 65_536))
    expect([part.path, part.identity]).toEqual([undefined, undefined])
    await part.close()
  })
})

test('a file that grows through a padded device is the same file', async () => {
  const path = join(tempFolder(), 'file')
  await using device = pad(await openFile(path, { create: 'w', direct: true }))
  await device.write(0, new Uint8Array(100))
  expect(device).toMatchObject({ path, identity: (await openFile(path)).identity })
})
