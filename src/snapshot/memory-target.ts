/**
 * Where the memory of a VM is saved, opened for a save. Owns that a file gets its name only once it is whole:
 * until then what had the name before stays, so that a save that fails costs no earlier one.
 */
import type { CallOptions } from '../block/device.ts'
import { checkImageLocks } from '../block/file-lock.ts'
import { openFile } from '../block/file.ts'
import { preferDirect } from '../block/prefer-direct.ts'
import { Qcow2Error } from '../core/errors.ts'
import { Qcow2Image, type OpenOptions } from '../qcow2/image.ts'
import { readImageInfo } from '../qcow2/info.ts'
import type { MigrationRecord } from '../migration/records.ts'
import { fileAt, ownPath, pathBeside, removeFile, replaceFile } from './host-files.ts'
import type { Manifest } from './manifest.ts'
import { RamImageWriter } from './ram-image-writer.ts'
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
 * @throws Qcow2Error `ERR_BUSY` if a running QEMU uses the file, or the new RAM image needs it as its backing file;
 *   `ERR_EXISTS` if the image has a snapshot of that name.
 */
export async function openMemoryTarget(memory: MemoryTarget, options: MemoryTargetOptions = {}): Promise<OpenMemoryTarget> {
  if (typeof memory === 'string') return ramImageTarget(memory, undefined, options)
  if ('ramImage' in memory) return ramImageTarget(memory.ramImage, memory.backing, options)
  return 'stream' in memory ? streamTarget(memory.stream, options) : snapshotTarget(memory, options)
}

async function ramImageTarget(path: string, backing: string | undefined, options: MemoryTargetOptions): Promise<OpenMemoryTarget> {
  const place = await placeOf(path)
  if (backing !== undefined && place.occupied) await assertNotBelow(place.path, backing)
  const { signal, direct, references } = options
  const below = backing === undefined ? {} : { backing: { file: backing, format: 'qcow2' } }
  const sink = place.named(RamImageWriter.to(place.fresh, { signal, direct, references, ...below }))
  return { sink, described: { kind: 'RAM image', file: path }, path, close: () => sink.close() }
}

async function streamTarget(path: string, { signal, direct }: MemoryTargetOptions): Promise<OpenMemoryTarget> {
  const place = await placeOf(path)
  const device = await preferDirect(direct, (chosen) => openFile(place.fresh, { create: 'w', direct: chosen, signal }))
  const sink = place.named(deviceStreamSink(device, { signal }))
  const close = async (): Promise<void> => {
    await device.close()
    await sink.close()
  }
  return { sink, described: { kind: 'stream', file: path }, path, close }
}

async function snapshotTarget(
  { image: given, snapshot }: Extract<MemoryTarget, { image: unknown }>,
  { signal, direct, references }: MemoryTargetOptions,
): Promise<OpenMemoryTarget> {
  const open = given instanceof Qcow2Image
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

/** Where a new file is written until it gets its name. */
interface Place {
  /** The file's own path: a link was followed. */
  readonly path: string
  /** Something is there. */
  readonly occupied: boolean
  /** Where to write. */
  readonly fresh: string
  /** `sink`, with the file getting its name at the end, or disappearing; at the latest by `close`. */
  named(sink: SaveSink): SaveSink & { close(): Promise<void> }
}

async function placeOf(name: string): Promise<Place> {
  const path = await ownPath(name)
  const found = await fileAt(path)
  // a device or a pipe is written as it is
  if (found === 'special') return { path, occupied: true, fresh: path, named: (sink) => Object.assign(sink, { close: nothing }) }
  if (found === 'regular') await checkImageLocks(path, 'write')
  const fresh = `${path}.new`
  return { path, occupied: found === 'regular', fresh, named: (sink) => new NamedAtEnd(sink, fresh, path) }
}

/** A sink whose file gets its name when it is whole, and disappears when it will not be. */
class NamedAtEnd implements SaveSink {
  readonly #sink: SaveSink
  readonly #fresh: string
  readonly #path: string
  /** The file has its name, or is gone. */
  #settled = false

  constructor(sink: SaveSink, fresh: string, path: string) {
    this.#sink = sink
    this.#fresh = fresh
    this.#path = path
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
    await replaceFile(this.#fresh, this.#path)
    this.#settled = true
  }

  async abort(reason: unknown): Promise<void> {
    await this.#sink.abort(reason)
    await this.close()
  }

  /** Removes the file of a save that did not come to its end. */
  async close(): Promise<void> {
    if (this.#settled) return
    this.#settled = true
    await removeFile(this.#fresh)
  }
}

/** Replacing a file of the chain would change what lies above it, or make it its own backing file. */
async function assertNotBelow(path: string, backing: string): Promise<void> {
  const seen = new Set<string>()
  for (let name: string | undefined = backing, from = path; name !== undefined;) {
    const file: string = await ownPath(pathBeside(from, name))
    if (file === path) {
      throw new Qcow2Error('ERR_BUSY', `${path} is below the new RAM image (backing file ${backing}) and cannot be replaced by it; choose another name`)
    }
    if (seen.has(file)) return // a loop: opening it tells
    seen.add(file)
    const { backingFile } = await readImageInfo(file, { forceShare: true })
    ;[name, from] = [backingFile, file]
  }
}

const nothing = (): Promise<void> => Promise.resolve()
