/**
 * Watches a migration stream as it comes in and tells at its end whether it is whole: a stream has no
 * checksum, so its structure is all there is. Owns what has to agree; stores nothing but what stands
 * behind the pages.
 */
import { concat } from '../bytes/concat.ts'
import { viewOf } from '../bytes/view.ts'
import { Qcow2Error, UnsupportedError } from '../core/errors.ts'
import { limits, ramFlag } from '../migration/format.ts'
import { MigrationParser } from '../migration/parser.ts'
import type { MigrationRecord } from '../migration/records.ts'
import { deviceLengths, locateVmDescription, parseVmDescription } from '../migration/vm-description.ts'
import { withRunState } from './saved-state.ts'

/** What a complete stream holds. */
export interface StreamSummary {
  /** Bytes of the stream. */
  readonly length: number
  /** Machine type, empty if the stream names none. */
  readonly machine: string
  /** Target page size in bytes. */
  readonly pageSize: number
  readonly blocks: readonly { readonly name: string; readonly length: number }[]
  /** Page records with content and with zeroes; a live precopy sends pages more than once. */
  readonly pages: { readonly data: number; readonly zero: number }
  /** Device sections, as the VM description counts them. */
  readonly devices: number
  /** The guest's clock in nanoseconds, from the section `timer`; undefined where there is none. */
  readonly vmClock: bigint | undefined
}

/** Device state kept until the end, in bytes. */
const tailLimit = limits.behindPages

/** In the body of the section `timer`: be64 CPU ticks, be64 unused, be64 clock in nanoseconds. */
const timerClock = 16

/** Bytes by which a stream is recognised. */
const headLength = 4

/** What a sender may open a connection with instead of a migration stream. */
function refuseOtherProtocols(head: Uint8Array): void {
  const [first, second] = head
  if (first === 0x16 && second === 0x03) throw new UnsupportedError('what comes is encrypted (TLS), no migration stream; clear the migration parameter tls-creds of the QEMU that sends')
  if (head.length >= headLength && viewOf(head).getUint32(0) === multifdMagic) throw severalConnections()
}

/** be32 at the beginning of each connection of multifd but the first. */
const multifdMagic = 0x11223344

function severalConnections(): UnsupportedError {
  return new UnsupportedError('the memory comes on several connections; switch off the capability multifd of the QEMU that sends')
}

/** Push all chunks, then {@link StreamCheck.end}. */
export class StreamCheck {
  readonly #parser: MigrationParser
  readonly #onRecord: ((record: MigrationRecord) => void) | undefined
  readonly #tail: Uint8Array[] = []
  #tailLength = 0
  #tailOffset = 0
  #length = 0
  #data = 0
  #zero = 0
  #earlyDevices = 0
  #partSeen = false
  #vmClock: bigint | undefined
  /** Names of the RAM blocks of which a page has arrived. */
  readonly #filled = new Set<string>()
  readonly #runState: string | undefined
  /** The VM has devices that take memory away from it. */
  #unplugs = false
  /** The first bytes. */
  #head: Uint8Array = new Uint8Array(0)

  /**
   * `onRecord` sees each record; it is valid during the call. With `runState` device sections are held back until the end,
   * as they are to tell this state and not their own, see {@link StreamCheck.heldBack}.
   */
  constructor(onRecord?: (record: MigrationRecord) => void, runState?: string) {
    this.#parser = new MigrationParser()
    this.#onRecord = onRecord
    this.#runState = runState
  }

  /** True once the first RAM PART section has begun: of a background snapshot, memory is write-protected by then. */
  get partSeen(): boolean {
    return this.#partSeen
  }

  /** Bytes so far. */
  get length(): number {
    return this.#length
  }

  /** Gives what is not held back of the chunk. @throws FormatError (`ERR_STREAM`) as soon as the stream is malformed. */
  push(chunk: Uint8Array): Uint8Array {
    const start = this.#length
    if (this.#head.length < headLength) {
      this.#head = concat([this.#head, chunk.subarray(0, headLength - this.#head.length)])
      refuseOtherProtocols(this.#head)
    }
    this.#length += chunk.length
    for (const record of this.#parser.push(chunk)) {
      this.#watch(record)
      if (!this.#isHeldBack(record)) this.#onRecord?.(record)
    }
    return this.#runState === undefined || this.#tailLength === 0 ? chunk : chunk.subarray(0, Math.max(0, this.#tailOffset - start))
  }

  /** What was held back, when all has come; `onRecord` sees it, too. */
  heldBack(): Uint8Array {
    if (this.#runState === undefined) return new Uint8Array(0)
    const bytes = withRunState(concat(this.#tail), this.#runState)
    this.#onRecord?.({ kind: 'bytes', of: 'tail', offset: this.#tailOffset, length: bytes.length, bytes })
    return bytes
  }

  #isHeldBack(record: MigrationRecord): boolean {
    return this.#runState !== undefined && record.kind === 'bytes' && record.of === 'tail'
  }

  /**
   * The stream has ended.
   * @throws FormatError (`ERR_STREAM`) if it is cut short, has no VM description (unless
   *   `vmDescription: 'optional'`), its device sections are not those of the description, or the memory of a RAM block
   *   never came.
   */
  end(options: { readonly vmDescription?: 'required' | 'optional' } = {}): StreamSummary {
    this.#parser.end()
    const devices = this.#checkTail(options.vmDescription === 'optional')
    this.#checkMemory()
    const { blocks, configuration, pageSize } = this.#parser
    return {
      length: this.#length,
      machine: configuration?.machine ?? '',
      pageSize,
      blocks: blocks.map(({ name, length }) => ({ name, length })),
      pages: { data: this.#data, zero: this.#zero },
      devices,
      vmClock: this.#vmClock,
    }
  }

  #watch(record: MigrationRecord): void {
    switch (record.kind) {
      case 'section':
        if (record.type === 'part' && record.idstr === 'ram') this.#partSeen = true
        if (record.type === 'full') this.#earlyDevices++
        break
      case 'ram-mark':
        if (record.mark === 'multifd-flush') throw severalConnections()
        break
      case 'ram-pages':
        this.#filled.add(record.block.name)
        for (let i = 0; i < record.count; i++) {
          if ((record.flags[i]! & ramFlag.zero) !== 0) this.#zero++
          else this.#data++
        }
        break
      case 'bytes':
        if (record.of === 'tail') this.#keep(record.bytes, record.offset)
    }
  }

  #keep(bytes: Uint8Array, offset: number): void {
    if (this.#tail.length === 0) this.#tailOffset = offset
    this.#tailLength += bytes.length
    if (this.#tailLength > tailLimit) {
      throw new Qcow2Error('ERR_STREAM', `more than ${tailLimit} bytes behind the RAM pages; is this one migration stream?`)
    }
    this.#tail.push(new Uint8Array(bytes))
  }

  /** Every page of a block is sent, be it zero: a block without any was left out. */
  #checkMemory(): void {
    const absent = this.#parser.blocks.filter(({ name, length }) => length > 0 && !this.#filled.has(name))
    const [block] = absent
    // of the memory of virtio-mem, only what is plugged in is sent: that may be none
    if (block === undefined || this.#unplugs) return
    const names = absent.map(({ name, length }) => `${name} (${length} bytes)`).join(', ')
    const why = block.gpa === undefined ? 'no page of it was sent' : 'the capability x-ignore-shared was on, which leaves out memory that others can share (share=on)'
    throw new Qcow2Error('ERR_STREAM', `the stream lacks the memory of RAM block ${names}: ${why}; it is incomplete`)
  }

  /** Takes the device sections apart by the description's lengths; gives their number. */
  #checkTail(optional: boolean): number {
    const tail = concat(this.#tail)
    const location = locateVmDescription(tail)
    if (location === undefined) {
      if (optional) return 0
      throw new Qcow2Error('ERR_STREAM', `the stream of ${this.#length} bytes ends without a VM description: it is incomplete`)
    }
    const json = tail.subarray(location.start, location.start + location.length)
    const description = parseVmDescription(json, this.#tailOffset + location.start)
    this.#unplugs = description.devices.some(({ name }) => name.includes('virtio-mem'))
    const lengths = deviceLengths(description)
    const parser = new MigrationParser({
      offset: this.#tailOffset,
      devices: lengths.slice(this.#earlyDevices),
      continues: { sections: [], blocks: this.#parser.blocks },
    })
    let devices = this.#earlyDevices
    let idstr = ''
    for (const record of parser.push(tail)) {
      if (record.kind === 'section') {
        devices++
        idstr = record.idstr
      } else if (record.kind === 'bytes' && idstr === 'timer' && record.bytes.length >= timerClock + 8) {
        this.#vmClock = viewOf(record.bytes).getBigUint64(timerClock)
        idstr = ''
      }
    }
    parser.end()
    if (devices !== lengths.length) {
      throw new Qcow2Error('ERR_STREAM', `the stream has ${devices} device sections, its VM description lists ${lengths.length}`)
    }
    return devices
  }
}
