/**
 * Internal snapshots with VM state, as QEMU's `savevm` and `loadvm` use them: a whole migration stream in
 * the area behind the disk. Owns the way between a stream and a snapshot; the layout is the image's.
 */
import type { BlockDevice, CallOptions } from '../block/device.ts'
import { Qcow2Error } from '../core/errors.ts'
import { chunksOf, type ByteSource } from '../migration/byte-source.ts'
import type { Qcow2Image } from '../qcow2/image.ts'
import type { SnapshotInfo } from '../qcow2/snapshot-info.ts'
import type { FinishOptions } from '../qcow2/snapshot-writer.ts'
import { capture, type CaptureOptions } from './capture.ts'
import type { SaveSink } from './save-sink.ts'

/** Options of {@link saveVmState}. `vmClock` is the stream's own if left out. */
export interface SaveVmStateOptions extends FinishOptions, Omit<CaptureOptions, 'accept'> {
  /** Name of the snapshot, for QEMU's `-loadvm`. */
  readonly name: string
}

/**
 * Stores a migration stream as an internal snapshot of `image`, as `savevm` does: QEMU's `-loadvm NAME`
 * starts from it. The disk of the snapshot is the image as it is when the stream has ended.
 *
 * `stream` is anything that gives bytes: a socket that QEMU migrates to, a file, a stored stream. No QEMU may
 * have the image open.
 *
 * @throws FormatError (`ERR_STREAM`) if the stream is malformed or incomplete; `ERR_EXISTS` if the image has a
 *   snapshot of that name; whatever the image throws. The image is then as it was.
 */
export async function saveVmState(image: Qcow2Image, stream: ByteSource, options: SaveVmStateOptions): Promise<SnapshotInfo> {
  const sink = await snapshotSink(image, options)
  await capture(stream, sink, options)
  return sink.snapshot
}

/** A sink that becomes an internal snapshot. */
export interface SnapshotSink extends SaveSink {
  /** The snapshot, once finished. */
  readonly snapshot: SnapshotInfo
}

/**
 * Keeps a stream as an internal snapshot of an image that no QEMU has open.
 * @throws Qcow2Error `ERR_EXISTS` if the image has a snapshot of that name: QEMU could not tell them apart.
 */
export async function snapshotSink(
  image: Qcow2Image,
  options: FinishOptions & CallOptions & { readonly name: string },
): Promise<SnapshotSink> {
  if (image.snapshots.find(options.name) !== undefined) {
    throw new Qcow2Error('ERR_EXISTS', `the image has a snapshot ${JSON.stringify(options.name)} already; delete it or choose another name`)
  }
  const writer = await image.snapshots.begin({ name: options.name, signal: options.signal })
  let snapshot: SnapshotInfo | undefined
  return {
    get snapshot() {
      if (snapshot === undefined) throw new Qcow2Error('ERR_NOT_FOUND', `snapshot ${options.name} is not finished`)
      return snapshot
    },
    write: (bytes) => writer.write(bytes),
    async finish(summary) {
      const { date, dateNanoseconds, vmClock = summary.vmClock, icount } = options
      snapshot = await writer.finish({ date, dateNanoseconds, vmClock, icount })
      await writer.close()
    },
    abort: () => writer.abort(),
  }
}

/**
 * The migration stream of an open snapshot (`image.snapshots.open(name)`), as bytes in order. The chunks belong to the
 * caller, so a Node stream or a `Response` may be made of them. What takes a `BlockDevice` (`readMigration`, `VmState.index`,
 * `ReadAheadPrefetcher`) reads `snapshot.vmState` itself, and may save the copy.
 * @throws Qcow2Error `ERR_NOT_FOUND` if the snapshot has no VM state.
 */
export async function* loadVmState(
  snapshot: { readonly vmState: BlockDevice },
  options: CallOptions = {},
): AsyncGenerator<Uint8Array, void, undefined> {
  if (snapshot.vmState.size === 0) {
    throw new Qcow2Error('ERR_NOT_FOUND', 'the snapshot has no VM state: it is a snapshot of the disk only')
  }
  yield* chunksOf(snapshot.vmState, options)
}
