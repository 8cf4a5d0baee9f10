/** The stream the bench moves and QEMU's requests for it. */
import * as fs from 'node:fs'
import { join } from 'node:path'
import { describe, expect, test } from 'vitest'
import { GuestMemory, Loader } from '../../bench/load.ts'
import { qemuReadLength, qemuReadReplay, QemuWriteReplay } from '../../bench/qemu-replay.ts'
import { capturedVmState, enlargedVmState, qemuWriteLengths } from '../../bench/vm-state.ts'
import { tempFolder } from '../support/temp.ts'

const captured = capturedVmState()
const enlarged = enlargedVmState(captured, 20 << 20)
const sum = (values: readonly number[]): number => values.reduce((total, value) => total + value, 0)

describe('the stream', () => {
  test('enlarged by nothing it is the captured one', () => {
    expect(Buffer.compare(enlargedVmState(captured, 0), captured)).toBe(0)
  })

  test('has the pages of the captured one and the new ones behind them', () => {
    const before = new GuestMemory(captured)
    const after = new GuestMemory(enlarged)
    for (const [memory, stream] of [[before, captured], [after, enlarged]] as const) {
      const loader = new Loader(memory)
      for (let at = 0; at < stream.length; at += 10_007) loader.push(stream.subarray(at, at + 10_007))
      loader.end()
    }
    const main = after.block('pc.ram')
    expect(main.length).toBe(24 << 20)
    expect(Buffer.compare(main.subarray(0, 4 << 20), before.block('pc.ram'))).toBe(0)
    const random = main.subarray(4 << 20)
    expect(new Set(random.subarray(0, 4096)).size).toBeGreaterThan(200)
    expect(Buffer.compare(random.subarray(0, 4096), random.subarray(random.length - 4096))).not.toBe(0)
  })

  test('is cut into QEMU’s writes: nearly all 131,328 bytes, none at a sector', () => {
    const lengths = qemuWriteLengths(enlarged)
    expect(sum(lengths)).toBe(enlarged.length)
    // as recorded: the first write ends with the list of RAM blocks
    expect(lengths[0]).toBe(192)
    const typical = lengths.filter((length) => length === 131_328).length
    expect(typical / lengths.length).toBeGreaterThan(0.85)
    expect(lengths).toContain(131_338)
    expect(lengths).toContain(4112)
    let at = 0
    const aligned = lengths.filter((length) => (at += length) % 512 === 0).length
    expect(aligned).toBeLessThan(lengths.length / 20)
  })
})

describe('the replay', () => {
  test.each([
    { direct: true, freshClusters: true },
    { direct: true, freshClusters: false },
    { direct: false, freshClusters: true },
  ])('leaves the stream in the file: %o', (shape) => {
    const file = join(tempFolder(), 'state')
    fs.writeFileSync(file, new Uint8Array(shape.freshClusters ? 0 : enlarged.length + 512).fill(0xee))
    // whole sectors through the page cache: the same requests without the demand on the filesystem
    const fd = fs.openSync(file, 'r+')
    const replay = new QemuWriteReplay(fd, shape)
    let at = 0
    for (const length of qemuWriteLengths(enlarged)) replay.write(enlarged.subarray(at, (at += length)))
    fs.closeSync(fd)
    const content = fs.readFileSync(file)
    expect(Buffer.compare(content.subarray(0, enlarged.length), enlarged)).toBe(0)
    if (shape.freshClusters) expect(content.length % 65_536).toBe(0)
    else expect(content.subarray(enlarged.length).every((byte) => byte === 0xee)).toBe(true)
  })

  test.each([true, false])('reads 28,728 bytes at a time (direct: %s)', (direct) => {
    const file = join(tempFolder(), 'state')
    fs.writeFileSync(file, Buffer.concat([enlarged, new Uint8Array(512)]))
    const fd = fs.openSync(file, 'r')
    const pieces: Buffer[] = []
    for (const piece of qemuReadReplay(fd, enlarged.length, direct)) pieces.push(Buffer.from(piece))
    fs.closeSync(fd)
    expect(pieces.slice(0, -1).every((piece) => piece.length === qemuReadLength)).toBe(true)
    expect(Buffer.compare(Buffer.concat(pieces), enlarged)).toBe(0)
  })
})
