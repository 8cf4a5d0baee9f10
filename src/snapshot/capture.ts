/**
 * Receives whatever a QEMU migrates, stores it, and says whether it was whole. Owns the loop between a
 * byte source and a {@link SaveSink}; talks to no monitor.
 */
import type { CallOptions } from '../block/device.ts'
import { borrowedChunks, type ByteSource } from '../migration/byte-source.ts'
import type { SaveSink } from './save-sink.ts'
import { StreamCheck, type StreamSummary } from './stream-check.ts'

/** Options of {@link capture}. */
export interface CaptureOptions extends CallOptions {
  /**
   * `optional` also takes streams of machines with `suppress-vmdesc=on`. Default `required`: without the
   * VM description nothing tells a complete stream from one that was cut between two sections.
   */
  readonly vmDescription?: 'required' | 'optional' | undefined
  /** Called once, when the first page section begins. */
  readonly onFirstPages?: (() => void | Promise<void>) | undefined
  /** Bytes received so far; how many will come is not known. */
  readonly onProgress?: ((progress: { readonly done: number }) => void) | undefined
  /**
   * The run state that the saved VM is to tell instead of its own, as `query-status` names it: what a guest did before it was
   * stopped only to be saved.
   */
  readonly runState?: string | undefined
  /** Asked when the stream was whole, before it is kept: throw to reject it. */
  readonly accept?: ((summary: StreamSummary) => Promise<void>) | undefined
}

/**
 * Stores a migration stream: a socket that QEMU connects to, a pipe, a file, any source of bytes.
 * Resolves when the stream ended as it should and the sink has made it durable.
 *
 * @throws FormatError (`ERR_STREAM`) if the stream is malformed or incomplete; the sink is told to
 *   abort, as it is for every other failure.
 */
export async function capture(source: ByteSource, sink: SaveSink, options: CaptureOptions = {}): Promise<StreamSummary> {
  const check = new StreamCheck(sink.record === undefined ? undefined : (record) => sink.record?.(record), options.runState)
  try {
    let started = false
    for await (const chunk of borrowedChunks(source, options)) {
      const now = check.push(chunk)
      const writing = sink.write?.(now)
      writing?.catch(() => undefined) // reported where it is awaited
      if (!started && check.partSeen) {
        started = true
        await options.onFirstPages?.()
      }
      if (writing !== undefined) await writing
      const settling = sink.settle?.()
      if (settling !== undefined) await settling
      options.onProgress?.({ done: check.length })
    }
    options.signal?.throwIfAborted()
    const summary = check.end({ vmDescription: options.vmDescription ?? 'required' })
    await sink.write?.(check.heldBack())
    await sink.settle?.()
    await options.accept?.(summary)
    await sink.finish(summary)
    return summary
  } catch (error) {
    await sink.abort(error)
    throw error
  }
}
