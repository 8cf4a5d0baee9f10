/**
 * Builds `ram` PART sections page by page into a buffer of its own. Owns the layout of page records;
 * which pages go into a section, and when, is the caller's business.
 *
 * ```
 *  02 | be32 section id
 *     | be64 offset + flags, block name (first record only), 4096 bytes or fill byte   for each page
 *     | be64 0x10 (EOS) | 7e be32 section id
 * ```
 */
import { viewOf } from '../bytes/view.ts'
import { ramFlag, sectionByte } from './format.ts'
import { countedString } from './postcopy.ts'

export { isZero } from '../bytes/zero.ts'

const two32 = 0x1_0000_0000
/** Section head, EOS, footer. */
const framing = 5 + 8 + 5

/** How a `ram` section is written. */
export interface RamPartOptions {
  /** The id that the section's START announced. */
  readonly sectionId: number
  /** Target page size in bytes. */
  readonly pageSize: number
  /** False for machine types up to 2.3, whose sections have no footers. */
  readonly footers: boolean
}

/** The bytes a part with `pages` pages of one block needs at most. */
export function ramPartCapacity(pages: number, pageSize: number): number {
  return framing + 256 + pages * (8 + pageSize)
}

/** One PART section with pages of one RAM block. Begin, add pages in any order, finish. */
export class RamPart {
  readonly #options: RamPartOptions
  readonly #bytes: Uint8Array
  readonly #view: DataView
  #name: Uint8Array = new Uint8Array(0)
  #at = 0
  #continue = 0

  /** `buffer` must hold what is added, see {@link ramPartCapacity}. */
  constructor(buffer: Uint8Array, options: RamPartOptions) {
    this.#bytes = buffer
    this.#view = viewOf(buffer)
    this.#options = options
  }

  /** Forgets what was there and begins a section with pages of `block`. */
  begin(block: string): this {
    this.#name = countedString(block)
    this.#continue = 0
    this.#bytes[0] = sectionByte.part
    this.#view.setUint32(1, this.#options.sectionId)
    this.#at = 5
    return this
  }

  /** True while no page was added. */
  get empty(): boolean {
    return this.#continue === 0
  }

  /** Adds the page at byte `offset` of the block, copied from `source[at]`. */
  page(offset: number, source: Uint8Array, at: number): void {
    const { pageSize } = this.#options
    this.#record(offset, ramFlag.page)
    this.#bytes.set(source.subarray(at, at + pageSize), this.#at)
    this.#at += pageSize
  }

  /** Adds a page of zeroes at byte `offset` of the block. */
  zero(offset: number): void {
    this.#record(offset, ramFlag.zero)
    this.#bytes[this.#at++] = 0
  }

  /** Ends the section; the bytes are a view of the buffer. */
  finish(): Uint8Array {
    this.#view.setUint32(this.#at, 0)
    this.#view.setUint32(this.#at + 4, ramFlag.eos)
    this.#at += 8
    if (this.#options.footers) {
      this.#bytes[this.#at] = sectionByte.footer
      this.#view.setUint32(this.#at + 1, this.#options.sectionId)
      this.#at += 5
    }
    return this.#bytes.subarray(0, this.#at)
  }

  #record(offset: number, flag: number): void {
    this.#view.setUint32(this.#at, Math.floor(offset / two32))
    this.#view.setUint32(this.#at + 4, (offset % two32) + flag + this.#continue)
    this.#at += 8
    if (this.#continue !== 0) return
    this.#bytes.set(this.#name, this.#at)
    this.#at += this.#name.length
    this.#continue = ramFlag.continue
  }
}
