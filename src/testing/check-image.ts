/** One verdict on an image file from this library's check and from the real one. */
import { openFile } from '../block/file.ts'
import { checkImage } from '../qcow2/check.ts'
import type { CheckReport } from '../qcow2/check-report.ts'
import { qemuCheck, type QemuCheck, type QemuImgOptions } from './qemu-img.ts'

/** What both checks found. */
export interface ImageVerdict {
  /** Nothing is wrong, by either check. */
  readonly clean: boolean
  /** Nothing worse than leaked clusters, by either check: what a crash may leave behind. */
  readonly consistent: boolean
  /** The report of this library. */
  readonly own: CheckReport
  /** The report of `qemu-img check`; `undefined` where there is none. */
  readonly qemu: QemuCheck | undefined
}

/** Checks the image file at `path` without changing it, with `qemu-img` too where it is installed. */
export async function checkImageFile(path: string, options: QemuImgOptions = {}): Promise<ImageVerdict> {
  await using device = await openFile(path, { readOnly: true })
  const own = await checkImage(device)
  const qemu = await qemuCheck(path, options)
  const consistent = own.corruptions + own.checkErrors === 0 && (qemu === undefined || qemu.exitCode === 0 || qemu.exitCode === 3)
  return { clean: consistent && own.leaks === 0 && (qemu?.exitCode ?? 0) === 0, consistent, own, qemu }
}
