/**
 * A filter that runs a device's requests against a rotational disk in virtual time. Owns the virtual
 * clock and the order of completions; the mechanics are in `disk-model.ts`, the bytes in the inner device.
 *
 * **How a queue comes about in virtual time.** The clock stands still while callers run. A request is
 * issued at the clock's time plus the host gap, so all requests of one turn of the event loop, and all
 * that are sent before any of them completes, wait in the disk's queue together. The disk then completes
 * them first come, first served: it sets the clock to the completion's time, settles that one promise,
 * and lets a whole turn of the event loop pass before the next completion, so that whoever waited for
 * this one can send its next request at this virtual time, while the others are still queued.
 *
 * Real time never enters: the same requests in the same order give the same figures on any machine. A
 * caller that waits for something else in between (a file, a timer) finds the queue run dry, as a host
 * too slow for its disk would; feed from memory, or say with {@link SimulatedDisk.idle} how long it takes.
 */
import type { BlockDevice, CallOptions, WriteOptions, WriteZeroesOptions } from './device.ts'
import { disk15k, diskAtRest, mediaRate, serve, type DiskParameters, type DiskState, type SectorRange } from './disk-model.ts'
import { FilterDevice } from './filter.ts'

/** One command as the disk saw it, in the way a block trace shows it. Times in microseconds of virtual time. */
export interface DiskCommand {
  readonly operation: 'read' | 'write'
  /** First byte, a multiple of the sector size. */
  readonly offset: number
  /** Bytes, a multiple of the sector size. */
  readonly length: number
  /** When the host sent it. */
  readonly issued: number
  /** When its first sector passed under the head. */
  readonly started: number
  readonly completed: number
  /** Answered from the disk's segment cache. */
  readonly cached: boolean
  /** Commands in the disk, this one included, when it was sent. */
  readonly depth: number
}

/** Options of {@link simulatedDisk}; what is left out is {@link disk15k}. */
export interface SimulatedDiskOptions extends Partial<DiskParameters> {
  /** Microseconds the host needs from a completion to its next command; default 100. */
  readonly hostGap?: number | undefined
  /** Called for each command when it completes. */
  readonly onCommand?: ((command: DiskCommand) => void) | undefined
}

/** What runs when a command completes: the next command of the same request, or its end. */
interface Pending {
  readonly command: DiskCommand
  readonly done: () => void
}

/**
 * A {@link BlockDevice} whose time is simulated; see {@link simulatedDisk}.
 */
export class SimulatedDisk extends FilterDevice {
  /** The disk that is simulated. */
  readonly parameters: DiskParameters
  readonly #hostGap: number
  readonly #onCommand: ((command: DiskCommand) => void) | undefined
  #state: DiskState = diskAtRest
  #clock = 0
  #pending: Pending[] = []
  #running = false

  constructor(inner: BlockDevice, options: SimulatedDiskOptions = {}) {
    super(inner)
    const { hostGap = 100, onCommand, ...parameters } = options
    this.parameters = { ...disk15k, ...parameters }
    checkParameters(this.parameters, hostGap)
    this.#hostGap = hostGap
    this.#onCommand = onCommand
  }

  /** Microseconds of virtual time since the disk was made. */
  get elapsed(): number {
    return this.#clock
  }

  /** Bytes per second of the medium: no pattern of requests is faster. */
  get mediaRate(): number {
    return mediaRate(this.parameters)
  }

  /** Lets `microseconds` of virtual time pass on the host, as if it computed. */
  idle(microseconds: number): void {
    if (!(microseconds >= 0)) throw new RangeError(`microseconds must be 0 or more, not ${microseconds}`)
    this.#clock += microseconds
  }

  protected override onRead(offset: number, target: Uint8Array, options?: CallOptions): Promise<void> {
    const moved = this.inner.readInto(offset, target, options)
    return this.#after(moved, (end) => this.#send('read', this.#sectors(offset, target.length), end))
  }

  protected override onWrite(offset: number, source: Uint8Array, options?: WriteOptions): Promise<void> {
    const moved = this.inner.write(offset, source, options)
    return this.#after(moved, (end) => this.#sendWrite(offset, source.length, end))
  }

  /** A disk without a command for zeroes: they are written. */
  protected override onWriteZeroes(offset: number, length: number, options?: WriteZeroesOptions): Promise<void> {
    const moved = this.inner.writeZeroes(offset, length, options)
    return this.#after(moved, (end) => this.#sendWrite(offset, length, end))
  }

  /** Costs no time: nothing moves. */
  protected override onDiscard(offset: number, length: number, options?: CallOptions): Promise<void> {
    return this.inner.discard(offset, length, options)
  }

  /** Costs no time: the disk has no write cache. */
  protected override onFlush(options?: CallOptions): Promise<void> {
    return this.inner.flush(options)
  }

  /** Settles when the bytes have moved and the simulated time has come, whichever happens later in real time. */
  #after(moved: Promise<void>, start: (end: () => void) => void): Promise<void> {
    const timed = new Promise<void>((resolve) => start(resolve))
    return Promise.all([moved, timed]).then(() => undefined)
  }

  /**
   * A write of whole sectors is one command. Where it begins or ends within a sector the host reads that
   * sector first, then writes, each after the completion of the one before: read-modify-write.
   */
  #sendWrite(offset: number, length: number, end: () => void): void {
    const { sectorSize } = this.parameters
    const whole = this.#sectors(offset, length)
    const last = offset + length
    const edges: SectorRange[] = []
    if (offset % sectorSize !== 0) edges.push({ start: whole.start, end: whole.start + 1 })
    const sharesHead = edges.length > 0 && whole.end - whole.start === 1
    if (last % sectorSize !== 0 && !sharesHead) edges.push({ start: whole.end - 1, end: whole.end })
    const next = (): void => {
      const edge = edges.shift()
      if (edge === undefined) this.#send('write', whole, end)
      else this.#send('read', edge, next)
    }
    next()
  }

  #sectors(offset: number, length: number): SectorRange {
    const { sectorSize } = this.parameters
    return { start: Math.floor(offset / sectorSize), end: Math.ceil((offset + length) / sectorSize) }
  }

  /** Puts a command into the disk's queue. First come, first served: its times are known at once. */
  #send(operation: 'read' | 'write', range: SectorRange, done: () => void): void {
    const issued = this.#clock + this.#hostGap
    const { state, times } = serve(this.parameters, this.#state, { operation, ...range, issued })
    this.#state = state
    const { sectorSize } = this.parameters
    const offset = range.start * sectorSize
    const length = (range.end - range.start) * sectorSize
    this.#pending.push({ command: { operation, offset, length, issued, ...times, depth: this.#pending.length + 1 }, done })
    if (!this.#running) {
      this.#running = true
      nextTurn(() => this.#completeOne())
    }
  }

  #completeOne(): void {
    const first = this.#pending.shift()
    if (first === undefined) {
      this.#running = false
      return
    }
    this.#clock = Math.max(this.#clock, first.command.completed)
    this.#onCommand?.(first.command)
    first.done()
    nextTurn(() => this.#completeOne())
  }
}

/**
 * Puts a rotational disk's timing in front of a device: transfer rate, seek, rotational latency by
 * platter angle, the disk's segment cache and read-ahead, and the read-modify-write of partial sectors;
 * no page cache. Deterministic: `elapsed` depends on the requests alone.
 *
 * ```ts
 * const disk = simulatedDisk(new MemoryDevice(64 * MiB))
 * await disk.write(0, bytes)
 * console.log(disk.elapsed / 1000, 'ms')
 * ```
 *
 * The result owns `device` and closes it.
 * @throws RangeError for parameters no disk can have.
 */
export function simulatedDisk(device: BlockDevice, options: SimulatedDiskOptions = {}): SimulatedDisk {
  return new SimulatedDisk(device, options)
}

function checkParameters(disk: DiskParameters, hostGap: number): void {
  for (const [name, value] of Object.entries({ ...disk, hostGap })) {
    if (!Number.isFinite(value) || value < 0) throw new RangeError(`${name} must be a number of 0 or more, not ${value}`)
  }
  for (const name of ['rpm', 'sectorsPerTrack', 'sectorSize', 'physicalSectorSize', 'segments'] as const) {
    if (disk[name] === 0) throw new RangeError(`${name} must not be 0`)
  }
  if (disk.physicalSectorSize % disk.sectorSize !== 0) {
    throw new RangeError(`physicalSectorSize is ${disk.physicalSectorSize}, must be a multiple of sectorSize (${disk.sectorSize})`)
  }
}

/** Runs `task` after the current turn of the event loop and all promise reactions it has queued. */
function nextTurn(task: () => void): void {
  if (typeof setImmediate === 'function') setImmediate(task)
  else setTimeout(task, 0)
}
