/** Where saved memory goes, by the file's name and the options `--as`, `--name` and `--backing`. */
import { lstatSync } from 'node:fs'
import { basename, dirname, resolve } from 'node:path'
import type { MemoryTarget } from '../../snapshot/memory-target.ts'
import type { SaveSink } from '../../snapshot/save-sink.ts'
import { UsageError } from '../errors.ts'
import { isPipe } from '../payload.ts'

/** The options. */
export const memoryTargetOptions = {
  as: {
    value: 'KIND',
    choices: ['ram-image', 'snapshot', 'stream'],
    help: "'ram-image' (default): a new qcow2 whose disk is the memory, which reverts at once; 'snapshot': a snapshot inside the existing image FILE, as savevm makes; 'stream': the bytes as QEMU sends them",
  },
  name: { value: 'NAME', help: 'with --as=snapshot: name of the snapshot' },
  backing: { value: 'RAMIMAGE', file: true, help: 'an earlier RAM image of the VM: only what changed since is stored. A relative path is seen from the working directory' },
} as const

interface Values {
  readonly as: string | undefined
  readonly name: string | undefined
  readonly backing: string | undefined
}

/** What the options come to. @throws UsageError for options that do not go together */
export function memoryTarget(file: string, { as: kind = 'ram-image', name, backing }: Values): MemoryTarget {
  if (kind !== 'snapshot' && name !== undefined) throw new UsageError('--name goes with --as=snapshot')
  if (kind !== 'ram-image' && backing !== undefined) throw new UsageError('--backing goes with RAM images')
  if (kind === 'stream') return { stream: file }
  if (isPipe(file)) throw new UsageError(`${file === '-' ? 'stdout' : file} takes bytes in their order only: give --as=stream`)
  if (kind !== 'snapshot') return backing === undefined ? file : { ramImage: file, backing: seenFrom(file, backing) }
  if (name === undefined) throw new UsageError('--as=snapshot needs --name')
  return { image: file, snapshot: name }
}

/** The name by which `image` finds a file that the caller names: a bare one in the same folder, so that both can move; else an absolute one. */
function seenFrom(image: string, backing: string): string {
  const [path, folder] = [resolve(backing), dirname(resolve(image))]
  const isLink = lstatSync(image, { throwIfNoEntry: false })?.isSymbolicLink() === true
  return !isLink && dirname(path) === folder && !basename(path).includes(':') ? basename(path) : path
}

/** Sends a stream on as it comes. What went into a pipe cannot be taken back: a stream that is not whole ends early, and nobody loads it. */
export function pipeSink(send: (bytes: Uint8Array) => Promise<void>): SaveSink {
  return { write: send, finish: () => Promise.resolve(), abort: () => Promise.resolve() }
}
