/** What stands in the memory of a measured guest behind its own: random bytes, loaded from files when it starts. */
import { randomFillSync } from 'node:crypto'
import * as fs from 'node:fs'
import { join } from 'node:path'

const MiB = 1 << 20
/** Memory that the guest has for itself. */
const guestMiB = 64
/** Of one file: QEMU loads less than 2 GiB at a time. */
const fileMiB = 1024

/** Begins the names of the files. */
export const fillPrefix = 'fill-'

/** Three quarters of the memory behind the guest's own, below 3 GiB, are random, the rest is zero. `memory` in MiB; gives the paths. */
export function writeGuestMemory(folder: string, memory: number): string[] {
  const total = Math.min(Math.floor(((memory - guestMiB) * 3) / 4), 3072 - guestMiB)
  return Array.from({ length: Math.ceil(total / fileMiB) }, (_, index) => {
    const file = join(folder, `${fillPrefix}${index}`)
    writeRandom(file, Math.min(fileMiB, total - index * fileMiB))
    return file
  })
}

/** Arguments of the QEMU that loads the files. */
export function guestMemoryArguments(files: readonly string[]): string[] {
  return files.flatMap((file, index) => ['-device', `loader,file=${file},addr=${(guestMiB + index * fileMiB) * MiB},force-raw=on`])
}

function writeRandom(file: string, mebibytes: number): void {
  const descriptor = fs.openSync(file, 'w')
  for (let n = 0; n < mebibytes; n++) fs.writeSync(descriptor, randomFillSync(Buffer.allocUnsafe(MiB)))
  fs.closeSync(descriptor)
}
