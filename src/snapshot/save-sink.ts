/**
 * Where a migration stream is kept. Owns nothing: a stream file, an internal snapshot's VM state area
 * and a RAM image each give one of these.
 */
import type { BlockDevice, CallOptions } from '../block/device.ts'
import { AlignedWriteQueue } from '../block/write-queue.ts'
import type { MigrationRecord } from '../migration/records.ts'
import type { StreamSummary } from './stream-check.ts'

/** Takes a stream as it comes in. */
export interface SaveSink {
  /** The bytes, in order. Awaited before the next chunk if it gives a promise; `bytes` may be reused afterwards. */
  write?(bytes: Uint8Array): Promise<void> | undefined
  /** Each record, for a sink that keeps pages and not bytes; valid during the call. */
  record?(record: MigrationRecord): void
  /** Awaited after the records of each chunk: back-pressure of {@link record}. */
  settle?(): Promise<void> | undefined
  /** The stream was whole: make it durable. Only then does the saved VM exist. */
  finish(summary: StreamSummary): Promise<void>
  /** The stream was not whole: leave nothing that could be taken for a saved VM. */
  abort(reason: unknown): Promise<void>
}

/**
 * Keeps the stream as it is in `device`, from byte 0, by large aligned writes. The device is grown or cut
 * to the stream's length where it can be; it stays open.
 */
export function deviceStreamSink(device: BlockDevice, options: CallOptions = {}): SaveSink {
  const queue = new AlignedWriteQueue(device, { signal: options.signal })
  return {
    write: (bytes) => queue.write(bytes),
    async finish({ length }) {
      await queue.close()
      if (device.growable && device.size > length) await device.resize(length)
    },
    async abort(reason) {
      await queue.abort(reason)
      if (device.growable) await device.resize(0)
    },
  }
}
