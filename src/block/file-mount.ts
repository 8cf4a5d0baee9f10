/**
 * What Linux says of mounted file systems. `stat` on btrfs and bcachefs gives the device number of the subvolume, `/proc/locks`
 * that of the file system; the list of mounts has the latter.
 */
import { readFile } from 'node:fs/promises'

/** The device number, as `stat` packs it, of the file system an open descriptor is on; undefined where that is not told. */
export async function mountDevice(fd: number): Promise<bigint | undefined> {
  const [fdinfo, mounts] = await Promise.all([read(`/proc/self/fdinfo/${fd}`), read('/proc/self/mountinfo')])
  return parseMountDevice(fdinfo, mounts)
}

/** True if something is mounted at exactly `path`, its real path: a file mounted there cannot be replaced. */
export async function isMountPoint(path: string): Promise<boolean> {
  return mountPoints(await read('/proc/self/mountinfo')).includes(path)
}

/**
 * `fdinfo` has a line `mnt_id: 29`, `mountinfo` lines as
 * `29 1 0:27 /subvolume /mnt rw,noatime shared:1 - btrfs /dev/sda2 rw`.
 */
export function parseMountDevice(fdinfo: string, mountinfo: string): bigint | undefined {
  const id = /^mnt_id:\s*(\d+)$/m.exec(fdinfo)?.[1]
  const match = id === undefined ? null : new RegExp(`^${id} \\d+ (\\d+):(\\d+) `, 'm').exec(mountinfo)
  return match === null ? undefined : packDevice(BigInt(match[1]!), BigInt(match[2]!))
}

/** Where something is mounted; blanks and such are written as `\040`. */
export function mountPoints(mountinfo: string): string[] {
  return mountinfo.split('\n').flatMap((line) => {
    const point = line.split(' ')[4]
    return point === undefined ? [] : [point.replace(/\\([0-7]{3})/g, (_, octal: string) => String.fromCharCode(Number.parseInt(octal, 8)))]
  })
}

/** The two numbers of a device that `stat` packs into one. */
export function deviceNumbers(device: bigint): { readonly major: bigint; readonly minor: bigint } {
  return {
    major: ((device >> 8n) & 0xfffn) | ((device >> 32n) & ~0xfffn),
    minor: (device & 0xffn) | ((device >> 12n) & 0xffff_ff00n),
  }
}

function packDevice(major: bigint, minor: bigint): bigint {
  return (minor & 0xffn) | ((major & 0xfffn) << 8n) | ((minor & ~0xffn) << 12n) | ((major & ~0xfffn) << 32n)
}

function read(path: string): Promise<string> {
  return readFile(path, 'utf8').catch(() => '')
}
