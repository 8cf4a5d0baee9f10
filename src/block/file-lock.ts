/**
 * Recognises that a running QEMU holds an image. QEMU takes advisory locks on single bytes of the
 * file: byte 100 + p for each permission p that it holds, byte 200 + p for each that it does not
 * share with others. Node can neither take nor test such locks, but Linux lists them in `/proc/locks`.
 * So QEMU's use is seen here, while ours stays unseen by QEMU. Other processes of this library are `file-claim.ts`.
 */
import { open, readFile, stat } from 'node:fs/promises'
import { constants, fstatSync, type BigIntStats } from 'node:fs'
import type { FileHandle } from 'node:fs/promises'
import { Qcow2Error } from '../core/errors.ts'
import { writtenHere } from './file-claim.ts'
import { fileIdentity } from './file-identity.ts'
import { loopDevices } from './file-loop.ts'
import { deviceNumbers, mountDevice } from './file-mount.ts'
import { processFiles } from './file-registry.ts'
import { systemPath } from './file-path.ts'

/** What a QEMU may hold or withhold, by QEMU's names; the order is that of the lock bytes. */
export const lockPermissions = ['consistent read', 'write', 'write unchanged', 'resize'] as const

/** One of {@link lockPermissions}. */
export type LockPermission = (typeof lockPermissions)[number]

/** The locks that all running QEMUs together have on a file. */
export interface ImageLocks {
  /** Permissions in use. */
  readonly held: ReadonlySet<LockPermission>
  /** Permissions that nobody else may use. */
  readonly unshared: ReadonlySet<LockPermission>
}

const heldBase = 100
const unsharedBase = 200

/** A path, a `file:` URL, an open `FileHandle` or a descriptor. */
type OpenOrNamed = string | URL | FileHandle | number

/**
 * The locks of running QEMUs on `file`; both sets are empty where there are none, and where the system does not
 * list locks (other systems than Linux).
 */
export async function readImageLocks(file: string | URL | FileHandle | number): Promise<ImageLocks> {
  const [list, stat] = await Promise.all([readFile('/proc/locks', 'utf8').catch(() => ''), statOf(file)])
  const locks = await locksIn(list, file, stat)
  if (!/ (?:OFDLCK|POSIX) /.test(list)) return locks
  // a QEMU on a loop device locks the device, one on its file the file
  const identity = fileIdentity(stat)
  const others = loopDevices().filter((loop) => fileIdentity(loop.file) === identity).flatMap(({ path, filePath }) => [path, filePath])
  const all = await Promise.all(others.map(async (path) => locksIn(list, path, await statOf(path))))
  const union = (which: keyof ImageLocks): Set<LockPermission> => new Set([locks, ...all].flatMap((each) => [...each[which]]))
  return others.length === 0 ? locks : { held: union('held'), unshared: union('unshared') }
}

/** The locks in the system's list on one file, without its other names. */
async function locksIn(list: string, file: OpenOrNamed, { dev, ino }: BigIntStats): Promise<ImageLocks> {
  const locks = parseLocks(list, dev, ino)
  if (locks.held.size + locks.unshared.size > 0 || !list.includes(`:${ino} `)) return locks
  // the list has the device of the file system, `stat` perhaps that of a part of it
  const mounted = await mountDeviceOf(file)
  return mounted === undefined || mounted === dev ? locks : parseLocks(list, mounted, ino)
}

async function mountDeviceOf(file: OpenOrNamed): Promise<bigint | undefined> {
  if (typeof file === 'number') return mountDevice(file)
  if (typeof file !== 'string' && !(file instanceof URL)) return mountDevice(file.fd)
  // whatever it is by now, opening it waits for nobody
  const handle = await open(typeof file === 'string' ? systemPath(file) : file, constants.O_RDONLY | constants.O_NONBLOCK)
  try {
    return await mountDevice(handle.fd)
  } finally {
    await handle.close()
  }
}

function statOf(file: OpenOrNamed): BigIntStats | Promise<BigIntStats> {
  if (typeof file === 'number') return fstatSync(file, { bigint: true })
  if (typeof file === 'string') return stat(systemPath(file), { bigint: true })
  return file instanceof URL ? stat(file, { bigint: true }) : file.stat({ bigint: true })
}

function nameOf(file: OpenOrNamed): string {
  return typeof file === 'string' || file instanceof URL ? String(file) : 'file'
}

/**
 * Fails if a running QEMU uses `file` so that it must not be opened: for writing, if it writes too or wants no
 * writers beside it; for reading, if it writes, because the metadata may be half-way in its cache. For writing it fails too if
 * an image of this process is open for writing on it.
 * @throws Qcow2Error `ERR_BUSY`
 */
export async function checkImageLocks(file: string | URL | FileHandle | number, access: 'read' | 'write', name: string = nameOf(file)): Promise<void> {
  if (access === 'write' && processFiles.written.has(fileIdentity(await statOf(file)))) throw writtenHere(name)
  const { held, unshared } = await readImageLocks(file)
  if (held.has('write')) {
    const advice = access === 'read' ? 'forceShare (--force-share) reads it nevertheless' : 'end it, or ask it for the change'
    throw new Qcow2Error('ERR_BUSY', `${name}: a running QEMU writes to this file; ${advice}`)
  }
  if (access === 'write' && unshared.has('write')) {
    throw new Qcow2Error('ERR_BUSY', `${name}: a running QEMU reads this file and wants nobody to write to it`)
  }
  if (unshared.has('consistent read')) {
    throw new Qcow2Error('ERR_BUSY', `${name}: a running QEMU has this file for itself`)
  }
}

/**
 * Lines as `4: OFDLCK ADVISORY READ -1 fe:00:1234 100 101`: the range is inclusive, or ends in `EOF`; device
 * numbers are hexadecimal; a line with `->` only waits.
 */
export function parseLocks(list: string, dev: bigint, ino: bigint): ImageLocks {
  const held = new Set<LockPermission>()
  const unshared = new Set<LockPermission>()
  const device = deviceNumbers(dev)
  for (const line of list.split('\n')) {
    const match = /^\d+: (?:OFDLCK|POSIX) +ADVISORY +(?:READ|WRITE) +-?\d+ ([0-9a-f]+):([0-9a-f]+):(\d+) (\d+) (\d+|EOF)$/.exec(line.trim())
    if (match === null) continue
    const [major, minor] = [BigInt(`0x${match[1]!}`), BigInt(`0x${match[2]!}`)]
    if (BigInt(match[3]!) !== ino || major !== device.major || minor !== device.minor) continue
    const first = Number(match[4])
    const last = match[5] === 'EOF' ? Number.POSITIVE_INFINITY : Number(match[5])
    for (const [index, permission] of lockPermissions.entries()) {
      if (first <= heldBase + index && heldBase + index <= last) held.add(permission)
      if (first <= unsharedBase + index && unsharedBase + index <= last) unshared.add(permission)
    }
  }
  return { held, unshared }
}
