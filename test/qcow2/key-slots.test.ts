import { expect, test } from 'vitest'
import { MemoryDevice } from '../../src/block/memory.ts'
import { createLuks, openLuks } from '../../src/codec/crypto/luks.ts'
import { decodeLuksHeader } from '../../src/codec/crypto/luks-header.ts'
import { addKeySlot, eraseKeySlots, type SlotChange } from '../../src/codec/crypto/luks-slots.ts'
import { Qcow2Image } from '../../src/qcow2/image.ts'
import { readImageInfo } from '../../src/qcow2/info.ts'
import { addPassphrase, erasePassphrase } from '../../src/qcow2/key-slots.ts'
import { describeWithQemu } from '../support/qemu.ts'
import { tempFolder } from '../support/temp.ts'

const iterations = 1000

/** A LUKS area, changed as a file would be. */
class Area {
  bytes: Uint8Array

  constructor(bytes: Uint8Array) {
    this.bytes = bytes
  }

  apply({ writes }: SlotChange): void {
    for (const { offset, bytes } of writes) this.bytes.set(bytes, offset)
  }

  /** What may be on the disk after a crash: all writes before one, and nothing, half or all of that one. */
  *crashes({ writes }: SlotChange): Generator<Uint8Array> {
    const disk = this.bytes.slice()
    for (const { offset, bytes } of writes) {
      yield disk.slice()
      const half = disk.slice()
      half.set(bytes.subarray(0, Math.floor(bytes.length / 1024) * 512), offset)
      yield half
      disk.set(bytes, offset)
    }
    yield disk
  }
}

const opens = (area: Uint8Array, passphrase: string): Promise<boolean> => openLuks(area, passphrase).then(() => true, () => false)

test('slots are filled in order, until none is left, and each passphrase opens the image until it is erased', async () => {
  const area = new Area((await createLuks('p0', { iterations })).area)
  for (let slot = 1; slot < 8; slot++) {
    const change = await addKeySlot(area.bytes, `p${slot - 1}`, `p${slot}`, { iterations })
    expect(change.slots).toEqual([slot])
    area.apply(change)
  }
  await expect(addKeySlot(area.bytes, 'p0', 'p8', { iterations })).rejects.toMatchObject({ code: 'ERR_NO_SPACE' })
  for (let slot = 0; slot < 8; slot++) expect(await opens(area.bytes, `p${slot}`)).toBe(true)
  area.apply(await eraseKeySlots(area.bytes, { slot: 6 }))
  area.apply(await eraseKeySlots(area.bytes, { passphrase: 'p7' }))
  expect(await Promise.all(['p5', 'p6', 'p7'].map((passphrase) => opens(area.bytes, passphrase)))).toEqual([true, false, false])
  // in the last two slots the header ends across two sectors
  for (const slot of [7, 6]) area.apply(await addKeySlot(area.bytes, 'p0', `q${slot}`, { iterations, slot }))
  expect(await Promise.all(['q6', 'q7'].map((passphrase) => opens(area.bytes, passphrase)))).toEqual([true, true])
})

test('what cannot be is refused', async () => {
  const { area } = await createLuks('a', { iterations })
  await expect(addKeySlot(area, 'wrong', 'b', { iterations })).rejects.toMatchObject({ code: 'ERR_NOT_FOUND' })
  await expect(addKeySlot(area, 'a', 'b', { iterations, slot: 0 })).rejects.toMatchObject({ code: 'ERR_EXISTS' })
  await expect(addKeySlot(area, 'a', 'b', { iterations, slot: 8 })).rejects.toThrow(RangeError)
  await expect(addKeySlot(area, 'a', 'b', { iterations: 0 })).rejects.toThrow(RangeError)
  await expect(eraseKeySlots(area, { slot: 0 })).rejects.toMatchObject({ code: 'ERR_BUSY' })
  await expect(eraseKeySlots(area, { passphrase: 'a' })).rejects.toMatchObject({ code: 'ERR_BUSY' })
  await expect(eraseKeySlots(area, { slot: 3 }, { evenLast: true })).rejects.toMatchObject({ code: 'ERR_NOT_FOUND' })
  await expect(eraseKeySlots(area, { passphrase: 'b' }, { evenLast: true })).rejects.toMatchObject({ code: 'ERR_NOT_FOUND' })
  await expect(eraseKeySlots(area, {} as { slot: number })).rejects.toThrow(TypeError)
  // a free slot whose material would go into that of slot 0
  const hostile = area.slice()
  new DataView(hostile.buffer).setUint32(208 + 48 + 40, 8)
  await expect(addKeySlot(hostile, 'a', 'b', { iterations })).rejects.toMatchObject({ code: 'ERR_FORMAT', field: 'key slot 1' })
})

test('a crash at any point leaves a passphrase that opens the image', async () => {
  // the salt of slot 6 lies in two sectors, all of slot 7 in the second
  for (const slot of process.env['QCOW2_LONG'] === '1' ? [1, 6, 7] : [6]) {
    const area = new Area((await createLuks('a', { iterations })).area)
    const added = await addKeySlot(area.bytes, 'a', 'b', { iterations, slot })
    for (const crashed of area.crashes(added)) expect(await opens(crashed, 'a')).toBe(true)
    area.apply(added)
    for (const replaced of [0, slot]) {
      const change = await addKeySlot(area.bytes, replaced === 0 ? 'a' : 'b', 'c', { iterations, slot: replaced, replace: true })
      const left = replaced === 0 ? 'b' : 'a'
      for (const crashed of area.crashes(change)) {
        expect(await opens(crashed, left)).toBe(true)
        expect((await opens(crashed, 'c')) || (await opens(crashed, replaced === 0 ? 'a' : 'b'))).toBe(true)
      }
    }
    const erased = await eraseKeySlots(area.bytes, { passphrase: 'b' })
    for (const crashed of area.crashes(erased)) expect(await opens(crashed, 'a')).toBe(true)
    // what was the material is gone
    const before = area.bytes.slice()
    area.apply(erased)
    const place = decodeLuksHeader(before).slots[slot]!.keyOffset
    expect(Buffer.compare(before.subarray(place, place + 4096), area.bytes.subarray(place, place + 4096))).not.toBe(0)
  }
})

test('the passphrase of an image is replaced; its content stays', async () => {
  const host = new MemoryDevice(0, { growable: true })
  const image = await Qcow2Image.create(host, { size: 1 << 20, clusterSize: 4096, encryption: { format: 'luks', passphrase: 'old', iterations } })
  await image.write(0, new Uint8Array(8192).fill(3))
  await image.flush()
  const file = new MemoryDevice(host.bytes.slice(), { growable: true })
  expect(await addPassphrase(file, 'old', 'new', { iterations })).toBe(1)
  expect(await erasePassphrase(file, { passphrase: 'old' })).toEqual([0])
  expect((await readImageInfo(file)).luks?.slots.map(({ active }) => active)).toEqual([false, true, ...new Array<boolean>(6).fill(false)])
  const open = (passphrase: string): Promise<Qcow2Image> => Qcow2Image.open(file.bytes.slice(), { readOnly: true, passphrase })
  await expect(open('old')).rejects.toMatchObject({ code: 'ERR_NOT_FOUND' })
  expect([...new Set(await (await open('new')).read(0, 8192))]).toEqual([3])
  await expect(addPassphrase(file, 'new', 'x', { slots: 1 } as object)).rejects.toThrow(TypeError)
  await expect(erasePassphrase(new MemoryDevice(file.bytes, { readOnly: true }), { slot: 1 })).rejects.toMatchObject({ code: 'ERR_READ_ONLY' })
  const plain = new MemoryDevice(0, { growable: true })
  await (await Qcow2Image.create(plain, { size: 512 })).flush()
  await expect(addPassphrase(plain, 'a', 'b')).rejects.toMatchObject({ code: 'ERR_UNSUPPORTED' })
})

describeWithQemu('key slots', (qemu) => {
  const open = (path: string, passphrase: string): Promise<{ code: number }> =>
    qemu.io('--object', `secret,id=s,data=${passphrase}`, '--image-opts', '-c', 'read -P 5 0 64k', `driver=qcow2,encrypt.key-secret=s,file.filename=${path}`)

  test('QEMU opens an image with the passphrases it was given here, and not with those erased', async () => {
    const path = `${tempFolder()}/a.qcow2`
    await qemu.imgOk('create', '-q', '--object', 'secret,id=s,data=one', '-f', 'qcow2', '-o', 'encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10', path, '1M')
    expect(await qemu.io('--object', 'secret,id=s,data=one', '--image-opts', '-c', 'write -P 5 0 64k', `driver=qcow2,encrypt.key-secret=s,file.filename=${path}`)).toMatchObject({ code: 0 })
    expect(await addPassphrase(path, 'one', 'two', { iterations, slot: 6 })).toBe(6)
    expect(await open(path, 'two')).toMatchObject({ code: 0 })
    expect(await open(path, 'one')).toMatchObject({ code: 0 })
    await addPassphrase(path, 'two', 'three', { iterations, slot: 0, replace: true })
    expect(await open(path, 'three')).toMatchObject({ code: 0 })
    expect(await open(path, 'one')).toMatchObject({ code: 1 })
    await erasePassphrase(path, { slot: 6 })
    expect(await open(path, 'two')).toMatchObject({ code: 1 })
    expect(await open(path, 'three')).toMatchObject({ code: 0 })
    expect(await qemu.img('check', '--object', 'secret,id=s,data=three', '--image-opts', `driver=qcow2,encrypt.key-secret=s,file.filename=${path}`)).toMatchObject({ code: 0 })
  })
})
