/** Performs operations on an image and on its model side by side. Owns which refusals the format asks for. */
import type { BlockDevice } from '../block/device.ts'
import { openFile } from '../block/file.ts'
import { FilterDevice } from '../block/filter.ts'
import { MemoryDevice } from '../block/memory.ts'
import { Qcow2Error, type ErrorCode } from '../core/errors.ts'
import { Qcow2Image } from '../qcow2/image.ts'
import { ModelDisk } from './model-disk.ts'
import { touchedRanges, type GuestRange, type ImageOperation } from './operations.ts'
import type { ImageParameters } from './parameters.ts'
import { seededBytes } from './seeded-bytes.ts'

/** A difference between an image and its model, or an operation that failed where it must not. */
export class ModelMismatch extends Error {
  override readonly name = 'ModelMismatch'
}

/**
 * Makes an image, performs the operations on it and closes it.
 * @param target a path, with the backing file beside it at `PATH.backing`; or a device, which stays open
 * @returns what a guest must read from it
 * @throws ModelMismatch if the image reads differently from the model, at any time
 */
export async function buildImage(
  target: string | BlockDevice,
  parameters: ImageParameters,
  operations: readonly ImageOperation[] = [],
): Promise<ModelDisk> {
  const model = new ModelDisk(parameters.size)
  const { backing } = parameters
  if (backing !== undefined) await writeBackingFile(target, seededBytes(backing.size, backing.seed), model)
  const { size, clusterSize, version, refcountBits, extendedL2, lazyRefcounts, preallocation } = parameters
  const image = await Qcow2Image.create(typeof target === 'string' ? target : keepOpen(target), {
    size,
    clusterSize,
    version,
    refcountBits,
    extendedL2,
    lazyRefcounts,
    preallocation,
    ...(backing === undefined ? {} : { backing: { file: `${fileName(target)}.backing`, format: 'raw' } }),
  })
  await performOperations({ image, model, parameters, reopen: () => Qcow2Image.open(typeof target === 'string' ? target : keepOpen(target)) }, operations)
  return model
}

/**
 * Performs the operations on an open image and on its model, compares all they read, and closes the image.
 * @throws ModelMismatch if the image reads differently from the model, at any time
 */
export async function performOperations(subject: Subject, operations: readonly ImageOperation[]): Promise<void> {
  const run = new Run(subject)
  try {
    for (const [index, operation] of operations.entries()) {
      try {
        subject.observe?.('before', operation)
        await run.step(operation)
        subject.observe?.('after', operation)
      } catch (cause) {
        throw new ModelMismatch(`operation ${index}, ${operation.kind}: ${cause instanceof Error ? cause.message : String(cause)}`, { cause })
      }
    }
    await run.compareAll()
  } finally {
    await run.close()
  }
}

/** An image, what it must read as, and the parameters it was made with. */
export interface Subject {
  readonly image: Qcow2Image
  readonly model: ModelDisk
  readonly parameters: ImageParameters
  /** Opens the image again, after it was closed. */
  readonly reopen: () => Promise<Qcow2Image>
  /** Told before and after each operation; the model is then as the image must be. */
  readonly observe?: (moment: 'before' | 'after', operation: ImageOperation) => void
}

/** An operation on ranges of the disk. */
type RangeOperation = Extract<ImageOperation, { offset: number } | { parts: unknown }>

class Run {
  #image: Qcow2Image
  readonly #subject: Subject
  readonly #model: ModelDisk

  constructor(subject: Subject) {
    this.#subject = subject
    this.#image = subject.image
    this.#model = subject.model
  }

  close(): Promise<void> {
    return this.#image.close()
  }

  async step(operation: ImageOperation): Promise<void> {
    switch (operation.kind) {
      case 'snapshot create':
        return this.#createSnapshot(operation.vmState)
      case 'snapshot apply':
      case 'snapshot delete':
        return this.#useSnapshot(operation)
      case 'resize':
        return this.#resize(operation.size)
      case 'flush':
        return this.#image.flush()
      case 'reopen':
        await this.#image.close()
        this.#image = await this.#subject.reopen()
        return this.compareAll()
      default:
        return this.#access(operation)
    }
  }

  /** Operations on ranges of the disk; afterwards these are read and compared. */
  async #access(operation: RangeOperation): Promise<void> {
    const ranges = touchedRanges(operation, this.#model.size, this.#subject.parameters.clusterSize)
    const seeds = operation.kind === 'write concurrently' ? operation.parts.map(({ seed }) => seed) : undefined
    await Promise.all(ranges.map((range, index) => this.#accessRange(operation, range, seeds?.[index])))
    for (const { offset, length } of ranges) {
      compare(await this.#image.read(offset, length), this.#model.bytes.subarray(offset, offset + length), `at offset ${offset}`)
    }
  }

  async #accessRange(operation: RangeOperation, { offset, length }: GuestRange, seed: number | undefined): Promise<void> {
    switch (operation.kind) {
      case 'write':
      case 'write concurrently': {
        const bytes = seededBytes(length, seed ?? ('seed' in operation ? operation.seed : 0))
        this.#model.write(offset, bytes)
        return this.#image.write(offset, bytes)
      }
      case 'write compressed': {
        const bytes = compressibleBytes(length, operation.seed)
        this.#model.write(offset, bytes)
        this.#model.compressed = true
        return this.#image.writeCompressed(offset, bytes)
      }
      case 'write zeroes':
        this.#model.writeZeroes(offset, length)
        return this.#image.writeZeroes(offset, length, { unmap: operation.unmap })
      case 'discard':
        await this.#image.discard(offset, length)
        return this.#adoptDiscarded(offset, length)
      case 'read':
    }
  }

  /** Discarded bytes read as zeroes or as before: either is right, but it must stay so. */
  async #adoptDiscarded(offset: number, length: number): Promise<void> {
    const now = await this.#image.read(offset, length)
    const before = this.#model.bytes.subarray(offset, offset + length)
    for (let at = 0; at < length; at++) {
      if (now[at] !== 0 && now[at] !== before[at]) throw new ModelMismatch(`byte ${offset + at} is neither zero nor as before the discard`)
    }
    this.#model.write(offset, now)
  }

  async #createSnapshot(vmState: { length: number; seed: number } | undefined): Promise<void> {
    const name = this.#model.newName
    const state = vmState === undefined ? new Uint8Array(0) : seededBytes(vmState.length, vmState.seed)
    const create = this.#image.snapshots.create({ name, ...(vmState === undefined ? {} : { vmState: piecesOf(state) }) })
    if (!(await this.#refusedForCounters(create))) this.#model.createSnapshot(name, state)
  }

  async #useSnapshot(operation: { readonly kind: 'snapshot apply' | 'snapshot delete'; readonly index: number }): Promise<void> {
    const names = this.#model.snapshots
    const name = names[operation.index % Math.max(1, names.length)]
    if (name === undefined) return
    if (operation.kind === 'snapshot delete') {
      await this.#image.snapshots.delete(name)
      this.#model.deleteSnapshot(name)
    } else if (!(await this.#refusedForCounters(this.#image.snapshots.apply(name)))) this.#model.applySnapshot(name)
  }

  /**
   * Every snapshot and the disk count once for a cluster, one of them twice while they are switched; a host cluster
   * counts for each compressed cluster in it, and these take at least 4 bytes. Narrow counters may be too narrow then.
   */
  async #refusedForCounters(call: Promise<unknown>): Promise<boolean> {
    if (!(await refusal(call, 'ERR_RANGE'))) return false
    const { refcountBits, clusterSize } = this.#subject.parameters
    const sharers = this.#model.compressed ? clusterSize / 4 : 1
    const references = (this.#model.snapshots.length + 2) * sharers
    if (references <= 2 ** refcountBits - 1) throw new ModelMismatch(`refused, though counters of ${refcountBits} bits are wide enough`)
    return true
  }

  /** Version 2 stores no disk size with a snapshot, so its disk cannot change size while it has any. */
  async #resize(size: number): Promise<void> {
    const mayRefuse = this.#subject.parameters.version === 2 && this.#model.snapshots.length > 0
    if (!mayRefuse) await this.#image.resize(size)
    else if (await refusal(this.#image.resize(size), 'ERR_UNSUPPORTED')) return
    this.#model.resize(size)
  }

  /** The disk and every snapshot. */
  async compareAll(): Promise<void> {
    const image = this.#image
    if (image.size !== this.#model.size) throw new ModelMismatch(`size is ${image.size}, not ${this.#model.size}`)
    compare(await image.read(0, image.size), this.#model.bytes, 'of the disk')
    const names = Array.from(image.snapshots, ({ name }) => name)
    if (names.join() !== this.#model.snapshots.join()) throw new ModelMismatch(`snapshots are ${names.join()}`)
    for (const name of names) {
      await using disk = await image.snapshots.open(name)
      const expected = this.#model.snapshot(name)
      compare(await disk.read(0, disk.size), expected.disk, `of ${name}`)
      compare(await disk.vmState.read(0, disk.vmState.size), expected.vmState, `of the VM state of ${name}`)
    }
  }
}

/** Half of it compresses well, half does not. */
function compressibleBytes(length: number, seed: number): Uint8Array {
  return seededBytes(length, seed).fill(seed & 255, Math.floor(length / 2))
}

/** Pieces of odd sizes, as a stream gives them. */
function* piecesOf(bytes: Uint8Array): Generator<Uint8Array> {
  const piece = 4104
  for (let at = 0; at < bytes.length; at += piece) yield bytes.subarray(at, at + piece)
}

/** True if the call was refused with this code; any other error is thrown on. */
async function refusal(call: Promise<unknown>, code: ErrorCode): Promise<boolean> {
  try {
    await call
    return false
  } catch (error) {
    if (Qcow2Error.is(error, code)) return true
    throw error
  }
}

function compare(actual: Uint8Array, expected: Uint8Array, where: string): void {
  if (actual.length !== expected.length) throw new ModelMismatch(`${actual.length} bytes instead of ${expected.length} ${where}`)
  for (let at = 0; at < actual.length; at++) {
    if (actual[at] !== expected[at]) throw new ModelMismatch(`byte ${at} ${where} is ${actual[at]}, not ${expected[at]}`)
  }
}

async function writeBackingFile(target: string | BlockDevice, content: Uint8Array, model: ModelDisk): Promise<void> {
  if (typeof target !== 'string') throw new TypeError('an image with a backing file needs a path')
  await using file = await openFile(`${target}.backing`, { create: 'w' })
  await file.write(0, content)
  model.write(0, content.subarray(0, model.size))
}

function fileName(target: string | BlockDevice): string {
  return typeof target === 'string' ? target.slice(target.lastIndexOf('/') + 1) : ''
}

/** A device whose owner closes it, so that an image on it can be closed and opened again. */
export function keepOpen(device: BlockDevice): BlockDevice {
  return new KeptOpenDevice(device)
}

class KeptOpenDevice extends FilterDevice {
  protected override onClose(): Promise<void> {
    return Promise.resolve()
  }
}

/** An empty device in memory that grows like a file. */
export function emptyFile(): MemoryDevice {
  return new MemoryDevice(0, { growable: true })
}
