/**
 * Finds pages by number: which of them are there, in which order they appeared, and in ascending order. A hash table in
 * typed arrays, because a `Map` takes three times the memory for each page and ends at 2^24 of them.
 */

/** Slots of an empty index. */
const smallest = 1024

function randomOdd(): number {
  return Math.floor(Math.random() * 0x8000_0000) * 2 + 1
}

/** Page numbers, integers from 0 to 2^52. */
export class PageIndex {
  /** Random, so that nobody can choose numbers that all fall on one slot. */
  readonly #low = randomOdd()
  readonly #high = randomOdd()
  /** 32 less the binary logarithm of the slots. */
  #shift = 22
  /** The number of a page, plus 1; 0 where a slot is free. */
  #keys = new Float64Array(smallest)
  #places = new Int32Array(smallest)
  #size = 0
  /** All numbers, ascending; undefined after one was added. */
  #sorted: Float64Array | undefined

  /** Pages that are there. */
  get size(): number {
    return this.#size
  }

  /** How many pages appeared before this one; -1 if it is not there. */
  find(number: number): number {
    const slot = this.#slotOf(number)
    return this.#keys[slot] === 0 ? -1 : this.#places[slot]!
  }

  /** Adds a page that is not there, and gives its place: that of the first is 0. */
  add(number: number): number {
    if (this.#size * 2 >= this.#keys.length) this.#grow()
    const slot = this.#slotOf(number)
    this.#keys[slot] = number + 1
    this.#places[slot] = this.#size
    this.#sorted = undefined
    return this.#size++
  }

  /** The number of the page at `rank` in ascending order. */
  ascending(rank: number): number {
    return this.#numbers()[rank]!
  }

  /** How many pages have a number below `least`. */
  rank(least: number): number {
    const numbers = this.#numbers()
    let [low, high] = [0, numbers.length]
    while (low < high) {
      const middle = (low + high) >>> 1
      if (numbers[middle]! < least) low = middle + 1
      else high = middle
    }
    return low
  }

  #numbers(): Float64Array {
    if (this.#sorted === undefined) {
      const numbers = new Float64Array(this.#size)
      let at = 0
      for (const key of this.#keys) if (key !== 0) numbers[at++] = key - 1
      this.#sorted = numbers.sort()
    }
    return this.#sorted
  }

  /** The slot of a page, or the free one where it would be. */
  #slotOf(number: number): number {
    const mask = this.#keys.length - 1
    let slot = (Math.imul(number, this.#low) ^ Math.imul(number / 0x1_0000_0000, this.#high)) >>> this.#shift
    while (this.#keys[slot] !== 0 && this.#keys[slot] !== number + 1) slot = (slot + 1) & mask
    return slot
  }

  #grow(): void {
    const [keys, places] = [this.#keys, this.#places]
    this.#keys = new Float64Array(keys.length * 2)
    this.#places = new Int32Array(keys.length * 2)
    this.#shift--
    for (const [slot, key] of keys.entries()) {
      if (key === 0) continue
      const to = this.#slotOf(key - 1)
      this.#keys[to] = key
      this.#places[to] = places[slot]!
    }
  }
}
