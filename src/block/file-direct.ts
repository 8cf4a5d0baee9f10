/**
 * Finds which alignment direct I/O on a descriptor demands. No system call that Node has tells it, so
 * it is tried out with reads, smallest first, memory and offset apart.
 */
import * as fs from 'node:fs'
import { directRefused, systemCode } from './file-error.ts'
import { allocateAligned, memoryPage } from './slab.ts'

/** Alignments in bytes. */
export interface DirectAlignment {
  readonly request: number
  readonly memory: number
}

const candidates: readonly number[] = [512, 1024, 2048, 4096]

/**
 * @param size of the file in bytes: one too short to be tried gets the largest alignment, because
 *   the system accepts any read past the end
 * @throws UnsupportedError if even page-aligned reads are refused
 */
export async function probeAlignment(fd: number, size: number, name: string): Promise<DirectAlignment> {
  const page = { request: memoryPage, memory: memoryPage }
  if (size < 2 * memoryPage) return page
  const buffer = allocateAligned(3 * memoryPage)
  const accepts = (memoryOffset: number, alignment: number): Promise<boolean> =>
    tryRead(fd, buffer.subarray(memoryOffset, memoryOffset + alignment), alignment, name)
  for (const request of candidates) {
    if (!(await accepts(0, request))) continue
    for (const memory of candidates) if (await accepts(memory, request)) return { request, memory }
    return { request, memory: memoryPage }
  }
  throw directRefused(name, new Error('EINVAL'))
}

/** Reads at offset = length = `buffer.length`; false if the system finds that misaligned. */
function tryRead(fd: number, buffer: Uint8Array, offset: number, name: string): Promise<boolean> {
  return new Promise((resolve, reject) => {
    fs.read(fd, buffer, 0, buffer.length, offset, (error) => {
      if (error === null) resolve(true)
      else if (systemCode(error) === 'EINVAL') resolve(false)
      else reject(directRefused(name, error))
    })
  })
}
