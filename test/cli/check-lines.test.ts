/** What check and amend say of damaged images, line by line beside the real qemu-img. */
import { copyFileSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { expect, test } from 'vitest'
import { describeWithQemu, type Qemu } from '../support/qemu.ts'
import { tempFolder } from '../support/temp.ts'
import { run } from './run.ts'

const cluster = 65536

/** An image as qemu-img makes it (header, refcount table, refcount block, L1), and what is done to its bytes. */
interface Damage {
  readonly title: string
  readonly options?: string
  /** Before the damage, by qemu-img and qemu-io. */
  readonly prepare?: (qemu: Qemu, path: string) => Promise<unknown>
  readonly damage: (image: Buffer) => Buffer
  /** qemu-img takes its time for it. */
  readonly long?: true
}

const l2At = (image: Buffer): number => Number(image.readBigUInt64BE(Number(image.readBigUInt64BE(40))) & 0x00ff_ffff_ffff_fe00n)
const written = async (qemu: Qemu, path: string): Promise<unknown> => qemu.io('-c', 'write -P 1 0 128k', path)

/** A snapshot table of `count` records at 1 MiB, and clusters of the file from 14 on counted. */
function withSnapshots(image: Buffer, count: number, record: Buffer): Buffer {
  const at = 1 << 20
  const table = Buffer.concat(Array.from({ length: count }, () => record))
  const grown = Buffer.alloc(Math.ceil((at + table.length) / cluster) * cluster)
  image.copy(grown)
  table.copy(grown, at)
  grown.writeUInt32BE(count, 60)
  grown.writeBigUInt64BE(BigInt(at), 64)
  const block = Number(grown.readBigUInt64BE(Number(grown.readBigUInt64BE(48))))
  for (let counted = 14; counted < grown.length / cluster; counted++) grown.writeUInt16BE(1, block + 2 * counted)
  // the last snapshot has an L1 table, cluster 14, and an L2 table, cluster 15
  const last = at + table.length - record.length
  grown.writeBigUInt64BE(BigInt(14 * cluster), last)
  grown.writeUInt32BE(1, last + 8)
  grown.writeBigUInt64BE(0x8000_0000_0000_0000n + BigInt(15 * cluster), 14 * cluster)
  return grown
}

function record(extraData: number, text = 0): Buffer {
  const bytes = Buffer.alloc(Math.ceil((40 + extraData + 2 * text) / 8) * 8)
  bytes.writeUInt16BE(text, 12)
  bytes.writeUInt16BE(text, 14)
  bytes.writeUInt32BE(extraData, 36)
  return bytes
}

const damages: readonly Damage[] = [
  { title: 'a cluster in use that is not counted', prepare: written, damage: (image) => (image.writeUInt16BE(0, 2 * cluster + 2 * 5), image) },
  { title: 'a leaked cluster', damage: (image) => (image.writeUInt16BE(1, 2 * cluster + 2 * 40), image) },
  {
    title: 'a data cluster that is not aligned',
    prepare: written,
    damage: (image) => (image.writeBigUInt64BE(image.readBigUInt64BE(l2At(image)) + 512n, l2At(image)), image),
  },
  {
    title: 'a zero cluster with a place that is not aligned',
    prepare: written,
    damage: (image) => (image.writeBigUInt64BE(image.readBigUInt64BE(l2At(image)) + 513n, l2At(image)), image),
  },
  {
    title: 'a reference past the end of the file',
    prepare: written,
    damage: (image) => (image.writeBigUInt64BE(0x8000_8000_0000_0000n, l2At(image)), image),
  },
  { title: 'reserved bits of an L2 entry', prepare: written, damage: (image) => (image.writeUInt8(image[l2At(image) + 7]! | 0x10, l2At(image) + 7), image) },
  { title: 'reserved bits of an L1 entry', prepare: written, damage: (image) => (image.writeUInt8(0x90, Number(image.readBigUInt64BE(40))), image) },
  { title: 'COPIED of a compressed cluster', prepare: (qemu, path) => qemu.io('-c', 'write -c -P 1 0 64k', path), damage: (image) => (image.writeUInt8(image[l2At(image)]! | 0x80, l2At(image)), image) },
  {
    title: 'a subcluster without a cluster',
    options: 'compat=1.1,extended_l2=on',
    prepare: written,
    damage: (image) => (image.writeUInt8(1, l2At(image) + 5 * 16 + 15), image),
  },
  { title: 'snapshots without extra data', options: 'compat=1.1', damage: (image) => withSnapshots(image, 3, record(0)) },
  { title: 'too many snapshots', long: true, options: 'compat=0.10', damage: (image) => withSnapshots(image, 65539, record(0)) },
  { title: 'snapshots past the end of their table', damage: (image) => withSnapshots(image, 509, record(1024, 65535)) },
  { title: 'a snapshot with too much extra data', damage: (image) => withSnapshots(image, 1, record(2000)) },
]

describeWithQemu('check and its repairs, line by line', (qemu) => {
  if (qemu.major < 10) {
    test.skip('the lines of qemu-img 10.0 are compared', () => undefined)
    return
  }

  async function both(args: readonly string[], path: string): Promise<unknown[]> {
    const copy = `${path}.ours`
    copyFileSync(path, copy)
    const theirs = await qemu.img(...args, path)
    const { code, stdout, stderr } = await run([...args, copy], { program: 'qemu-img' })
    const named = (text: string): string => text.replaceAll(copy, path)
    copyFileSync(copy, path)
    return [{ code, stdout: named(stdout), stderr: named(stderr) }, theirs]
  }

  test.each(damages.filter((each) => each.long !== true || process.env['QCOW2_LONG'] === '1'))('$title', async ({ options = 'compat=1.1', prepare, damage }) => {
    const path = join(tempFolder(), 'disk.qcow2')
    await qemu.imgOk('create', '-q', '-f', 'qcow2', '-o', options, path, '8M')
    await prepare?.(qemu, path)
    writeFileSync(path, damage(readFileSync(path)))
    for (const args of [['check'], ['info'], ['check', '-r', 'all'], ['check'], ['info']]) {
      const [ours, theirs] = await both(args, path)
      // of `info` only what keeps the image from being opened
      if (args[0] === 'check' || (theirs as { code: number }).code !== 0) expect(ours, args.join(' ')).toEqual(theirs)
    }
  })

  test('an image that was left dirty is repaired, and that is told, before it is amended', async () => {
    const path = join(tempFolder(), 'disk.qcow2')
    await qemu.imgOk('create', '-q', '-f', 'qcow2', '-o', 'lazy_refcounts=on', path, '64M')
    await qemu.io('-c', 'write -P 1 0 128k', '-c', 'flush', '-c', 'abort', path)
    expect(readFileSync(path)[79]).toBe(1)
    const [ours, theirs] = await both(['amend', '-o', 'compat=0.10'], path)
    expect(ours).toEqual(theirs)
    expect((ours as { stderr: string }).stderr).toContain('Rebuilding refcount structure\n')
  })
})
