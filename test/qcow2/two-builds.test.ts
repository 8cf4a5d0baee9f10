/** The ESM and the CommonJS build in one process: an image of one is an image to the functions of the other. */
import { readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { expect, test, vi } from 'vitest'
import { MemoryDevice } from '../../src/block.ts'
import { copyDevice, convertToQcow2, Qcow2Image, readImageInfo, setBackingFile } from '../../src/index.ts'
import { openSaved } from '../../src/snapshot.ts'
import { tempFolder } from '../support/temp.ts'

const size = 1 << 20

/** The class as another build has it. */
async function otherImage(): Promise<typeof Qcow2Image> {
  vi.resetModules()
  const other = (await import('../../src/index.ts')).Qcow2Image
  expect(other).not.toBe(Qcow2Image)
  return other
}

const create = async (device = new MemoryDevice(0, { growable: true })): Promise<Qcow2Image> =>
  (await otherImage()).create(device, { size: 2 * size, backing: { file: 'base', format: 'raw' }, references: () => new MemoryDevice(new Uint8Array(size).fill(1)) })

test('what is an image', async () => {
  const image = await create()
  expect(image instanceof Qcow2Image).toBe(false)
  expect([image, new MemoryDevice(0), 'path', undefined, null].map((value) => Qcow2Image.is(value))).toEqual([true, false, false, false, false])
  await image.close()
})

test('it takes compressed clusters', async () => {
  const target = await create()
  await copyDevice(new MemoryDevice(new Uint8Array(2 * size).fill(5)), target, { compressed: true })
  expect((await target.read(size, 1))[0]).toBe(5)
  await target.close()
})

test('the size of its backing file is known: what an image of either build has only from there is left out alike', async () => {
  const folder = tempFolder()
  writeFileSync(join(folder, 'base'), new Uint8Array(2 * size).fill(7))
  const own = await Qcow2Image.create(new MemoryDevice(0, { growable: true }), { size: 2 * size, backing: { file: 'base', format: 'raw' }, references: () => new MemoryDevice(size) })
  const made: Buffer[] = []
  for (const source of [own, await create()]) {
    const target = join(folder, `made-${made.length}`)
    await convertToQcow2(source, target, { backing: { file: 'base', format: 'raw' } })
    await source.close()
    made.push(readFileSync(target))
  }
  expect(made[1]!.equals(made[0]!)).toBe(true)
})

test('its backing file is renamed, and a saved VM in it is looked for', async () => {
  const device = new MemoryDevice(0, { growable: true })
  const image = await create(device)
  await setBackingFile(image, { file: 'elsewhere', format: 'raw' })
  await image.flush()
  expect((await readImageInfo(device)).backingFile).toBe('elsewhere')
  await expect(openSaved(image)).rejects.toMatchObject({ code: 'ERR_NOT_FOUND' })
  await image.close()
})
