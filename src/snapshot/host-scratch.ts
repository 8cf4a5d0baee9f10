/** Files and folders that are there only while a VM is saved. Owns that only this user and QEMU's can use them. */
import { randomBytes } from 'node:crypto'
import { chown, open } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join, resolve } from 'node:path'
import type { Qmp } from '../qmp/client.ts'
import { qemuUser } from './host-qemu.ts'
import { removeFile } from './host-files.ts'

/** A file that is there only for a while. */
export interface ScratchFile {
  /** Absolute. */
  readonly path: string
  /** Unique, of letters and digits. */
  readonly name: string
  /** Lets the user QEMU runs as have the file, as far as this process may: root. */
  handOver(): Promise<void>
  remove(): Promise<void>
}

/** The system's folder for files that are there only for a while. */
export function temporaryFolder(): string {
  return tmpdir()
}

/** Makes an empty file in `folder` that nobody but this user can open. */
export async function makeScratchFile(folder: string, qmp: Qmp): Promise<ScratchFile> {
  const name = randomBytes(8).toString('hex')
  const path = join(resolve(folder), `.qcow2-save-${name}`)
  await (await open(path, 'wx', 0o600)).close()
  return { path, name, handOver: () => giveTo(qmp, path), remove: () => removeFile(path) }
}

/** Hands files to the user QEMU runs as, where that is another one and this process may: root, for a QEMU of libvirt. */
export async function giveTo(qmp: Qmp, ...paths: readonly string[]): Promise<void> {
  if (process.getuid?.() !== 0) return
  const user = await qemuUser(qmp)
  if (user === undefined || user.uid === 0) return
  for (const path of paths) await chown(path, user.uid, user.gid)
}
