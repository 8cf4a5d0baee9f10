/** Images, and what is in them, as block devices: the suite of all devices, signals, and who owns what. */
import { describe, expect, test } from 'vitest'
import type { BlockDevice } from '../../src/block/device.ts'
import { fault } from '../../src/block/fault.ts'
import { openFile } from '../../src/block/file.ts'
import { MemoryDevice } from '../../src/block/memory.ts'
import { LuksImage } from '../../src/luks/luks-image.ts'
import { compareDevices } from '../../src/qcow2/compare.ts'
import type { CreateOptions } from '../../src/qcow2/new-image.ts'
import { Qcow2Image } from '../../src/qcow2/image.ts'
import { keepOpen } from '../../src/testing/build-image.ts'
import { aligned, blockDeviceSuite, pattern } from '../suites/block-device.ts'
import { expectBytes } from '../support/bytes.ts'
import { tempFolder } from '../support/temp.ts'

const memory = (): MemoryDevice => new MemoryDevice(0, { growable: true })

/** Requests take a turn of the event loop. */
const slow = (device: BlockDevice): BlockDevice => fault(device, () => ({ kind: 'delay', until: new Promise((resolve) => setImmediate(resolve)) }))

async function holding(content: Uint8Array, options: CreateOptions = {}): Promise<Qcow2Image> {
  const image = await Qcow2Image.create(memory(), { size: content.length, ...options })
  await image.write(0, content)
  return image
}

/** The image of a content, closed, as a device. */
async function closedImage(content: Uint8Array, options: CreateOptions = {}): Promise<MemoryDevice> {
  const host = memory()
  await using image = await Qcow2Image.create(keepOpen(host), { size: content.length, ...options })
  await image.write(0, content)
  return host
}

const few = { numRuns: 10, resizable: true }
const encryption = { passphrase: 'a', iterations: 1000 }
blockDeviceSuite('image', (content) => holding(content), few)
blockDeviceSuite('image with subclusters', (content) => holding(content, { extendedL2: true, clusterSize: 16_384 }), few)
blockDeviceSuite('image with LUKS encryption', (content) => holding(content, { encryption: { format: 'luks', ...encryption } }), few)
blockDeviceSuite('image with legacy AES encryption', (content) => holding(content, { clusterSize: 512, encryption: { format: 'aes', ...encryption } }), few)
blockDeviceSuite('overlay', async (content) => {
  const image = await Qcow2Image.create(memory(), { size: content.length, clusterSize: 4096, backing: { file: 'b', format: 'raw' }, references: () => new MemoryDevice(content.slice(0, content.length / 2)) })
  await image.write(content.length / 2, content.subarray(content.length / 2))
  return image
}, few)
blockDeviceSuite('image over a slow file', async (content) => Qcow2Image.open(slow(await closedImage(content, { clusterSize: 4096 }))), few)
blockDeviceSuite('read-only image over a slow file', async (content) => Qcow2Image.open(slow(await closedImage(content, { clusterSize: 512 })), { readOnly: true }), few)
blockDeviceSuite('encrypted image over a slow file', async (content) => {
  const host = await closedImage(content, { clusterSize: 4096, encryption: { format: 'luks', ...encryption } })
  return Qcow2Image.open(slow(host), { passphrase: 'a' })
}, few)
blockDeviceSuite('compressed image over a slow file', async (content) => {
  const host = memory()
  const image = await Qcow2Image.create(keepOpen(host), { size: content.length, clusterSize: 4096 })
  await image.writeCompressed(0, content)
  await image.close()
  return Qcow2Image.open(slow(host), { readOnly: true })
}, few)
blockDeviceSuite('disk of a snapshot', async (content) => {
  const image = await holding(content)
  await image.snapshots.create({ name: 'a' })
  await image.write(0, new Uint8Array(content.length))
  return image.snapshots.open('a')
}, few)
blockDeviceSuite('VM state of a snapshot', async (content) => {
  const image = await holding(content, { encryption: { format: 'luks', ...encryption } })
  await image.snapshots.create({ name: 'a', vmState: [content] })
  return (await image.snapshots.open('a')).vmState
}, few)

test('an aborted read makes no more requests and rejects with the reason', async () => {
  const host = await closedImage(pattern(4 << 20), { clusterSize: 4096 })
  // every other cluster has a place of its own, so that the read is many requests
  {
    await using image = await Qcow2Image.open(keepOpen(host))
    for (let at = 0; at < 4 << 20; at += 8192) await image.discard(at, 4096)
  }
  for (const readOnly of [true, false]) {
    let requests = 0
    const stop = new AbortController()
    const file = fault(keepOpen(host), ({ operation }) => {
      if (operation === 'read' && ++requests === 40) stop.abort(new Error('enough'))
      return { kind: 'delay', until: new Promise((resolve) => setImmediate(resolve)) }
    })
    await using image = await Qcow2Image.open(file, { readOnly })
    await expect(image.read(0, 4 << 20, { signal: stop.signal })).rejects.toThrow('enough')
    expect(requests).toBeLessThan(120)
    await expect(image.read(0, 100)).resolves.toHaveLength(100)
  }
})

test('opening is aborted at any of its requests, also while it repairs, and leaves the device open and the image repairable', async () => {
  const content = pattern(300_000)
  const host = await closedImage(content.subarray(0, 299_520), { clusterSize: 512, lazyRefcounts: true })
  const dirty = host.bytes.slice(0, host.size)
  dirty[79]! |= 1
  let total = 0
  await (await Qcow2Image.open(fault(new MemoryDevice(dirty.slice(), { growable: true }), () => { total++; return undefined }))).close()
  for (let at = 0; at < total; at += Math.max(1, Math.floor(total / 25))) {
    const device = new MemoryDevice(dirty.slice(), { growable: true })
    const stop = new AbortController()
    let requests = 0
    let later = 0
    const counted = fault(device, () => {
      if (stop.signal.aborted) later++
      if (requests++ === at) stop.abort(new Error('enough'))
      return undefined
    })
    const opened = await Qcow2Image.open(counted, { signal: stop.signal }).catch((error: unknown) => error)
    if (opened instanceof Qcow2Image) {
      // only what closing it takes was left
      expect(at).toBeGreaterThan(total - 20)
      await opened.close()
      continue
    }
    expect((opened as Error).message).toBe('enough')
    expect(later).toBeLessThan(20)
    expect(counted.closed).toBe(false)
    await using again = await Qcow2Image.open(device)
    expectBytes(await again.read(0, again.size), content.subarray(0, 299_520))
  }
})

describe('a device that is given is the caller\'s until the call resolves', () => {
  const limits = { requestAlignment: 4096, memoryAlignment: 4096 }
  const shapes: [string, (bytes: Uint8Array) => MemoryDevice][] = [
    ['any requests', (bytes) => new MemoryDevice(bytes, { growable: true })],
    ['aligned requests', (bytes) => new MemoryDevice(bytes, { growable: true, limits })],
    ['read-only', (bytes) => new MemoryDevice(bytes, { readOnly: true })],
  ]
  test.each(shapes)('%s', async (_name, make) => {
    for (const readOnly of [true, false]) {
      const device = make(new Uint8Array(65_536))
      await expect(Qcow2Image.open(device, { readOnly })).rejects.toMatchObject({ code: 'ERR_FORMAT' })
      await expect(LuksImage.open(device, { readOnly, passphrase: 'a' })).rejects.toMatchObject({ code: 'ERR_FORMAT' })
      expect(device.closed).toBe(false)
    }
    const target = make(new Uint8Array(4096))
    await expect(Qcow2Image.create(target, { size: 1 << 20, backing: { file: 'x', format: 'raw' }, references: 'none' })).rejects.toThrow()
    expect(target.closed).toBe(false)
  })

  test('a backing file and a data file too', async () => {
    const host = await closedImage(new Uint8Array(0), { size: 1 << 20, backing: { file: 'x', format: 'raw' }, references: () => new MemoryDevice(1 << 20) })
    const bytes = host.bytes.slice(0, host.size)
    bytes[79]! |= 4 // an external data file, which is named nowhere
    const backing = new MemoryDevice(1 << 20)
    await expect(Qcow2Image.open(new MemoryDevice(bytes), { backing })).rejects.toThrow()
    expect(backing.closed).toBe(false)
    const dataFile = new MemoryDevice(1 << 20)
    await expect(Qcow2Image.open(new MemoryDevice(bytes), { dataFile, references: 'none' })).rejects.toThrow()
    expect(dataFile.closed).toBe(false)
    // one that a policy returns belongs to the image at once: nobody else knows of it
    const found = new MemoryDevice(1 << 20)
    await expect(Qcow2Image.open(new MemoryDevice(bytes), { dataFile, references: ({ kind }) => (kind === 'backing file' ? found : false), signal: AbortSignal.abort() })).rejects.toThrow()
    expect(dataFile.closed).toBe(false)
  })
})

test('files with direct I/O are read and compared as they are', async () => {
  const folder = tempFolder()
  const content = pattern(300_000)
  const open = async (name: string, bytes: Uint8Array): Promise<BlockDevice> => {
    await using file = await openFile(`${folder}/${name}`, { create: 'w' })
    await file.write(0, bytes)
    return await openFile(`${folder}/${name}`, { direct: true })
  }
  await using a = await open('a', content)
  await using b = await open('b', content.slice(0, 299_999))
  expectBytes(await a.read(4096, 8192), content.subarray(4096, 12_288))
  expect(await compareDevices(a, b)).toEqual({ equal: false, offset: 299_999, reason: 'content' })
  expect(await compareDevices(a, new MemoryDevice(content))).toEqual({ equal: true, sizesDiffer: false })
  expect(aligned(content)).toHaveLength(content.length)
})
