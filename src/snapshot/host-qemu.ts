/** The process of a QEMU whose monitor we have, where it runs on this host: what only the system knows of it. */
import { readdir, readFile, readlink, realpath } from 'node:fs/promises'
import { isAbsolute, join, resolve } from 'node:path'
import type { Qmp } from '../qmp/client.ts'

/**
 * The folder against which a QEMU resolves relative paths; undefined where it cannot be known: QEMU runs elsewhere or as
 * another user. The thread of a CPU, which the monitor tells, leads to it; that the process has one of `files` open proves
 * that it is this QEMU, and not a process of that number on another host or in another container.
 */
export async function qemuFolder(qmp: Qmp, files: readonly string[]): Promise<string | undefined> {
  const [cpu] = await qmp.execute('query-cpus-fast')
  if (cpu === undefined) return undefined
  const process = `/proc/${cpu['thread-id']}`
  try {
    const folder = await readlink(join(process, 'cwd'))
    const open = new Set(await openFiles(process))
    for (const file of files) {
      const path = await realpath(resolve(folder, file)).catch(() => undefined)
      if (path !== undefined && open.has(path)) return folder
    }
  } catch {
    // not ours to look at, or no such process
  }
  return undefined
}

/** Who a process runs as. */
export interface ProcessUser {
  readonly uid: number
  readonly gid: number
}

/** The user a QEMU runs as; undefined where it is no process of this host. */
export async function qemuUser(qmp: Qmp): Promise<ProcessUser | undefined> {
  const [cpu] = await qmp.execute('query-cpus-fast')
  const status = cpu === undefined ? '' : await readFile(`/proc/${cpu['thread-id']}/status`, 'utf8').catch(() => '')
  // the thread of a CPU is called so where QEMU names its threads, else as the program
  if (!/^Name:\s+(qemu|CPU )/m.test(status)) return undefined
  const [uid, gid] = ['Uid', 'Gid'].map((field) => Number(new RegExp(`^${field}:\\s+\\d+\\s+(\\d+)`, 'm').exec(status)?.[1]))
  return Number.isInteger(uid) && Number.isInteger(gid) ? { uid: uid!, gid: gid! } : undefined
}

async function openFiles(process: string): Promise<string[]> {
  const numbers = await readdir(join(process, 'fd'))
  return Promise.all(numbers.map((number) => readlink(join(process, 'fd', number)).catch(() => '')))
}

/** `file`, as QEMU names it, as an absolute path where that can be told; what is no path (`nbd://…`, `json:…`) stays as it is. */
export function absolutePath(file: string, folder: string | undefined): string {
  if (folder === undefined || isAbsolute(file) || /^[A-Za-z][A-Za-z0-9+.-]*:/.test(file)) return file
  return resolve(folder, file)
}
