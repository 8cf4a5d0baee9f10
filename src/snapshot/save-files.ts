/**
 * Saves a running VM into files, and reverts from them with what was learned: the manifest beside the memory tells
 * what the VM needs, the fault order beside it what the guest touches first. Owns the file names.
 */
import type { Qmp } from '../qmp/client.ts'
import { parseFaultOrder } from './fault-order.ts'
import { readTextFile, removeFile, writeTextFile } from './host-files.ts'
import { parseManifest, type Manifest } from './manifest.ts'
import { openMemoryTarget, type MemoryTarget, type MemoryTargetOptions } from './memory-target.ts'
import { revert, type RevertOptions } from './revert.ts'
import type { RevertReport } from './postcopy-source.ts'
import { saveTo, type SaveReport, type SaveToOptions } from './save.ts'

/** Options of {@link save}. */
export interface SaveOptions extends Omit<SaveToOptions, 'memory'>, Omit<MemoryTargetOptions, 'signal'> {
  readonly memory: MemoryTarget
  /** Where the manifest goes; default beside the memory, see {@link manifestPath}; `false`: nowhere. */
  readonly manifest?: string | false | undefined
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
 * for what a failure leaves: a VM as it was, and no saved VM but the one that had the name before, if there was one.
 */
export async function save(qmp: Qmp, options: SaveOptions): Promise<SaveReport> {
  const { memory, manifest: where, ...rest } = options
  const target = await openMemoryTarget(memory, options)
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
