/**
 * Page-aligned memory, which direct I/O demands and ordinary arrays do not give. The memory of a
 * `WebAssembly.Memory` is mapped, so it begins at a page. Owns the knowledge of which buffers are
 * aligned; knows nothing of devices.
 */

// the type library of Node does not declare WebAssembly
declare const WebAssembly: {
  readonly Memory: new (limits: { initial: number; maximum: number }) => { readonly buffer: ArrayBuffer }
}

/** What `allocateAligned` aligns to, in bytes: enough for any disk's direct I/O. */
export const memoryPage = 4096

const webAssemblyPage = 65_536
const arenaSize = 1 << 20

/** Buffers that begin at a page; nothing else tells an aligned buffer from another. */
const pageAligned = new WeakSet<ArrayBufferLike>()

let arena: Uint8Array | undefined
let arenaUsed = 0
let zeroPage: Uint8Array | undefined

/**
 * New zeroed bytes whose start is page-aligned in memory, as direct I/O needs. Small requests share
 * one mapping of 1 MiB, which lives as long as any of them; so allocate once and reuse.
 * @param length in bytes, 0 to 4 GiB
 * @throws RangeError if the length is out of bounds or memory is exhausted
 */
export function allocateAligned(length: number): Uint8Array {
  if (!Number.isSafeInteger(length) || length < 0 || length > 65_536 * webAssemblyPage) {
    throw new RangeError(`length must be an integer from 0 to 4 GiB, not ${length}`)
  }
  if (length > arenaSize / 4) return mapMemory(length)
  const taken = Math.ceil(length / memoryPage) * memoryPage
  if (arena === undefined || arenaUsed + taken > arenaSize) {
    arena = mapMemory(arenaSize)
    arenaUsed = 0
  }
  const bytes = arena.subarray(arenaUsed, arenaUsed + length)
  arenaUsed += taken
  return bytes
}

/**
 * True if `bytes` starts at a multiple of `alignment` in memory, as far as can be known: only memory
 * from this module is known to be aligned.
 * @param alignment a power of two up to 4096
 */
export function isMemoryAligned(bytes: Uint8Array, alignment: number): boolean {
  if (alignment <= 1 || bytes.length === 0) return true
  return bytes.byteOffset % alignment === 0 && alignment <= memoryPage && pageAligned.has(bytes.buffer)
}

/** Page-aligned zeroes to write from, at most 1 MiB. Shared: never to be written into. */
export function zeroes(length: number): Uint8Array {
  zeroPage ??= mapMemory(1 << 20)
  if (length > zeroPage.length) throw new RangeError(`at most ${zeroPage.length} zeroes at a time, not ${length}`)
  return zeroPage.subarray(0, length)
}

/**
 * A fixed number of equal, page-aligned slabs in one mapping. The first touch of fresh memory is ten
 * times slower than a copy: a pool pays it once, where an allocation for each request pays it always.
 */
export class SlabPool {
  /** Size of each slab in bytes. */
  readonly slabSize: number
  readonly #memory: Uint8Array
  readonly #count: number
  readonly #free: Uint8Array[] = []

  /**
   * @param slabSize bytes of each slab; rounded up to a page between slabs
   * @param count number of slabs; all together at most 4 GiB
   */
  constructor(slabSize: number, count: number) {
    if (!Number.isSafeInteger(slabSize) || slabSize < 1) throw new RangeError(`slabSize must be at least 1 byte, not ${slabSize}`)
    if (!Number.isSafeInteger(count) || count < 1) throw new RangeError(`a pool has at least 1 slab, not ${count}`)
    this.slabSize = slabSize
    const stride = Math.ceil(slabSize / memoryPage) * memoryPage
    this.#memory = takeSpare(stride * count) ?? allocateAligned(stride * count)
    this.#count = count
    for (let slab = count - 1; slab >= 0; slab--) {
      this.#free.push(this.#memory.subarray(slab * stride, slab * stride + slabSize))
    }
  }

  /** Slabs that can be acquired now. */
  get available(): number {
    return this.#free.length
  }

  /** A slab with arbitrary content, or `undefined` when all are taken. */
  acquire(): Uint8Array | undefined {
    return this.#free.pop()
  }

  /** Gives back a slab that `acquire` returned. */
  release(slab: Uint8Array): void {
    this.#free.push(slab)
  }

  /** Ends the pool. If all slabs are back, a later pool of the same size gets their memory. */
  close(): void {
    if (this.#free.length === this.#count) keepSpare(this.#memory)
    this.#free.length = 0
  }
}

/** Memory of ended pools, touched already. */
const spares: Uint8Array[] = []
const mostSpareBytes = 32 << 20

function takeSpare(length: number): Uint8Array | undefined {
  const index = spares.findIndex((memory) => memory.length === length)
  return index < 0 ? undefined : spares.splice(index, 1)[0]
}

function keepSpare(memory: Uint8Array): void {
  if (memory.length > mostSpareBytes) return
  spares.push(memory)
  for (let total = bytesOf(spares); total > mostSpareBytes; total = bytesOf(spares)) spares.shift()
}

function bytesOf(memories: readonly Uint8Array[]): number {
  return memories.reduce((sum, { length }) => sum + length, 0)
}

/** A mapping of its own: initial == maximum, because growing would detach views under running I/O. */
function mapMemory(length: number): Uint8Array {
  const pages = Math.max(1, Math.ceil(length / webAssemblyPage))
  const { buffer } = new WebAssembly.Memory({ initial: pages, maximum: pages })
  pageAligned.add(buffer)
  return new Uint8Array(buffer, 0, length)
}
