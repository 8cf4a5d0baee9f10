/**
 * VM state as QEMU produces it, and the requests QEMU makes of it. Owns the enlarging of a captured
 * stream and the rules by which QEMU cuts a stream into writes; does no I/O.
 */
import { randomFillSync } from 'node:crypto'
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { gunzipSync } from 'node:zlib'
import { encodeRecord, MigrationParser, ramFlag, type MigrationRecord, type RamBlock } from '../src/migration.ts'

const pageSize = 4096
/** Pages in one section: QEMU 7.2 and 10.0 end a section after about 8 MiB, one page into its next write. */
const pagesPerSection = 62 * 32 + 1

/** A real VM state: a 4 MiB guest saved by QEMU 10.0's own savevm. */
export function capturedVmState(): Uint8Array {
  return gunzipSync(readFileSync(join(import.meta.dirname, '../test/fixtures/captures/qemu100-savevm.vmstate.gz')))
}

/**
 * The captured stream with `extra` bytes more of main memory, all of it random: the same header, machine
 * and device sections around a longer RAM section, cut into sections as QEMU cuts it.
 */
export function enlargedVmState(captured: Uint8Array, extra: number): Uint8Array {
  const pages = Math.ceil(extra / pageSize)
  const main = 'pc.ram'
  const parts: Uint8Array[] = []
  let ramId = -1
  let at = 0
  for (const record of parse(captured)) {
    if (record.kind === 'section' && record.type === 'start' && record.idstr === 'ram') ramId = record.id
    if (record.kind === 'section' && record.type === 'end' && record.id === ramId) parts.push(ramSections(ramId, main, at / pageSize, pages))
    if (record.kind === 'ram-size') parts.push(encodeRecord({ ...record, total: record.total + pages * pageSize }))
    else if (record.kind === 'ram-block' && record.block.name === main) {
      at = record.block.length
      parts.push(encodeRecord({ ...record, block: { ...record.block, length: at + pages * pageSize } }))
    } else parts.push(encodeRecord(record))
  }
  return Buffer.concat(parts)
}

/** PART sections of `count` raw pages of a block from page `first` on. */
function ramSections(id: number, name: string, first: number, count: number): Uint8Array {
  const sections = Math.ceil(count / pagesPerSection)
  const named = count === 0 ? 0 : 1 + name.length
  const bytes = new Uint8Array(count * (8 + pageSize) + named + sections * (5 + 8 + 5))
  const view = new DataView(bytes.buffer)
  let at = 0
  for (let page = 0; page < count; page++) {
    if (page % pagesPerSection === 0) {
      view.setUint8(at, 2)
      view.setUint32(at + 1, id)
      at += 5
    }
    const flag = ramFlag.page + (page === 0 ? 0 : ramFlag.continue)
    const offset = (first + page) * pageSize + flag
    view.setUint32(at, Math.floor(offset / 2 ** 32))
    view.setUint32(at + 4, offset % 2 ** 32)
    at += 8
    if (page === 0) {
      bytes.set([name.length, ...Buffer.from(name)], at)
      at += named
    }
    randomFillSync(bytes, at, pageSize)
    at += pageSize
    if (page % pagesPerSection === pagesPerSection - 1 || page === count - 1) {
      view.setUint32(at + 4, ramFlag.eos)
      view.setUint8(at + 8, 0x7e)
      view.setUint32(at + 9, id)
      at += 13
    }
  }
  return bytes
}

/**
 * The lengths of the writes in which QEMU 7.2 and 10.0 hand a stream to the block layer. QEMU collects
 * small pieces in a buffer of 32 KiB and takes guest pages by reference; it writes when 64 pieces are
 * collected, when the buffer is full, and at the end of each section's RAM. 64 pieces are mostly
 * 32 headers of 8 bytes and 32 pages: 131,328 bytes.
 */
export function qemuWriteLengths(stream: Uint8Array): number[] {
  const writes = new WriteCutter()
  for (const record of parse(stream)) {
    if (record.kind === 'ram-pages') {
      for (let n = 0; n < record.count; n++) {
        const named = (record.flags[n]! & ramFlag.continue) === 0 ? 1 + nameLength(record.block) : 0
        if ((record.flags[n]! & ramFlag.page) !== 0) {
          writes.small(8 + named)
          writes.page(record.lengths[n]!)
        } else writes.small(8 + named + record.lengths[n]!)
      }
    } else {
      writes.small(record.length)
      if (record.kind === 'ram-mark' && record.mark === 'eos') writes.cut()
    }
  }
  writes.cut()
  return writes.lengths
}

function nameLength(block: RamBlock): number {
  return Buffer.byteLength(block.name)
}

function* parse(stream: Uint8Array): Generator<MigrationRecord> {
  const parser = new MigrationParser()
  yield* parser.push(stream)
  parser.end()
}

/** QEMU's output buffer, as far as it decides where one write ends. */
class WriteCutter {
  readonly lengths: number[] = []
  #length = 0
  #pieces = 0
  #buffered = 0
  /** The last piece lies in the buffer and grows with the next small bytes. */
  #open = false

  small(length: number): void {
    for (let rest = length; rest > 0; ) {
      const taken = Math.min(rest, 32_768 - this.#buffered)
      this.#buffered += taken
      this.#length += taken
      rest -= taken
      if (!this.#open) this.#pieces++
      this.#open = true
      if (this.#pieces === 64 || this.#buffered === 32_768) this.cut()
    }
  }

  page(length: number): void {
    this.#length += length
    this.#pieces++
    this.#open = false
    if (this.#pieces === 64) this.cut()
  }

  cut(): void {
    if (this.#length > 0) this.lengths.push(this.#length)
    this.#length = this.#pieces = this.#buffered = 0
    this.#open = false
  }
}
