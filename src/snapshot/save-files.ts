/**
 * Saves a running VM into files, and reverts from them with what was learned: the manifest beside the memory tells
 * what the VM needs, the fault order beside it what the guest touches first. Owns the file names.
 */
import { openFile } from '../block/file.ts'
import { Qcow2Image } from '../qcow2/image.ts'
import type { Qmp } from '../qmp/client.ts'
import { parseFaultOrder } from './fault-order.ts'
import { readTextFile, removeFile, writeTextFile } from './host-files.ts'
import { parseManifest, type Manifest } from './manifest.ts'
import { RamImageWriter, type NewRamImageOptions } from './ram-image-writer.ts'
import { revert, type RevertOptions } from './revert.ts'
import type { RevertReport } from './postcopy-source.ts'
import { deviceStreamSink, type SaveSink } from './save-sink.ts'
import { saveTo, type SaveReport, type SaveToOptions } from './save.ts'
import { snapshotSink } from './vm-state-snapshot.ts'

/** Where the memory of a VM is saved. */
export type MemoryTarget =
  /** Path of a RAM image to make: guest memory as the disk of a qcow2 image. */
  | string
  /** The same, on top of an earlier RAM image: only what changed since is stored. */
  | { readonly ramImage: string; readonly backing: string }
  /** Path of a stream file to make. */
  | { readonly stream: string }
  /** An internal snapshot for QEMU's `loadvm`, in an image that no QEMU has open. */
  | { readonly image: string | Qcow2Image; readonly snapshot: string }

/** Options of {@link save}. */
export interface SaveOptions extends Omit<SaveToOptions, 'memory'> {
  readonly memory: MemoryTarget
  /** Where the manifest goes; default beside the memory, see {@link manifestPath}; `false`: nowhere. */
  readonly manifest?: string | false | undefined
  /** A RAM image or stream file past the page cache: less work for the host, but the first revert reads from the disk. Default false. */
  readonly direct?: boolean | undefined
}

/** Path of the manifest beside a saved memory: `warm.qcow2` has `warm.qcow2.json`. */
export function manifestPath(memory: string): string {
  return `${memory}.json`
}

/** Path of the fault order beside a saved memory: `warm.qcow2` has `warm.qcow2.faults.json`. */
export function faultOrderPath(memory: string): string {
  return `${memory}.faults.json`
}

/**
 * Saves a running VM; the guest runs on.
 *
 * ```ts
 * await using qmp = await QmpClient.connect('vm.qmp')
 * await save(qmp, { memory: 'warm.qcow2' })
 * ```
 *
 * Succeeds only if the whole state arrived, is stored durably and agrees with what QEMU counts; see {@link saveTo}
 * for what a failure leaves: a VM as it was, and no saved VM.
 */
export async function save(qmp: Qmp, options: SaveOptions): Promise<SaveReport> {
  const { memory, manifest: where, ...rest } = options
  const target = await openTarget(memory, options)
  try {
    const report = await saveTo(qmp, target.sink, { ...rest, memory: target.described })
    const path = where === false ? undefined : (where ?? (target.path === undefined ? undefined : manifestPath(target.path)))
    if (target.path !== undefined) await removeFile(faultOrderPath(target.path))
    if (path !== undefined) await writeTextFile(path, `${JSON.stringify(report.manifest, undefined, 2)}\n`)
    return report
  } finally {
    await target.close()
  }
}

/** The manifest beside a saved memory; undefined if there is none. @throws FormatError (`ERR_FORMAT`) if it is damaged. */
export async function readManifest(memory: string): Promise<Manifest | undefined> {
  const text = await readTextFile(manifestPath(memory))
  return text === undefined ? undefined : parseManifest(text)
}

/**
 * Reverts from a file with what is beside it: checks the manifest where a monitor is given, sends the faults of an
 * earlier revert ahead, and records those of this one. Otherwise as {@link revert}.
 */
export async function revertFile(memory: string, options: RevertOptions): Promise<RevertReport> {
  const order = await readTextFile(faultOrderPath(memory))
  const report = await revert(memory, {
    ...options,
    manifest: options.manifest ?? (await readManifest(memory)),
    faultOrder: options.faultOrder ?? (order === undefined ? undefined : parseFaultOrder(order)),
  })
  await writeTextFile(faultOrderPath(memory), `${JSON.stringify(report.faultOrder)}\n`)
  return report
}

interface Target {
  readonly sink: SaveSink
  readonly described: Manifest['memory']
  readonly path: string | undefined
  close(): Promise<void>
}

const nothing = (): Promise<void> => Promise.resolve()

async function openTarget(memory: MemoryTarget, options: SaveOptions): Promise<Target> {
  const { signal, direct = false } = options
  if (typeof memory === 'string' || 'ramImage' in memory) {
    const path = typeof memory === 'string' ? memory : memory.ramImage
    const backing: NewRamImageOptions = typeof memory === 'string' ? {} : { backing: { file: memory.backing, format: 'qcow2' } }
    const sink = RamImageWriter.to(path, { signal, direct, ...backing })
    return { sink, described: { kind: 'RAM image', file: path }, path, close: nothing }
  }
  if ('stream' in memory) {
    const device = await openFile(memory.stream, { create: 'w', direct, ...(signal !== undefined && { signal }) })
    const described = { kind: 'stream', file: memory.stream }
    return { sink: deviceStreamSink(device, { signal }), described, path: memory.stream, close: () => device.close() }
  }
  const given = memory.image instanceof Qcow2Image
  const image = given ? memory.image : await Qcow2Image.open(memory.image)
  try {
    const sink = await snapshotSink(image, { name: memory.snapshot, signal })
    const file = given ? undefined : (memory.image)
    const described = { kind: 'snapshot', snapshot: memory.snapshot, ...(file !== undefined && { file }) }
    return { sink, described, path: file, close: given ? nothing : () => image.close() }
  } catch (error) {
    if (!given) await image.close()
    throw error
  }
}
