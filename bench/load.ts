/** The receiving half of a load: puts the pages of a stream where they belong in memory, as an emulator does. */
import { MigrationParser, ramFlag, type RamPagesRecord } from '../src/migration.ts'

/** The guest's memory, block by block. Made once and reused, as an emulator's RAM is there before it loads. */
export class GuestMemory {
  readonly #blocks = new Map<string, Uint8Array>()

  /** Memory for every block that the stream lists. */
  constructor(stream: Uint8Array) {
    const parser = new MigrationParser()
    for (const record of parser.push(stream)) {
      if (record.kind === 'ram-block') this.#blocks.set(record.block.name, new Uint8Array(record.block.length).fill(0xff))
      if (record.kind === 'ram-pages') return
    }
  }

  block(name: string): Uint8Array {
    return this.#blocks.get(name)!
  }

  /** Bytes of all blocks. */
  get length(): number {
    return [...this.#blocks.values()].reduce((sum, block) => sum + block.length, 0)
  }

  /**
   * Writes to every page. Starting a child process makes all memory of this one copy-on-write, and the first write to
   * each page after it a fault: that is no part of a load, and an emulator's memory has it behind itself.
   */
  touch(): void {
    for (const block of this.#blocks.values()) for (let at = 0; at < block.length; at += 4096) block[at] = block[at]!
  }

  store(record: RamPagesRecord): void {
    const memory = this.block(record.block.name)
    const { bytes, count, flags, lengths, pageOffsets, pageSize, positions } = record
    for (let n = 0; n < count; n++) {
      const at = pageOffsets[n]!
      const from = positions[n]!
      if ((flags[n]! & ramFlag.page) !== 0) memory.set(bytes.subarray(from, from + lengths[n]!), at)
      else memory.fill(bytes[from]!, at, at + pageSize)
    }
  }
}

/** Parses the pieces of a stream and stores their pages. Push every piece, then `end`. */
export class Loader {
  readonly #memory: GuestMemory
  readonly #parser = new MigrationParser()

  constructor(memory: GuestMemory) {
    this.#memory = memory
  }

  /** The piece is used up when the call returns. */
  push(piece: Uint8Array): void {
    for (const record of this.#parser.push(piece)) if (record.kind === 'ram-pages') this.#memory.store(record)
  }

  end(): void {
    this.#parser.end()
  }
}
