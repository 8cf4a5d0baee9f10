/**
 * A load of random requests of 4 KiB, on an image and on its file with plain `fs` calls. As a program it runs the load
 * it is given as JSON and prints the seconds: for settings that Node takes only at its start.
 */
import * as fs from 'node:fs'
import { execFileSync } from 'node:child_process'
import { fileURLToPath } from 'node:url'
import { allocateAligned } from '../src/block.ts'
import { Qcow2Image, type OpenOptions } from '../src/index.ts'
import type { Measured } from './harness.ts'

export const requestSize = 4096
/** How far the next request lies from the last, as `qemu-img bench -S`: no two are near each other. */
export const step = 32_440_320

export interface Load {
  readonly path: string
  readonly depth: number
  readonly count: number
  readonly write: boolean
}

type Transfer = (offset: number, bytes: Uint8Array) => Promise<void>

/** Keeps `depth` requests in flight until all are done. */
async function runLanes({ depth, count }: Load, size: number, transfer: Transfer): Promise<Measured> {
  let left = count
  let offset = 0
  const lane = async (): Promise<void> => {
    const bytes = allocateAligned(requestSize)
    while (left-- > 0) {
      const at = offset
      offset = (offset + step) % size
      await transfer(at, bytes)
    }
  }
  const before = performance.now()
  await Promise.all(Array.from({ length: depth }, lane))
  return { seconds: (performance.now() - before) / 1000 }
}

/** Through the image. Timed without opening and closing, as qemu-img bench is. */
export async function throughImage(load: Load, options: OpenOptions): Promise<Measured> {
  await using image = await Qcow2Image.open(load.path, { ...options, readOnly: !load.write })
  return await runLanes(load, image.size, (at, bytes) => (load.write ? image.write(at, bytes) : image.readInto(at, bytes)))
}

/** The same bytes of the file, with O_DIRECT and nothing in between: what Node itself reaches. */
export async function throughFs(load: Load, synchronous: boolean): Promise<Measured> {
  const { size, hostOffset } = await placesOf(load.path)
  const fd = fs.openSync(load.path, (load.write ? fs.constants.O_RDWR : fs.constants.O_RDONLY) | (fs.constants as { O_DIRECT?: number }).O_DIRECT!)
  try {
    return await runLanes(load, size, synchronous ? syncTransfer(fd, load.write, hostOffset) : asyncTransfer(fd, load.write, hostOffset))
  } finally {
    fs.closeSync(fd)
  }
}

/** In a Node of its own, started with `environment`; a first run warms it up. */
export function inOwnNode(load: Load, environment: Readonly<Record<string, string>>): Measured {
  // tsx is found from the project's folder
  const cwd = fileURLToPath(new URL('..', import.meta.url))
  const args = ['--import', 'tsx', fileURLToPath(import.meta.url), JSON.stringify(load)]
  const printed = execFileSync(process.execPath, args, { encoding: 'utf8', cwd, env: { ...process.env, ...environment } })
  return { seconds: Number(printed) }
}

interface Places {
  readonly size: number
  readonly hostOffset: (guest: number) => number
}

async function placesOf(path: string): Promise<Places> {
  await using image = await Qcow2Image.open(path, { readOnly: true })
  const runs: { start: number; end: number; host: number }[] = []
  for await (const { start, length, offset } of image.map()) runs.push({ start, end: start + length, host: offset! })
  return {
    size: image.size,
    hostOffset(guest) {
      const run = runs.find(({ start, end }) => start <= guest && guest < end)!
      return run.host + guest - run.start
    },
  }
}

function asyncTransfer(fd: number, write: boolean, hostOffset: Places['hostOffset']): Transfer {
  return (at, bytes) =>
    new Promise((resolve, reject) => {
      const moved = (error: Error | null): void => (error === null ? resolve() : reject(error))
      if (write) fs.write(fd, bytes, 0, bytes.length, hostOffset(at), moved)
      else fs.read(fd, bytes, 0, bytes.length, hostOffset(at), moved)
    })
}

function syncTransfer(fd: number, write: boolean, hostOffset: Places['hostOffset']): Transfer {
  const done = Promise.resolve()
  return (at, bytes) => {
    if (write) fs.writeSync(fd, bytes, 0, bytes.length, hostOffset(at))
    else fs.readSync(fd, bytes, 0, bytes.length, hostOffset(at))
    return done
  }
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const load = JSON.parse(process.argv[2]!) as Load
  await throughImage(load, { direct: true })
  console.log((await throughImage(load, { direct: true })).seconds)
}
