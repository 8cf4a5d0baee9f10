/** Which bytes of a request were answered. Owns the rule that none is answered twice; knows no protocol. */

/** More separate ranges than any server has under way: keeping them would cost more than the bytes. */
const maxRanges = 16_384

/** Ranges within `[0, length)` that were added, neighbours joined. */
export class Coverage {
  readonly #length: number
  /** Start and end of each range, in order and apart from each other. */
  readonly #bounds: number[] = []

  constructor(length: number) {
    this.#length = length
  }

  /** True once every byte was added. */
  get complete(): boolean {
    return this.#length === 0 || (this.#bounds.length === 2 && this.#bounds[0] === 0 && this.#bounds[1] === this.#length)
  }

  /** Bytes added so far. */
  get bytes(): number {
    let sum = 0
    for (let at = 0; at < this.#bounds.length; at += 2) sum += this.#bounds[at + 1]! - this.#bounds[at]!
    return sum
  }

  /** Adds a range; false, and nothing is added, if it is empty, reaches outside, has a byte that is there already, or is one range too many. */
  add(start: number, length: number): boolean {
    const end = start + length
    if (length <= 0 || start < 0 || end > this.#length) return false
    const at = this.#firstAfter(start)
    const before = at > 0 ? this.#bounds[at - 1]! : -1
    const after = at < this.#bounds.length ? this.#bounds[at]! : Infinity
    if (before > start || after < end) return false
    const joins = { before: before === start, after: after === end }
    if (joins.before && joins.after) this.#bounds.splice(at - 1, 2)
    else if (joins.before) this.#bounds[at - 1] = end
    else if (joins.after) this.#bounds[at] = start
    else if (this.#bounds.length >= 2 * maxRanges) return false
    else this.#bounds.splice(at, 0, start, end)
    return true
  }

  /** Index of the first range's start that is not before `start`, found by halving. */
  #firstAfter(start: number): number {
    let low = 0
    for (let high = this.#bounds.length / 2; low < high; ) {
      const middle = (low + high) >>> 1
      if (this.#bounds[middle * 2]! < start) low = middle + 1
      else high = middle
    }
    return low * 2
  }
}
