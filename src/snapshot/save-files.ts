/**
 * Saves a running VM into files: its memory, and the manifest beside it, which tells what the VM needs. Owns what becomes
 * of the files that an earlier save left there.
 */
import type { Qmp } from '../qmp/client.ts'
import { folderOf, placeOf, removeFile, writeTextFile } from './host-files.ts'
import { openMemoryTarget, type MemoryTarget, type MemoryTargetOptions } from './memory-target.ts'
import { faultOrderPath, manifestPath } from './saved-names.ts'
import type { SaveReport, SaveToOptions } from './save-task.ts'
import { saveTo } from './save.ts'

/** Options of {@link save}. */
export interface SaveOptions extends Omit<SaveToOptions, 'memory'>, Omit<MemoryTargetOptions, 'signal'> {
  readonly memory: MemoryTarget
  /** Where the manifest goes; default beside the memory, see {@link manifestPath}, of a device nowhere; `false`: nowhere. */
  readonly manifest?: string | false | undefined
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
    // now: /dev/stdout, say, means nothing any more once its file was replaced
    const place = target.path === undefined ? undefined : await placeOf(target.path)
    const report = await saveTo(qmp, target.sink, { scratch: target.path === undefined ? undefined : folderOf(target.path), ...rest, memory: target.described })
    const { snapshot } = target.described
    const path = where === false ? undefined : (where ?? (place === undefined ? undefined : manifestPath(place, snapshot)))
    if (place !== undefined) await removeFile(faultOrderPath(place, snapshot))
    if (path !== undefined) await writeTextFile(path, `${JSON.stringify(report.manifest, undefined, 2)}\n`)
    return report
  } finally {
    await target.close()
  }
}
