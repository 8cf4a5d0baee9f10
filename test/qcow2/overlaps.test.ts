/**
 * Images whose metadata lie on top of each other, or past the end of the file: writing is refused before anything is
 * overwritten, and the image marked corrupt.
 */
import { writeFileSync } from 'node:fs'
import { describe, expect, test } from 'vitest'
import { MemoryDevice } from '../../src/block/memory.ts'
import { checkImage } from '../../src/qcow2/check.ts'
import { Qcow2Image } from '../../src/qcow2/image.ts'
import { readImageInfo } from '../../src/qcow2/info.ts'
import { keepOpen } from '../../src/testing/build-image.ts'
import { describeWithQemu } from '../support/qemu.ts'
import { tempFolder } from '../support/temp.ts'

const clusterSize = 65_536
const size = 8 << 20

/** A sound image with one of everything, its table pointers by name, and where each structure is. */
async function start(): Promise<{ bytes: Uint8Array; pointers: Record<string, number>; places: Record<string, number> }> {
  const host = new MemoryDevice(0, { growable: true })
  const image = await Qcow2Image.create(keepOpen(host), { size, clusterSize })
  await image.write(0, new Uint8Array(200_000).fill(1))
  await image.snapshots.create({ name: 'a' })
  await image.write(0, new Uint8Array(100_000).fill(2))
  await image.bitmaps.add({ name: 'b', disabled: true })
  await image.close()
  const bytes = host.bytes.slice(0, host.size)
  const view = new DataView(bytes.buffer)
  const at = (offset: number): number => Number(view.getBigUint64(offset) & 0x00ff_ffff_ffff_fe00n)
  const extension = Buffer.from(bytes).indexOf(Buffer.of(0x23, 0x85, 0x28, 0x75))
  const pointers = { l1: 40, refcounts: 48, snapshots: 64, block: at(48), l2: at(40), snapshotL1: at(64), bitmaps: extension + 8 + 16 }
  const places = { header: 0, l1: at(40), refcounts: at(48), snapshots: at(64), block: at(at(48)), l2: at(at(40)), snapshotL1: at(at(64)), bitmaps: at(pointers.bitmaps), end: 2 ** 40 }
  return { bytes, pointers, places }
}

const { bytes: sound, pointers, places } = await start()

function redirected(pointer: string, place: string): Uint8Array {
  const bytes = sound.slice()
  const flags = pointer === 'l2' ? 1n << 63n : 0n
  new DataView(bytes.buffer).setBigUint64(pointers[pointer]!, BigInt(places[place]!) | flags)
  return bytes
}

const calls: Record<string, (image: Qcow2Image) => Promise<unknown>> = {
  'write to a new cluster': (image) => image.write(2 << 20, new Uint8Array(clusterSize).fill(0x99)),
  'write to a cluster that is there': (image) => image.write(0, new Uint8Array(clusterSize).fill(0x99)),
  'write to a shared cluster': (image) => image.write(150_000, new Uint8Array(100).fill(0x99)),
  zeroes: (image) => image.writeZeroes(0, clusterSize, { unmap: true }),
  discard: (image) => image.discard(0, size),
  resize: (image) => image.resize(2 ** 40),
  'create a snapshot': (image) => image.snapshots.create({ name: 'n' }),
  'create a snapshot with VM state': (image) => image.snapshots.create({ name: 'n', vmState: [new Uint8Array(100_000)] }),
  'apply a snapshot': (image) => image.snapshots.apply('a'),
  'delete a snapshot': (image) => image.snapshots.delete('a'),
  'add a bitmap': (image) => image.bitmaps.add({ name: 'n' }),
  'remove a bitmap': (image) => image.bitmaps.remove('b'),
  'write compressed': (image) => image.writeCompressed(1 << 20, new Uint8Array(clusterSize)),
}

/** Errors of a check that are not leaks. */
async function damageOf(bytes: Uint8Array): Promise<number> {
  const { corruptions, checkErrors } = await checkImage(new MemoryDevice(bytes.slice())).catch(() => ({ corruptions: 0, checkErrors: 0 }))
  return corruptions + checkErrors
}

/** The bytes of every structure but the header, where `pointer` was before too. */
const cluster = (bytes: Uint8Array, at: number): string => Buffer.from(bytes.subarray(at, at + clusterSize)).toString('latin1')

const kinds = Object.keys(pointers)
const cases = kinds.flatMap((pointer) => Object.keys(places).filter((place) => place !== pointer).map((place) => [pointer, place] as const))

describe.each(cases)('the pointer to %s names the place of %s', (pointer, place) => {
  test.each(Object.keys(calls))('%s', async (call) => {
    const bytes = redirected(pointer, place)
    const host = new MemoryDevice(bytes.slice(), { growable: true })
    const before = await damageOf(bytes)
    const image = await Qcow2Image.open(keepOpen(host)).catch(() => undefined)
    if (image === undefined) {
      expect(Buffer.compare(host.bytes.subarray(0, host.size), bytes)).toBe(0)
      return
    }
    const outcome = await calls[call]!(image).then(() => image.flush()).then(() => undefined, (error: unknown) => error as { code: string })
    await image.close().catch(() => undefined)
    expect(host.size).toBeLessThan(64 << 20)
    const after = host.bytes.slice(0, host.size)
    // what else is in a cluster counts as damage of the one or the other, by how much of it there is
    if (!['snapshotL1', 'bitmaps', 'snapshots'].includes(pointer) && place !== 'header') expect(await damageOf(after)).toBeLessThanOrEqual(before)
    if (outcome === undefined || place === 'header' || place === 'end') return
    // what is at the contested place is what was there
    if (!['snapshots', 'bitmaps'].includes(pointer)) expect(cluster(after, places[place]!)).toBe(cluster(bytes, places[place]!))
  })
})

test.each([['l1', 'block'], ['l2', 'block'], ['refcounts', 'end'], ['l1', 'end'], ['l2', 'l1'], ['block', 'l1'], ['l2', 'snapshotL1']] as const)('the pointer to %s at the place of %s: nothing but the corrupt bit is written', async (pointer, place) => {
  const bytes = redirected(pointer, place)
  const host = new MemoryDevice(bytes.slice(), { growable: true })
  const image = await Qcow2Image.open(keepOpen(host))
  await expect(image.write(2 << 20, new Uint8Array(clusterSize).fill(0x99)).then(() => image.flush())).rejects.toMatchObject({ code: 'ERR_CORRUPT' })
  await expect(image.write(0, new Uint8Array(512))).rejects.toMatchObject({ code: 'ERR_CORRUPT' })
  await image.close()
  expect(host.size).toBeLessThan(bytes.length + (1 << 20))
  expect(Buffer.compare(host.bytes.subarray(clusterSize, bytes.length), bytes.subarray(clusterSize))).toBe(0)
  expect(await readImageInfo(new MemoryDevice(host.bytes.subarray(0, host.size)))).toMatchObject({ corrupt: true })
  await expect(Qcow2Image.open(host)).rejects.toMatchObject({ code: 'ERR_CORRUPT' })
})

test('damage of a data file that is an image itself is not damage of this image', async () => {
  const inner = new MemoryDevice(0, { growable: true })
  const raw = await Qcow2Image.create(keepOpen(inner), { size })
  await raw.write(0, new Uint8Array(clusterSize).fill(1))
  await raw.close()
  const view = new DataView(inner.bytes.buffer, inner.bytes.byteOffset)
  view.setBigUint64(Number(view.getBigUint64(40)), 0x8000_0000_0000_0200n)
  const host = new MemoryDevice(0, { growable: true })
  const options = { dataFile: 'x', references: () => keepOpen(new MemoryDevice(0, { growable: true })) }
  await (await Qcow2Image.create(keepOpen(host), { size, ...options })).close()
  const image = await Qcow2Image.open(keepOpen(host), { dataFile: await Qcow2Image.open(keepOpen(inner)) })
  await expect(image.write(0, new Uint8Array(100))).rejects.toMatchObject({ code: 'ERR_CORRUPT' })
  await image.close().catch(() => undefined)
  expect(await readImageInfo(new MemoryDevice(host.bytes.slice(0, host.size)))).toMatchObject({ corrupt: false })
  expect(await readImageInfo(new MemoryDevice(inner.bytes.slice(0, inner.size)))).toMatchObject({ corrupt: true })
})

describeWithQemu('metadata on top of each other', (qemu) => {
  test.each([['l1', 'block'], ['l2', 'block'], ['refcounts', 'end']] as const)('the pointer to %s at the place of %s: QEMU refuses it, too', async (pointer, place) => {
    const path = `${tempFolder()}/a.qcow2`
    writeFileSync(path, redirected(pointer, place))
    const { code, stdout, stderr } = await qemu.io('-f', 'qcow2', '-c', 'write -P 0x99 2M 64k', '-c', 'flush', path)
    expect(`${code} ${stdout} ${stderr}`).toMatch(/Preventing invalid|failed|corrupt/i)
  })
})
