/** Names of snapshots and bitmaps are bytes, as those of files are: QEMU and this library find what the other has named. */
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { expect, test } from 'vitest'
import { MemoryDevice } from '../../src/block.ts'
import { decodeName, encodeName } from '../../src/bytes/file-name.ts'
import { checkImage, Qcow2Image, readImageInfo } from '../../src/index.ts'
import { describeWithQemu } from '../support/qemu.ts'
import { tempFolder } from '../support/temp.ts'

const latin1 = (text: string): string => decodeName(Buffer.from(text, 'latin1'))
const names = [latin1('caf\xe9'), latin1('\xff'), latin1('\xed\xa0\x80'), 'caf\u00e9', '\ufeffx', '\ufffd']

test('names that differ in a byte are different snapshots and bitmaps, and stay so', async () => {
  const file = new MemoryDevice(0, { growable: true })
  const image = await Qcow2Image.create(file, { size: 1 << 20 })
  for (const name of names) {
    await image.snapshots.create({ name })
    await image.bitmaps.add({ name })
  }
  await image.snapshots.rename(names[1]!, latin1('\xfe'))
  const kept = [names[0], latin1('\xfe'), ...names.slice(2)]
  const info = await readImageInfo(file)
  expect([info.snapshots.map(({ name }) => name), info.bitmaps.map(({ name }) => name)]).toEqual([kept, names])
  for (const name of kept) await image.snapshots.delete(name!)
  for (const name of names) await image.bitmaps.remove(name)
  await image.flush()
  expect(await checkImage(file)).toMatchObject({ corruptions: 0, leaks: 0 })
  await image.close()
})

test('no name has a NUL: it would end there', async () => {
  await using image = await Qcow2Image.create(new MemoryDevice(0, { growable: true }), { size: 1 << 20 })
  await expect(image.snapshots.create({ name: 'a\0b' })).rejects.toThrow(TypeError)
  await expect(image.bitmaps.add({ name: 'a\0b' })).rejects.toThrow(RangeError)
})

describeWithQemu('names that are no UTF-8', (qemu) => {
  test('of snapshots and bitmaps, written here, are the same bytes there', async () => {
    const path = join(tempFolder(), 'image')
    const image = await Qcow2Image.create(path, { size: 1 << 20 })
    for (const name of names) {
      await image.snapshots.create({ name })
      await image.bitmaps.add({ name })
    }
    await image.close()
    const lines = (JSON.parse(await qemu.imgOk('info', '--output=json', path)) as { snapshots: unknown[] }).snapshots
    expect(lines).toHaveLength(names.length)
    const stored = readFileSync(path)
    for (const name of names) expect(stored.includes(Buffer.from(encodeName(name)))).toBe(true)
    await qemu.imgOk('check', path)
    // qemu-img writes both tables anew: no byte of a name may change on the way
    await qemu.imgOk('snapshot', '-c', 'more', path)
    await qemu.imgOk('bitmap', '--add', path, 'more')
    const info = await readImageInfo(path)
    expect([info.snapshots.map(({ name }) => name), info.bitmaps.map(({ name }) => name)]).toEqual([[...names, 'more'], [...names, 'more']])
  })
})
