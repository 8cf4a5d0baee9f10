/**
 * An NBD server: any block device, to any NBD client. Owns the set of exports and the connections
 * over it; knows nothing of sockets (`socket.ts` brings those).
 */
import { Qcow2Error } from '../core/errors.ts'
import { Resource } from '../core/resource.ts'
import type { NbdExport } from './export.ts'
import { negotiate } from './handshake.ts'
import { maxNameLength } from './protocol.ts'
import { transmit, type TransmissionLimits } from './transmission.ts'
import { ByteReader, type NbdTransport } from './transport.ts'

/** Options of {@link NbdServer}. */
export interface NbdServerOptions extends TransmissionLimits {
  /**
   * Connections at once; a further one is closed at once, unless a client has been negotiating for more than a second:
   * then that one is. Default 16.
   */
  readonly maxConnections?: number | undefined
  /** Milliseconds a client may take to negotiate. Default 30 000. */
  readonly handshakeTimeout?: number | undefined
  /** Told when a connection ended because of an error: a client that broke the protocol, or vanished. */
  readonly onConnectionError?: ((error: unknown) => void) | undefined
  /** Told the number of open connections whenever it changes. */
  readonly onConnections?: ((open: number) => void) | undefined
}

/** Milliseconds of negotiation for which a client keeps its place where others wait. */
const patience = 1000

interface Connection {
  readonly transport: NbdTransport
  readonly since: number
  negotiated: boolean
}

/**
 * Serves block devices over NBD (fixed newstyle, structured replies, block status). Devices stay the
 * caller's: closing the server ends the connections, flushes every writable export, and closes no device.
 *
 * Memory is bounded by `maxConnections` times `maxBytes` of payload under way.
 */
export class NbdServer extends Resource {
  readonly exports: readonly NbdExport[]
  readonly #options: NbdServerOptions
  readonly #connections = new Set<Connection>()
  /** All that have not ended, also those that were closed. */
  readonly #served = new Set<Promise<void>>()

  /**
   * @throws TypeError if two exports share a name, a name is longer than 4096 bytes, or a device
   * demands memory alignment (wrap it in `pad()`).
   */
  constructor(exports: readonly NbdExport[], options: NbdServerOptions = {}) {
    super()
    const names = new Set<string>()
    for (const { name, device } of exports) {
      if (names.has(name)) throw new TypeError(`two exports are named '${name}'`)
      if (new TextEncoder().encode(name).length > maxNameLength) throw new TypeError(`an export name is longer than ${maxNameLength} bytes`)
      if (device.limits.memoryAlignment > 1) throw new TypeError(`export '${name}': its device demands aligned memory; wrap it in pad()`)
      names.add(name)
    }
    this.exports = exports
    this.#options = options
  }

  /** Connections open now. */
  get connections(): number {
    return this.#connections.size
  }

  /**
   * Serves one client until it leaves; resolves then. Never rejects: what went wrong goes to
   * `onConnectionError`, and the client is disconnected.
   */
  serve(transport: NbdTransport): Promise<void> {
    if (this.closed || !this.#hasRoom()) {
      transport.close()
      const error = this.closed
        ? new Qcow2Error('ERR_CLOSED', 'the NBD server is closed')
        : new Qcow2Error('ERR_BUSY', `the NBD server has ${this.#connections.size} connections, its limit`)
      this.#options.onConnectionError?.(error)
      return Promise.resolve()
    }
    const connection = { transport, since: performance.now(), negotiated: false }
    this.#connections.add(connection)
    const served = this.#converse(connection)
      .catch((error: unknown) => {
        if (!this.closed) this.#options.onConnectionError?.(error)
      })
      .finally(() => {
        this.#served.delete(served)
        this.#leave(connection)
      })
    this.#served.add(served)
    this.#options.onConnections?.(this.#connections.size)
    return served
  }

  /** True if one more client has a place; one that has been negotiating for long loses its own. */
  #hasRoom(): boolean {
    if (this.#connections.size < (this.#options.maxConnections ?? 16)) return true
    const long = performance.now() - patience
    const silent = [...this.#connections].find(({ negotiated, since }) => !negotiated && since < long)
    if (silent !== undefined) this.#leave(silent)
    return silent !== undefined
  }

  #leave(connection: Connection): void {
    connection.transport.close()
    if (this.#connections.delete(connection)) this.#options.onConnections?.(this.#connections.size)
  }

  protected override async onClose(): Promise<void> {
    for (const { transport } of this.#connections) transport.close()
    await Promise.all(this.#served)
    for (const { device } of this.exports) if (!device.readOnly) await device.flush()
  }

  async #converse(connection: Connection): Promise<void> {
    const { transport } = connection
    const reader = new ByteReader(transport.incoming)
    const timer = setTimeout(() => transport.close(), this.#options.handshakeTimeout ?? 30_000)
    const agreement = await negotiate(transport, reader, this.exports).finally(() => clearTimeout(timer))
    connection.negotiated = true
    if (agreement !== undefined) await transmit(transport, reader, agreement, this.#options)
  }
}
