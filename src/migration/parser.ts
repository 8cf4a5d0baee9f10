/**
 * The forward-only parser: fed with chunks of any size, it gives records. Owns the input, how a failure stays, and
 * what may be skipped; what a stream consists of is `framing.ts`. Memory is bounded: one incomplete structure, the
 * list of RAM blocks and section names, and the arrays of one batch.
 */
import { limits } from './format.ts'
import { Framing, type ParserOptions } from './framing.ts'
import { ParserInput, underrun } from './input.ts'
import type { ConfigurationRecord, MigrationRecord, RamBlock } from './records.ts'

/**
 * Takes a stream apart as it arrives.
 *
 * ```ts
 * for await (const chunk of socket) {
 *   for (const record of parser.push(chunk)) …
 * }
 * parser.end()
 * ```
 *
 * Malformed input throws `FormatError` with code `ERR_STREAM`, what this library does not read
 * `UnsupportedError`; after an error every further call throws it again.
 */
export class MigrationParser {
  readonly #input: ParserInput
  readonly #framing: Framing
  #failure: unknown

  constructor(options: ParserOptions = {}) {
    checkPageSize(options.pageSize)
    this.#input = new ParserInput(options.offset ?? 0)
    this.#framing = new Framing(this.#input, options)
  }

  /** The configuration section, once read. */
  get configuration(): ConfigurationRecord | undefined {
    return this.#framing.configuration
  }

  /** The RAM blocks listed so far. */
  get blocks(): readonly RamBlock[] {
    return this.#framing.ram?.blocks ?? []
  }

  /** Id of the `ram` section, once its START was read. */
  get ramSectionId(): number | undefined {
    return this.#framing.sections.idOf('ram')
  }

  /** Target page size in bytes, as far as known by now. */
  get pageSize(): number {
    return this.#framing.pageSize
  }

  /** Stream offset of the first byte that no record covers yet. */
  get offset(): number {
    return this.#input.offset
  }

  /**
   * Gives the parser the next bytes and iterates over the records they complete. The iteration must
   * be finished before the next `push`; `chunk` must not change until then.
   */
  push(chunk: Uint8Array): Iterable<MigrationRecord> {
    if (!this.#input.exhausted && this.#failure === undefined) {
      throw new TypeError('the records of the chunk before were not all taken')
    }
    this.#input.push(chunk)
    return this.#records()
  }

  /**
   * Bytes from `offset` on that are pages or padding of a mapped-ram block; 0 unless all input was
   * consumed. Whoever can seek and does not want them may `skip` them.
   */
  get skippable(): number {
    if (!this.#input.exhausted || this.#input.pending > 0) return 0
    const passage = this.#framing.ram?.passages[0]
    return passage === undefined || passage.of === 'mapped-ram-bitmap' ? 0 : passage.length
  }

  /** Passes over `length` of the {@link skippable} bytes; no record covers them. */
  skip(length: number): void {
    const { skippable } = this
    if (length > skippable) throw new RangeError(`only ${skippable} bytes can be skipped, not ${length}`)
    if (length === 0) return
    this.#framing.ram!.passages[0]!.length -= length
    this.#input.skip(length)
  }

  /** The next record, or undefined when more input is needed. */
  next(): MigrationRecord | undefined {
    if (this.#failure !== undefined) throw this.#failure as Error
    try {
      return this.#next()
    } catch (error) {
      this.#failure = error
      throw error
    }
  }

  /** Tells that the input is over. @throws FormatError if the stream is cut short. */
  end(): void {
    if (this.#failure !== undefined) throw this.#failure as Error
    if (this.#framing.complete && this.#input.pending === 0) return
    this.#failure = this.#framing.truncated()
    throw this.#failure as Error
  }

  *#records(): Generator<MigrationRecord, void, undefined> {
    for (let record = this.next(); record !== undefined; record = this.next()) yield record
  }

  #next(): MigrationRecord | undefined {
    const input = this.#input
    const framing = this.#framing
    for (;;) {
      input.begin()
      if (input.at === input.end) return undefined
      try {
        const record = framing.next()
        if (record === undefined) continue
        if (record !== null) return record
      } catch (error) {
        if (error !== underrun) throw error
      }
      if (!input.refill()) return undefined
    }
  }
}

function checkPageSize(pageSize: number | undefined): void {
  if (pageSize === undefined) return
  if (Math.log2(pageSize) % 1 === 0 && pageSize >= limits.pageSizeMin && pageSize <= limits.pageSizeMax) return
  throw new RangeError(`pageSize must be a power of two from ${limits.pageSizeMin} to ${limits.pageSizeMax}, not ${pageSize}`)
}
