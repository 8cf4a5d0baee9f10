/**
 * Keeps everything that changes a device, with the bytes: from such a recording the state of the medium
 * after a power cut at any moment can be built (`powerCut` in `qcow2/testing`).
 */
import type { BlockDevice, CallOptions, WriteOptions, WriteZeroesOptions } from './device.ts'
import { FilterDevice } from './filter.ts'

/** What a recorded request changes. */
export type RecordedChange =
  | { readonly kind: 'write'; readonly offset: number; readonly bytes: Uint8Array }
  | { readonly kind: 'write zeroes'; readonly offset: number; readonly length: number }
  | { readonly kind: 'discard'; readonly offset: number; readonly length: number }
  | { readonly kind: 'resize'; readonly size: number }
  | { readonly kind: 'flush' }

/** A change and its place in time. Events, submissions and completions alike, are numbered from 0. */
export interface RecordedRequest {
  readonly change: RecordedChange
  /** Number of the event of its submission. */
  readonly submitted: number
  /** Number of the event of its success; `undefined` while in flight, and if it failed. */
  readonly completed: number | undefined
}

/** What {@link record} writes into. Make one with `new Recording()`. */
export class Recording {
  /** In order of submission. */
  readonly requests: RecordedRequest[] = []
  #events = 0

  /** Events so far: the present moment, as `powerCut` takes it. */
  get events(): number {
    return this.#events
  }

  /** Runs a request between the events of its submission and its success. */
  async add(change: RecordedChange, perform: () => Promise<void>): Promise<void> {
    const request = { change, submitted: this.#events++, completed: undefined as number | undefined }
    this.requests.push(request)
    await perform()
    request.completed = this.#events++
  }
}

/** Passes everything, and adds each change with a copy of its bytes to `recording`. */
export function record(device: BlockDevice, recording: Recording): BlockDevice {
  return new RecordDevice(device, recording)
}

class RecordDevice extends FilterDevice {
  readonly #recording: Recording

  constructor(inner: BlockDevice, recording: Recording) {
    super(inner)
    this.#recording = recording
  }

  protected override onWrite(offset: number, source: Uint8Array, options?: WriteOptions): Promise<void> {
    const change = { kind: 'write', offset, bytes: source.slice() } as const
    return this.#recording.add(change, () => this.inner.write(offset, source, options))
  }

  protected override onWriteZeroes(offset: number, length: number, options?: WriteZeroesOptions): Promise<void> {
    const change = { kind: 'write zeroes', offset, length } as const
    return this.#recording.add(change, () => this.inner.writeZeroes(offset, length, options))
  }

  protected override onDiscard(offset: number, length: number, options?: CallOptions): Promise<void> {
    return this.#recording.add({ kind: 'discard', offset, length }, () => this.inner.discard(offset, length, options))
  }

  protected override onFlush(options?: CallOptions): Promise<void> {
    return this.#recording.add({ kind: 'flush' }, () => this.inner.flush(options))
  }

  protected override onResize(size: number, options?: CallOptions): Promise<void> {
    return this.#recording.add({ kind: 'resize', size }, () => this.inner.resize(size, options))
  }
}
