/**
 * Reverts from files with what is beside the memory: the manifest, which tells what the VM needs, and the fault order, which
 * tells what the guest touches first. Owns where both are looked for.
 */
import { parseFaultOrder } from './fault-order.ts'
import { readTextFile, writeTextFile } from './host-files.ts'
import type { Manifest } from './manifest.ts'
import { parseManifest } from './parse-manifest.ts'
import type { RevertReport } from './postcopy-source.ts'
import { revert, type RevertOptions } from './revert.ts'
import { faultOrderPath, manifestPath } from './saved-names.ts'

/**
 * The manifest beside a saved memory, with `snapshot` that of this snapshot in the image; undefined if there is none. One
 * that was written when an image had one for all its snapshots (`FILE.json`) counts for the snapshot it names.
 * @throws FormatError (`ERR_FORMAT`) if it is damaged.
 */
export async function readManifest(memory: string, snapshot?: string): Promise<Manifest | undefined> {
  const own = await readTextFile(manifestPath(memory, snapshot))
  if (own !== undefined) return parseManifest(own)
  if (snapshot === undefined) return undefined
  const shared = await readTextFile(manifestPath(memory))
  const manifest = shared === undefined ? undefined : parseManifest(shared)
  return manifest?.memory.snapshot === snapshot ? manifest : undefined
}

/**
 * Reverts from a file with what is beside it: checks the manifest where a monitor is given, sends the faults of an
 * earlier revert ahead, and records those of this one. Otherwise as {@link revert}.
 */
export async function revertFile(memory: string, options: RevertOptions): Promise<RevertReport> {
  const beside = faultOrderPath(memory, options.snapshot)
  const order = await readTextFile(beside)
  const report = await revert(memory, {
    ...options,
    manifest: options.manifest ?? (await readManifest(memory, options.snapshot)),
    faultOrder: options.faultOrder ?? (order === undefined ? undefined : parseFaultOrder(order)),
  })
  await writeTextFile(beside, `${JSON.stringify(report.faultOrder)}\n`)
  return report
}
