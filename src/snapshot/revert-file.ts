/**
 * Reverts from files with what is beside the memory: the manifest, which tells what the VM needs, and the fault order, which
 * tells what the guest touches first. Owns where both are looked for, and that the fault order only hints: one that cannot
 * be read or written changes nothing but how long the guest waits.
 */
import { openFile } from '../block/file.ts'
import { pathOf } from '../block/source.ts'
import { Qcow2Error } from '../core/errors.ts'
import { parseFaultOrder, type FaultOrder } from './fault-order.ts'
import { placeOf, readTextFile, writeTextFile } from './host-files.ts'
import { temporaryFile } from './host-spool.ts'
import type { Manifest } from './manifest.ts'
import { openSaved } from './open-saved.ts'
import type { PageSource } from './page-source.ts'
import { parseManifest } from './parse-manifest.ts'
import { faultRead, revert, revertEagerly, type EagerRevertReport, type RevertOptions, type RevertReport } from './revert.ts'
import { faultOrderPath, manifestPath } from './saved-names.ts'

/** Bytes of the longest fault order that is read. */
const longestHints = 64 << 20

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
 * earlier revert ahead, and records those of this one. Otherwise as {@link revert}. What is opened by a web address has
 * nothing beside it.
 *
 * @throws FormatError (`ERR_FORMAT`) for a damaged manifest, unless differences are to be ignored; what {@link revert} throws.
 */
export function revertFile(memory: string | URL, options: RevertOptions): Promise<RevertReport> {
  return withFile(memory, options, (saved, how) => revertBeside(saved, pathOf(memory), how))
}

/** As {@link revertEagerly}, with the manifest beside the file. */
export function revertFileEagerly(memory: string | URL, options: RevertOptions): Promise<EagerRevertReport> {
  return withFile(memory, options, (saved, how) => eagerlyBeside(saved, pathOf(memory), how))
}

/** Reverts an open saved VM with what is beside the file at `memory`; without a path, with nothing. */
export async function revertBeside(saved: PageSource, memory: string | undefined, options: RevertOptions): Promise<RevertReport> {
  const { manifest, warnings } = await manifestFor(saved, memory, options)
  const place = memory === undefined ? undefined : await placeOf(memory)
  const hints = place === undefined ? undefined : faultOrderPath(place, saved.snapshot)
  const faultOrder = options.faultOrder ?? (hints === undefined ? undefined : await readHints(hints, warnings))
  const report = await revert(saved, { ...options, memory, manifest, faultOrder })
  // of what was sent whole nothing was learned
  if (hints !== undefined && report.mode === 'postcopy') await writeHints(hints, report.faultOrder, warnings)
  return { ...report, warnings: [...warnings, ...report.warnings] }
}

/** As {@link revertEagerly}, with the manifest beside the file at `memory`. */
export async function eagerlyBeside(saved: PageSource, memory: string | undefined, options: RevertOptions): Promise<EagerRevertReport> {
  const { manifest, warnings } = await manifestFor(saved, memory, options)
  const report = await revertEagerly(saved, { ...options, memory, manifest })
  return { ...report, warnings: [...warnings, ...report.warnings] }
}

async function withFile<T>(memory: string | URL, options: RevertOptions, task: (saved: PageSource, options: RevertOptions) => Promise<T>): Promise<T> {
  await using saved = await openSaved(memory, { ...options, syncLimit: options.syncLimit ?? faultRead, spool: options.spool ?? temporaryFile })
  return await task(saved, options)
}

/** The manifest that belongs to a saved VM. A memory that something else replaced leaves one that does not. */
async function manifestFor(
  saved: PageSource,
  memory: string | undefined,
  options: RevertOptions,
): Promise<{ readonly manifest: Manifest | undefined; readonly warnings: string[] }> {
  if (options.manifest !== undefined || memory === undefined) return { manifest: options.manifest, warnings: [] }
  try {
    const manifest = await readManifest(memory, saved.snapshot)
    if (manifest === undefined || describes(manifest, saved)) return { manifest, warnings: [] }
    const where = manifestPath(memory, saved.snapshot)
    return { manifest: undefined, warnings: [`${where} tells of another VM than the one that is saved there; it was left out of account`] }
  } catch (error) {
    if (options.ignoreDifferences !== true || !Qcow2Error.is(error)) throw error
    return { manifest: undefined, warnings: [`what the VM needs is not known: ${error.message}`] }
  }
}

function describes(manifest: Manifest, saved: PageSource): boolean {
  const lengths = new Map(manifest.ramBlocks.map(({ name, length }) => [name, length]))
  return manifest.machine === saved.machine && lengths.size === saved.blocks.length && saved.blocks.every(({ name, length }) => lengths.get(name) === length)
}

async function readHints(path: string, warnings: string[]): Promise<FaultOrder | undefined> {
  try {
    await using file = await openFile(path, { readOnly: true })
    if (file.size > longestHints) throw new Qcow2Error('ERR_FORMAT', `it has ${file.size} bytes, allowed ${longestHints}`)
    return parseFaultOrder(new TextDecoder().decode(await file.read(0, file.size)))
  } catch (error) {
    if (Qcow2Error.is(error, 'ERR_NOT_FOUND')) return undefined
    warnings.push(`the order of faults is not used, the guest may wait longer: ${wordsAbout(path, error)}`)
    return undefined
  }
}

async function writeHints(path: string, order: FaultOrder, warnings: string[]): Promise<void> {
  try {
    await writeTextFile(path, `${JSON.stringify(order)}\n`)
  } catch (error) {
    // another revert of it writes its own now, which is as good
    if (isReadOnly(error) || Qcow2Error.is(error, 'ERR_BUSY')) return
    warnings.push(`the order of faults could not be written, a guest may wait longer the next time: ${wordsAbout(path, error)}`)
  }
}

/** A saved VM that is only to be read stays as it is, and nobody need hear of it each time. */
function isReadOnly(error: unknown): boolean {
  const code = String((error as { code?: unknown }).code)
  const cause = (error as { cause?: unknown }).cause
  return ['EROFS', 'EACCES', 'EPERM', 'ERR_READ_ONLY'].includes(code) || (cause !== undefined && isReadOnly(cause))
}

function wordsAbout(path: string, error: unknown): string {
  const words = error instanceof Error ? error.message : String(error)
  return words.startsWith(path) ? words : `${path}: ${words}`
}
