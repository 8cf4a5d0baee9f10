/** A device in memory that knows which of its blocks are data, zeroes or unallocated, and how deep. */
import { anyRequest, BaseDevice, extent, type BlockLimits, type Extent, type WriteZeroesOptions } from '../../../src/block/device.ts'

export type BlockState = 'data' | 'zero' | 'unallocated' | 'backing'

export const blockSize = 4096

export class SparseDevice extends BaseDevice {
  readonly readOnly: boolean
  readonly limits: BlockLimits = { ...anyRequest, discardAlignment: blockSize }
  readonly bytes: Uint8Array
  readonly states: BlockState[]
  readonly log: string[] = []
  flushes = 0

  constructor(size: number, options: { readOnly?: boolean } = {}) {
    super()
    this.bytes = new Uint8Array(size)
    this.states = new Array<BlockState>(Math.ceil(size / blockSize)).fill('unallocated')
    this.readOnly = options.readOnly ?? false
  }

  get size(): number {
    return this.bytes.length
  }

  protected onRead(offset: number, target: Uint8Array): Promise<void> {
    this.log.push(`read ${offset} ${target.length}`)
    target.set(this.bytes.subarray(offset, offset + target.length))
    return done
  }

  protected onWrite(offset: number, source: Uint8Array): Promise<void> {
    this.log.push(`write ${offset} ${source.length}`)
    this.bytes.set(source, offset)
    this.states.fill('data', Math.floor(offset / blockSize), Math.ceil((offset + source.length) / blockSize))
    return done
  }

  protected override onWriteZeroes(offset: number, length: number, options?: WriteZeroesOptions): Promise<void> {
    this.log.push(`zero ${offset} ${length}${options?.unmap === true ? ' unmap' : ''}`)
    this.#zero(offset, length, 'zero')
    return done
  }

  protected override onDiscard(offset: number, length: number): Promise<void> {
    this.log.push(`discard ${offset} ${length}`)
    this.#zero(offset, length, 'unallocated')
    return done
  }

  protected onFlush(): Promise<void> {
    this.flushes++
    return done
  }

  // eslint-disable-next-line @typescript-eslint/require-await -- the contract is asynchronous
  protected override async *onMap(offset: number, length: number): AsyncGenerator<Extent, void, undefined> {
    for (let at = offset; at < offset + length; ) {
      const state = this.states[Math.floor(at / blockSize)]!
      let end = (Math.floor(at / blockSize) + 1) * blockSize
      while (end < offset + length && this.states[end / blockSize] === state) end += blockSize
      end = Math.min(end, offset + length)
      const data = state === 'data' || state === 'backing'
      yield extent({
        start: at,
        length: end - at,
        depth: state === 'backing' ? 1 : 0,
        present: state !== 'unallocated',
        zero: !data,
        data,
        compressed: false,
      })
      at = end
    }
  }

  protected onClose(): Promise<void> {
    return done
  }

  #zero(offset: number, length: number, state: BlockState): void {
    this.bytes.fill(0, offset, offset + length)
    for (let block = Math.ceil(offset / blockSize); (block + 1) * blockSize <= Math.min(offset + length, this.size); block++) {
      this.states[block] = state
    }
  }
}

const done: Promise<void> = Promise.resolve()
