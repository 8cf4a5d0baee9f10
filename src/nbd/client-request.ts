/**
 * One request of a client and what has come of its reply. Owns the rule that a reply answers what was asked:
 * every byte of a read exactly once, no context that was not agreed to; knows no connection.
 */
import { FormatError, IoError, type IoOperation } from '../core/errors.ts'
import { StatusRuns } from './client-map.ts'
import { Coverage } from './coverage.ts'
import { chunkDone, chunkTypes, commands, Cursor, errors, type ChunkHead } from './protocol.ts'

/** The status runs of a reply, by context id. */
export type ReplyStatus = ReadonlyMap<number, StatusRuns>

/** Errors of one reply: a server that has more to report only holds the connection. */
const maxErrors = 64

/** What a client asks. */
export interface RequestFields {
  readonly operation: IoOperation
  readonly command: number
  readonly flags?: number
  readonly offset: number
  readonly length: number
  /** Where the bytes of a read go. */
  readonly target?: Uint8Array
  /** The bytes of a write. */
  readonly payload?: Uint8Array
  readonly signal?: AbortSignal | undefined
}

/**
 * A request that waits for its reply. One that changes nothing can be left at once when its signal aborts;
 * a write cannot: it may yet land, so it ends first.
 */
export class ClientRequest {
  readonly fields: RequestFields
  /** The status runs once the reply is whole; empty for all but block status. */
  readonly outcome: Promise<ReplyStatus>
  readonly #status = new Map<number, StatusRuns>()
  readonly #answered: Coverage
  #target: Uint8Array | undefined
  #errors = 0
  #error: Error | undefined
  #resolve!: (status: ReplyStatus) => void
  #reject!: (error: unknown) => void

  constructor(fields: RequestFields) {
    this.fields = fields
    this.#target = fields.target
    this.#answered = new Coverage(fields.command === commands.read ? fields.length : 0)
    this.outcome = new Promise((resolve, reject) => {
      this.#resolve = resolve
      this.#reject = reject
    })
    const { command } = fields
    if (command === commands.read || command === commands.blockStatus || command === commands.flush) {
      fields.signal?.addEventListener('abort', this.#leave, { once: true })
    }
  }

  /** Bytes that follow a simple reply without an error. */
  get simpleLength(): number {
    return this.fields.command === commands.read ? this.fields.length : 0
  }

  /** A simple reply's bytes. */
  takeAll(bytes: Uint8Array): void {
    this.#place(0, bytes.length)?.set(bytes)
  }

  /** The number of an error in a reply, and the server's words. */
  takeError(error: number, message = ''): void {
    if (++this.#errors > maxErrors) throw wrong(`more than ${maxErrors} errors in one reply`)
    const { operation, offset, length } = this.fields
    const name = Object.entries(errors).find(([, value]) => value === error)?.[0] ?? `error ${error}`
    const code = error === errors.noSpace ? 'ERR_NO_SPACE' : 'ERR_IO'
    this.#error ??= new IoError(operation, message === '' ? `the server says ${name}` : message, { offset, length, code, name: 'NBD' })
  }

  /**
   * One chunk of a structured reply.
   * @throws FormatError if it answers nothing that was asked.
   */
  takeChunk(head: ChunkHead, payload: Uint8Array, contexts: ReadonlyMap<number, string>): void {
    const cursor = new Cursor(payload, 'NBD reply chunk')
    switch (head.type) {
      case chunkTypes.none:
        if ((head.flags & chunkDone) === 0) throw wrong('an empty chunk that is not the last')
        return
      case chunkTypes.offsetData: {
        const at = cursor.u64() - this.fields.offset
        const length = cursor.left
        this.#place(at, length)?.set(cursor.bytes(length), at)
        return
      }
      case chunkTypes.offsetHole: {
        const at = cursor.u64() - this.fields.offset
        const length = cursor.u32()
        this.#place(at, length)?.fill(0, at, at + length)
        return
      }
      case chunkTypes.blockStatus:
        this.#takeStatus(cursor, contexts)
        return
      default:
        if ((head.type & 0x8000) === 0) throw wrong(`unknown type ${head.type}`)
        this.takeError(cursor.u32(), new TextDecoder().decode(cursor.bytes(cursor.u16())))
    }
  }

  /** The reply is whole. @throws FormatError if a read's bytes are not. */
  end(): void {
    if (this.#error !== undefined) this.fail(this.#error)
    else if (!this.#answered.complete) {
      throw wrong(`a read of ${this.fields.length} bytes at ${this.fields.offset} was answered with ${this.#answered.bytes}`)
    } else {
      this.#forget()
      this.#resolve(this.#status)
    }
  }

  /** There will be no reply. */
  fail(error: unknown): void {
    this.#forget()
    this.#reject(error)
  }

  readonly #leave = (): void => {
    this.#target = undefined // what still comes is read and forgotten
    this.fail(this.fields.signal?.reason)
  }

  #forget(): void {
    this.fields.signal?.removeEventListener('abort', this.#leave)
  }

  /** Marks a range of a read as answered; where it goes, unless nobody waits for it any more. */
  #place(at: number, length: number): Uint8Array | undefined {
    if (!this.#answered.add(at, length)) throw wrong(`${length} bytes at ${at + this.fields.offset} were not asked for, or come twice`)
    return this.#target
  }

  #takeStatus(cursor: Cursor, contexts: ReadonlyMap<number, string>): void {
    const id = cursor.u32()
    if (this.fields.command !== commands.blockStatus || !contexts.has(id) || this.#status.has(id)) {
      throw wrong(`the status of context ${id} was not asked for, or comes twice`)
    }
    this.#status.set(id, new StatusRuns(cursor.bytes(cursor.left), this.fields.length))
  }
}

function wrong(detail: string): FormatError {
  return new FormatError(detail, { structure: 'NBD reply chunk' })
}
