/**
 * Where the memory of a VM is saved, opened for a save. Owns that a file gets its name only once it is whole:
 * until then what had the name before stays, so that a save that fails costs no earlier one.
 */
import type { CallOptions } from '../block/device.ts'
import { newFile, type NewFile } from '../block/file-new.ts'
import { preferDirect } from '../block/prefer-direct.ts'
import { assertNotBelow } from '../qcow2/chain-files.ts'
import { Qcow2Image, type OpenOptions } from '../qcow2/image.ts'
import type { MigrationRecord } from '../migration/records.ts'
import { ownPath, secretMode } from './host-files.ts'
import type { Manifest } from './manifest.ts'
import { RamImageWriter, syncLimitOf } from './ram-image-writer.ts'
import { deviceStreamSink, type SaveSink } from './save-sink.ts'
import type { StreamSummary } from './stream-check.ts'
import { snapshotSink } from './vm-state-snapshot.ts'

/** Where the memory of a VM is saved. A file that is there already is replaced when the save has succeeded. */
export type MemoryTarget =
  /** Path of a RAM image to make: guest memory as the disk of a qcow2 image. */
  | string
  /** The same, on top of an earlier RAM image: only what changed since is stored. */
  | { readonly ramImage: string; readonly backing: string }
  /** Path of a stream file to make. */
  | { readonly stream: string }
  /** An internal snapshot for QEMU's `loadvm`, in an image that no QEMU has open. */
  | { readonly image: string | Qcow2Image; readonly snapshot: string }

/** Options of {@link openMemoryTarget}. */
export interface MemoryTargetOptions extends CallOptions {
  /**
   * Past the page cache: the save is faster and takes no memory of the host, but the first revert reads from the disk. Default:
   * where the file system takes it, but not for a RAM image on top of an earlier one, whose pages come singly.
   */
  readonly direct?: boolean | undefined
  /** Which files an image may open as its backing file; see {@link Qcow2Image.open}. */
  readonly references?: OpenOptions['references'] | undefined
}

/** An open {@link MemoryTarget}. */
export interface OpenMemoryTarget {
  /** Takes the stream; once finished, the saved VM is there under its name. */
  readonly sink: SaveSink
  /** What a manifest says of it. */
  readonly described: Manifest['memory']
  /** Path of the file, if it has one. */
  readonly path: string | undefined
  /** Closes files that were opened here. Call it after the sink was finished or aborted. */
  close(): Promise<void>
}

/**
 * Opens `memory` for one save.
 * @throws Qcow2Error `ERR_BUSY` if the file that is to be replaced is in use, or the new RAM image needs it as its backing file;
 *   `ERR_EXISTS` if the image has a snapshot of that name.
 */
export async function openMemoryTarget(memory: MemoryTarget, options: MemoryTargetOptions = {}): Promise<OpenMemoryTarget> {
  if (typeof memory === 'string') return ramImageTarget(memory, undefined, options)
  if ('ramImage' in memory) return ramImageTarget(memory.ramImage, memory.backing, options)
  return 'stream' in memory ? streamTarget(memory.stream, options) : snapshotTarget(memory, options)
}

async function ramImageTarget(path: string, backing: string | undefined, options: MemoryTargetOptions): Promise<OpenMemoryTarget> {
  const { signal, direct, references } = options
  const own = await ownPath(path)
  if (backing !== undefined) await assertNotBelow(own, own, { file: backing, format: 'qcow2' })
  const below = backing === undefined ? {} : { backing: { file: backing, format: 'qcow2' } }
  const begin = (chosen: boolean): Promise<NewFile> => newFile(own, { mode: secretMode, direct: chosen, syncLimit: chosen ? 0 : syncLimitOf(backing), signal })
  const file = await preferDirect(direct ?? (backing === undefined ? undefined : false), begin)
  const sink = new KeptAtEnd(RamImageWriter.to(file.device, { signal, references, ...below }), file)
  return { sink, described: { kind: 'RAM image', file: path }, path, close: () => sink.close() }
}

async function streamTarget(path: string, { signal, direct }: MemoryTargetOptions): Promise<OpenMemoryTarget> {
  const own = await ownPath(path)
  const file = await preferDirect(direct, (chosen) => newFile(own, { mode: secretMode, direct: chosen, signal }))
  const sink = new KeptAtEnd(deviceStreamSink(file.device, { signal }), file)
  return { sink, described: { kind: 'stream', file: path }, path, close: () => sink.close() }
}

async function snapshotTarget(
  { image: given, snapshot }: Extract<MemoryTarget, { image: unknown }>,
  { signal, direct, references }: MemoryTargetOptions,
): Promise<OpenMemoryTarget> {
  const open = Qcow2Image.is(given)
  const image = open ? given : await preferDirect(direct, (chosen) => Qcow2Image.open(given, { signal, references, direct: chosen }))
  try {
    const sink = await snapshotSink(image, { name: snapshot, signal })
    const path = open ? undefined : given
    const described = { kind: 'snapshot', snapshot, ...(path !== undefined && { file: path }) }
    return { sink, described, path, close: open ? nothing : () => image.close() }
  } catch (error) {
    if (!open) await image.close()
    throw error
  }
}

/** A sink whose file gets its name when it is whole, and disappears when it will not be. */
class KeptAtEnd implements SaveSink {
  readonly #sink: SaveSink
  readonly #file: NewFile

  constructor(sink: SaveSink, file: NewFile) {
    this.#sink = sink
    this.#file = file
  }

  write(bytes: Uint8Array): Promise<void> | undefined {
    return this.#sink.write?.(bytes)
  }

  record(record: MigrationRecord): void {
    this.#sink.record?.(record)
  }

  settle(): Promise<void> | undefined {
    return this.#sink.settle?.()
  }

  async finish(summary: StreamSummary): Promise<void> {
    await this.#sink.finish(summary)
    await this.#file.keep()
  }

  async abort(reason: unknown): Promise<void> {
    await this.#sink.abort(reason)
    await this.close()
  }

  /** Removes the file of a save that did not come to its end. */
  close(): Promise<void> {
    return this.#file.discard()
  }
}

const nothing = (): Promise<void> => Promise.resolve()
