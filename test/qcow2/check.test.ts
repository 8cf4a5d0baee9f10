import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import fc from 'fast-check'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { openFile } from '../../src/block/file.ts'
import { MemoryDevice } from '../../src/block/memory.ts'
import { checkImage } from '../../src/qcow2/check.ts'
import type { CheckReport } from '../../src/qcow2/check-report.ts'
import { Qcow2Image } from '../../src/qcow2/image.ts'
import { repairImage } from '../../src/qcow2/repair.ts'
import { describeWithQemu, type Qemu } from '../support/qemu.ts'
import { damage, damages, makeImages, type Damage } from './damaged-images.ts'

const numRuns = process.env['QCOW2_LONG'] === '1' ? 3000 : 25

/** The numbers of a report under the names qemu-img gives them. */
function asQemu(report: CheckReport): Record<string, number> {
  return {
    'check-errors': report.checkErrors,
    corruptions: report.corruptions,
    leaks: report.leaks,
    'image-end-offset': report.imageEndOffset,
    'total-clusters': report.totalClusters,
    'allocated-clusters': report.allocatedClusters,
    'fragmented-clusters': report.fragmentedClusters,
    'compressed-clusters': report.compressedClusters,
  }
}

interface QemuCheck {
  code: number
  /** Undefined where qemu-img gave up. */
  report: Record<string, number> | undefined
  stderr: string
}

/**
 * A repair by qemu-img punches holes where it frees clusters. A damaged table that reaches past the end of the
 * file is walked but not counted, so such a hole may lie in it and hide what is wrong: no discards here.
 */
async function qemuCheck(qemu: Qemu, path: string, ...options: string[]): Promise<QemuCheck> {
  const image = `driver=qcow2,discard=ignore,file.driver=file,file.discard=ignore,file.filename=${path}`
  const { code, stdout, stderr } = await qemu.img('check', ...options, '--output=json', '--image-opts', image)
  const names = Object.keys(asQemu(empty))
  const parsed = stdout.trim() === '' ? undefined : (JSON.parse(stdout) as Record<string, number>)
  const report = parsed === undefined ? undefined : Object.fromEntries(names.map((name) => [name, parsed[name] ?? 0]))
  return { code, report, stderr }
}

const empty: CheckReport = {
  checkErrors: 0,
  corruptions: 0,
  leaks: 0,
  corruptionsFixed: 0,
  leaksFixed: 0,
  imageEndOffset: 0,
  totalClusters: 0,
  allocatedClusters: 0,
  fragmentedClusters: 0,
  compressedClusters: 0,
  overlaps: 0,
  findings: [],
}

/** What only we report: a flag that version 2 lacks makes every read of the cluster fail. */
const zeroFlagInV2 = (report: CheckReport): boolean => report.findings.some(({ message }) => message.includes('version 2 does not have'))
/** qemu-img gives up here; we go on. */
const gaveUp = /Too much extra|I\/O error in|Cannot allocate memory|Invalid argument|size too large|Invalid snapshot/

describeWithQemu('check', (qemu) => {
  const folder = mkdtempSync(join(tmpdir(), 'qcow2-check-'))
  let images = new Map<string, Uint8Array>()
  beforeAll(async () => {
    images = await makeImages(qemu, folder)
  }, 60_000)
  afterAll(() => rmSync(folder, { recursive: true, force: true }))

  const anyDamage = fc.tuple(fc.nat(), damages)
  /** A snapshot's L1 table that claims to go on past the end of the file, over an L2 table that has leaked. */
  const longL1Table: Damage[] = [
    { region: 1289193371, position: 211629241, how: 'flip bit', value: 982966074 },
    { region: 0, position: 0, how: 'zero', value: 0 },
  ]
  /** An L1 table at the very end of the file, where new refcount blocks would go, and no header's cluster counted. */
  const tableAtEnd: Damage[] = [
    { region: 750553654, position: 0, how: 'other cluster', value: 1329585016 },
    { region: 0, position: 0, how: 'zero', value: 0 },
  ]
  /** An L1 entry that names a cluster of something else. */
  const dataAsTable: Damage[] = [{ region: 1789776385, position: 0, how: 'other cluster', value: 1441602244 }]
  /** A snapshot's L1 table whose offset is a multiple of the cluster size but for its last bit, 2^63 away from it. */
  const farL1Table: Damage[] = [
    { region: 1905177005, position: 27756761, how: 'zero', value: 0 },
    { region: 492990957, position: 0, how: 'other cluster', value: 1324204295 },
  ]
  /** A COPIED flag, and a snapshot without the extra data of version 3: the one can be repaired without the other. */
  const flagAndTable: Damage[] = [
    { region: 0, position: 0, how: 'flip COPIED', value: 0 },
    { region: 1008242631, position: 480290853, how: 'zero', value: 0 },
  ]
  const damagedBy = (which: number, list: readonly Damage[]): Uint8Array => damage([...images.values()][which % images.size]!, list)

  test('sound images: every number equals qemu-img, nothing is found', async () => {
    expect(images.size).toBe(6)
    for (const [name, bytes] of images) {
      const path = `${folder}/sound.qcow2`
      writeFileSync(path, bytes)
      const report = await checkImage(new MemoryDevice(bytes))
      expect({ name, ...asQemu(report) }).toEqual({ name, ...(await qemuCheck(qemu, path)).report })
      expect(report.findings).toEqual([])
      await using file = await openFile(path, { readOnly: true })
      expect(await checkImage(file)).toEqual(report)
    }
  })

  test('damaged images: every number equals qemu-img', async () => {
    await fc.assert(
      fc.asyncProperty(anyDamage, async ([which, list]) => {
        const bytes = damagedBy(which, list)
        const path = `${folder}/damaged.qcow2`
        writeFileSync(path, bytes)
        const theirs = await qemuCheck(qemu, path)
        const ours = await checkImage(new MemoryDevice(bytes), { maxFindings: 1e6 }).catch((error: unknown) => String(error))
        if (theirs.report === undefined && gaveUp.test(theirs.stderr)) return
        if (typeof ours === 'string') {
          expect(theirs.report, ours).toBeUndefined()
          return
        }
        // with unreadable refcount blocks QEMU's later passes stop early
        if (zeroFlagInV2(ours) || ours.checkErrors > 0) return
        expect(asQemu(ours)).toEqual(theirs.report)
      }),
      { numRuns, examples: [[[23480792, farL1Table]]] },
    )
  }, 600_000)

  test.each(['leaks', 'all'] as const)('after our repair (%s) qemu-img finds no more than after its own', async (repair) => {
    await fc.assert(
      fc.asyncProperty(anyDamage, async ([which, list]) => {
        const bytes = damagedBy(which, list)
        const [ourPath, theirPath] = [`${folder}/ours.qcow2`, `${folder}/theirs.qcow2`]
        writeFileSync(theirPath, bytes)
        const theirs = await qemuCheck(qemu, theirPath, '-r', repair)
        const device = new MemoryDevice(bytes.slice(), { growable: true })
        const ours = await repairImage(device, { repair, maxFindings: 1e6 }).catch((error: unknown) => String(error))
        if (typeof ours === 'string') {
          // a number beyond 2^53 in a table that has to be rewritten; a length that QEMU takes for its word, and reads names from far behind
          if (!ours.includes('exceeds 2^53') && !ours.includes('behind the start of the table')) expect(theirs.code, ours).toBe(1)
          return
        }
        if (repair === 'leaks' && ours.findings.some(({ structure }) => structure === 'snapshot table') && ours.checkErrors > 0) {
          // QEMU frees what a snapshot holds whose L1 table it cannot find
          expect(Buffer.compare(device.bytes, bytes)).toBe(0)
          return
        }
        writeFileSync(ourPath, await device.read(0, device.size))
        const verdict = await qemuCheck(qemu, ourPath)
        if (theirs.report === undefined || verdict.report === undefined) return
        // what we say is left is what QEMU sees
        if (!zeroFlagInV2(ours) && ours.checkErrors === 0) expect(asQemu(ours)).toEqual(verdict.report)
        // what something names past the end of the file keeps its counter here: a table cut off by the end is still there
        const named = ours.findings.some(({ problem }) => problem === 'past end of file')
        if (!named) expect(verdict.report['leaks']).toBeLessThanOrEqual(theirs.report['leaks']!)
        // what is a table and something else is left alone here: QEMU would patch flags into the other
        if (ours.overlaps === 0) expect(verdict.report['corruptions']).toBeLessThanOrEqual(theirs.report['corruptions']!)
      }),
      { numRuns: Math.ceil(numRuns / 2), examples: [[[2, longL1Table]], [[979159796, tableAtEnd]], [[17, flagAndTable]], [[1124694803, dataAsTable]]] },
    )
  }, 600_000)

  test('a repair changes no byte of a sound image', async () => {
    for (const bytes of images.values()) {
      const device = new MemoryDevice(bytes.slice())
      const report = await repairImage(device, { repair: 'all' })
      expect(report).toMatchObject({ corruptionsFixed: 0, leaksFixed: 0, findings: [] })
      expect(Buffer.compare(await device.read(0, device.size), bytes)).toBe(0)
    }
  })

  test('an image left dirty by lazy refcounts is repaired, and its dirty bit cleared', async () => {
    const path = `${folder}/lazy.qcow2`
    await qemu.imgOk('create', '-q', '-f', 'qcow2', '-o', 'lazy_refcounts=on,cluster_size=4096', path, '1M')
    // the process ends without closing the image
    await qemu.io('-c', 'write -P 5 0 64k', '-c', 'abort', path)
    const before = readFileSync(path)
    expect(before[79]).toBe(1)
    const device = new MemoryDevice(Uint8Array.from(before), { growable: true })
    expect(await checkImage(device)).toMatchObject({ corruptions: (await qemuCheck(qemu, path)).report!['corruptions'] })
    expect(await repairImage(device, { repair: 'leaks' })).toMatchObject({ checkErrors: 1 })
    const report = await repairImage(device, { repair: 'all' })
    expect(report).toMatchObject({ corruptions: 0, leaks: 0 })
    expect(report.corruptionsFixed).toBeGreaterThan(0)
    const after = await device.read(0, device.size)
    expect(after[79]).toBe(0)
    writeFileSync(path, after)
    expect(await qemuCheck(qemu, path)).toMatchObject({ code: 0 })
    expect(await qemu.io('-r', '-c', 'read -P 5 0 64k', path)).toMatchObject({ code: 0 })
  })

  test('a damaged offset without data is dropped: the guest reads what it read, zeroes and the backing file', async () => {
    const [base, path] = [`${folder}/below.raw`, `${folder}/offset.qcow2`]
    writeFileSync(base, Buffer.alloc(128 << 10, 0xff))
    await qemu.imgOk('create', '-q', '-f', 'qcow2', '-o', 'extended_l2=on', '-b', base, '-F', 'raw', path)
    await qemu.io('-c', 'write -P 1 4k 2k', '-c', 'write -z 4k 2k', path)
    const bytes = readFileSync(path)
    const l2 = Number(bytes.readBigUInt64BE(Number(bytes.readBigUInt64BE(40))) & 0x00ff_ffff_ffff_fe00n)
    bytes[l2 + 6] = bytes[l2 + 6]! | 2
    const device = new MemoryDevice(Uint8Array.from(bytes), { growable: true })
    expect(await repairImage(device, { repair: 'all' })).toMatchObject({ corruptions: 0, leaks: 0 })
    writeFileSync(path, await device.read(0, device.size))
    expect(await qemuCheck(qemu, path)).toMatchObject({ code: 0 })
    const { code, stdout } = await qemu.io('-r', '-c', 'read -P 0xff 0 4k', '-c', 'read -P 0 4k 2k', '-c', 'read -P 0xff 6k 122k', path)
    expect({ code, failed: stdout.includes('failed') }).toEqual({ code: 0, failed: false })
  })

  test('a snapshot table QEMU refuses is rewritten', async () => {
    const bytes = Buffer.from(images.get('4 KiB clusters, two snapshots')!)
    const table = Number(bytes.readBigUInt64BE(64))
    // 8 bytes of extra data where version 3 demands 16: the 16 bytes cut off become the end of the name
    bytes.writeUInt32BE(8, table + 36)
    bytes.writeUInt16BE(bytes.readUInt16BE(table + 14) + 16, table + 14)
    const device = new MemoryDevice(Uint8Array.from(bytes), { growable: true })
    expect(await checkImage(device)).toMatchObject({ corruptions: 1 })
    expect(await repairImage(device, { repair: 'all' })).toMatchObject({ corruptions: 0, leaks: 0 })
    const path = `${folder}/table.qcow2`
    writeFileSync(path, await device.read(0, device.size))
    expect(await qemuCheck(qemu, path)).toMatchObject({ code: 0 })
    expect(JSON.parse(await qemu.imgOk('info', '--output=json', path))).toMatchObject({ snapshots: [{}, { id: '2', name: 's2' }] })
  })
})

test('snapshots past the limits of their table are found, told by name, and dropped', async () => {
  const device = new MemoryDevice(0, { growable: true })
  const image = await Qcow2Image.create(device, { size: 1 << 20, version: 2 })
  await image.flush()
  const bytes = Buffer.from(await device.read(0, device.size))
  bytes.writeUInt32BE(65539, 60)
  bytes.writeBigUInt64BE(1n << 20n, 64)
  const large = new MemoryDevice(new Uint8Array(4 << 20), { growable: true })
  await large.write(0, bytes)
  const tooMany = { problem: 'too many snapshots', value: 3 }
  expect(await checkImage(large, { maxFindings: 1 })).toMatchObject({ findings: [tooMany] })
  const before = large.bytes.slice()
  expect(await repairImage(large, { repair: 'leaks' })).toMatchObject({ checkErrors: 1, corruptionsFixed: 0, leaksFixed: 0 })
  expect(Buffer.compare(large.bytes, before)).toBe(0)
  expect(await repairImage(large, { repair: 'all' })).toMatchObject({ corruptions: 0, leaks: 0, corruptionsFixed: expect.any(Number) as number })
  await using opened = await Qcow2Image.open(large, { readOnly: true })
  expect(opened.snapshots.count).toBe(65536)
})

test('a record of a length nobody would write drops no snapshot', async () => {
  const device = new MemoryDevice(0, { growable: true })
  const image = await Qcow2Image.create(device, { size: 1 << 20 })
  for (const name of ['a', 'b']) await image.snapshots.create({ name })
  await image.flush()
  const bytes = device.bytes.slice()
  const view = new DataView(bytes.buffer)
  view.setUint32(Number(view.getBigUint64(64)) + 36, 0x4000_0000)
  const damaged = new MemoryDevice(bytes.slice(), { growable: true })
  for (const repair of ['leaks', 'all'] as const) await expect(repairImage(damaged, { repair })).rejects.toMatchObject({ code: 'ERR_FORMAT', structure: 'snapshot table' })
  expect(Buffer.compare(damaged.bytes, bytes)).toBe(0)
})

test.each([{ at: 6, value: 0x02 }, { at: 8, value: 0x10 }])('an image is as good as before when the L1 table of a snapshot is lost ($at)', async ({ at, value }) => {
  const device = new MemoryDevice(0, { growable: true })
  const image = await Qcow2Image.create(device, { size: 1 << 20 })
  await image.write(0, new Uint8Array(100_000).fill(1))
  await image.snapshots.create({ name: 'whole' })
  await image.write(0, new Uint8Array(100_000).fill(2))
  await image.snapshots.create({ name: 'lost' })
  await image.flush()
  const bytes = device.bytes.slice()
  const second = Number(new DataView(bytes.buffer).getBigUint64(64)) + 72
  bytes[second + at] = value
  const damaged = new MemoryDevice(bytes.slice(), { growable: true })
  // `leaks` must not free what the lost table named
  expect(await repairImage(damaged, { repair: 'leaks' })).toMatchObject({ checkErrors: 1, leaksFixed: 0 })
  expect(Buffer.compare(damaged.bytes, bytes)).toBe(0)
  const opened = await Qcow2Image.open(damaged)
  const lost = { code: 'ERR_FORMAT', structure: 'snapshot table' }
  await expect(opened.snapshots.open('lost')).rejects.toMatchObject(lost)
  await expect(opened.snapshots.apply('lost')).rejects.toMatchObject(lost)
  await expect(opened.snapshots.delete('lost')).rejects.toMatchObject(lost)
  await opened.write(0, new Uint8Array(100_000).fill(3))
  await opened.snapshots.create({ name: 'third' })
  const whole = await opened.snapshots.open('whole')
  expect(new Set(await whole.read(0, 100_000))).toEqual(new Set([1]))
  await whole.close()
  await opened.snapshots.delete('whole')
  await opened.flush()
  // set right again, the snapshot still has what it held
  const after = damaged.bytes.slice()
  const table = Number(new DataView(after.buffer).getBigUint64(64))
  after[table + at] = new Uint8Array(device.bytes)[second + at]!
  const mended = await Qcow2Image.open(new MemoryDevice(after), { readOnly: true })
  const found = await mended.snapshots.open('lost')
  expect(new Set(await found.read(0, 100_000))).toEqual(new Set([2]))
  // the last flush freed a cluster whose counter the next one lowers
  expect(await checkImage(new MemoryDevice(after))).toMatchObject({ corruptions: 0, checkErrors: 0 })
})

/** A header, a refcount table and block, an L1 and an L2 table with one entry each: clusters 0 to 4 of 512 bytes. */
function tinyImage(l1Entry: bigint, l2Entry: bigint, refcounts: readonly number[]): MemoryDevice {
  const bytes = Buffer.alloc(5 * 512)
  bytes.writeUInt32BE(0x514649fb, 0)
  bytes.writeUInt32BE(3, 4)
  bytes.writeUInt32BE(9, 20)
  bytes.writeBigUInt64BE(512n, 24)
  bytes.writeUInt32BE(1, 36)
  bytes.writeBigUInt64BE(1536n, 40)
  bytes.writeBigUInt64BE(512n, 48)
  bytes.writeUInt32BE(1, 56)
  bytes.writeUInt32BE(4, 96)
  bytes.writeUInt32BE(104, 100)
  bytes.writeBigUInt64BE(1024n, 512)
  refcounts.forEach((count, cluster) => bytes.writeUInt16BE(count, 1024 + cluster * 2))
  bytes.writeBigUInt64BE(l1Entry, 1536)
  bytes.writeBigUInt64BE(l2Entry, 2048)
  return new MemoryDevice(Uint8Array.from(bytes), { growable: true })
}

const copied = 1n << 63n

test('metadata that data overwrote is reported as an overlap, which counting alone would not show', async () => {
  // the only L2 entry names the refcount block
  const report = await checkImage(tinyImage(2048n | copied, 1024n, [1, 1, 2, 1, 1]))
  expect(report).toMatchObject({ overlaps: 1, leaks: 0 })
  expect(report.findings.map(({ message }) => message)).toContain('cluster 2 is claimed by guest data and a refcount block')
})

test('guest data that a compressed cluster shares is no damage while the counter is right', async () => {
  // the second L2 entry: 512 bytes of compressed data in the cluster that the first has as data
  const device = tinyImage(2048n | copied, 2560n, [1, 1, 1, 1, 1, 2])
  const entry = Buffer.alloc(8)
  entry.writeBigUInt64BE((1n << 62n) | 2560n)
  await device.write(2056, entry)
  await device.writeZeroes(2560, 512)
  await device.write(24, Uint8Array.of(0, 0, 0, 0, 0, 0, 4, 0))
  expect(await checkImage(device)).toMatchObject({ corruptions: 0, overlaps: 0, leaks: 0, findings: [] })
})

test('a finding about a COPIED flag tells the entry, its index in the L1 table and the refcount', async () => {
  const { findings } = await checkImage(tinyImage(2048n, 1024n | copied, [1, 1, 2, 1, 1]))
  const flags = findings.filter(({ flag }) => flag === 'COPIED')
  expect(flags).toMatchObject([
    { kind: 'corruption', structure: 'L1 entry', offset: 1536, entry: '0000000000000800', index: 0, found: 1 },
    { kind: 'corruption', structure: 'L2 entry', offset: 2048, entry: '8000000000000400', found: 2 },
  ])
  expect(flags[1]!.index).toBeUndefined()
})

test('offsets past 2^53 are told in hexadecimal, because a number has lost digits there', async () => {
  const { findings } = await checkImage(tinyImage(2048n | copied, (1n << 55n) | copied, [1, 1, 1, 1, 1]))
  expect(findings.map(({ message }) => message)).toContain('512 bytes at 0x80000000000000 are in use, but the file ends at 2560')
})

test('hostile sizes cost an error, not memory', async () => {
  const header = Buffer.alloc(512)
  header.writeUInt32BE(0x514649fb, 0)
  header.writeUInt32BE(3, 4)
  header.writeUInt32BE(9, 20)
  header.writeUInt32BE(4, 96)
  header.writeUInt32BE(104, 100)
  header.writeBigUInt64BE(512n, 48)
  header.writeUInt32BE(1, 56)
  const check = (change: (bytes: Buffer) => void): Promise<CheckReport> => {
    const bytes = Buffer.from(header)
    change(bytes)
    return checkImage(new MemoryDevice(Uint8Array.from(bytes)))
  }
  await expect(check((bytes) => bytes.writeUInt32BE(0xffffffff, 36))).rejects.toMatchObject({ code: 'ERR_FORMAT' })
  await expect(check((bytes) => bytes.writeUInt32BE(0xffffffff, 56))).rejects.toMatchObject({ code: 'ERR_FORMAT' })
  const before = process.memoryUsage().arrayBuffers
  expect((await check((bytes) => bytes.writeUInt32BE(0xffffffff, 60)).catch((error: unknown) => error))).toBeDefined()
  expect(process.memoryUsage().arrayBuffers - before).toBeLessThan(256 << 20)
})

test('a repair refuses an image whose data file bit is set by damage: its data would be leaks', async () => {
  const device = new MemoryDevice(0, { growable: true })
  await using image = await Qcow2Image.create(device, { size: 1 << 20 })
  await image.write(0, new Uint8Array(65536).fill(1))
  await image.flush()
  const bytes = new Uint8Array(await device.read(0, device.size))
  bytes[79] = bytes[79]! | 4
  for (const repair of ['leaks', 'all'] as const) {
    const damaged = new MemoryDevice(bytes.slice(), { growable: true })
    await expect(repairImage(damaged, { repair })).rejects.toMatchObject({ code: 'ERR_FORMAT', field: 'incompatible_features' })
    expect(Buffer.compare(await damaged.read(0, damaged.size), bytes)).toBe(0)
  }
})
