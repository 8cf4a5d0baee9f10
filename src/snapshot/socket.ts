/** Sockets that QEMU connects to. The only file of this layer that opens them, besides the doctor's. */
import { mkdtemp, rm } from 'node:fs/promises'
import { createServer, type Server, type Socket } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { Qcow2Error } from '../core/errors.ts'
import { Resource } from '../core/resource.ts'
import type { DuplexStream } from '../qmp/duplex.ts'

/** A unix socket of our own that waits for QEMU. */
export class MigrationListener extends Resource {
  /** Where it listens. */
  readonly path: string
  readonly #server: Server
  readonly #folder: string | undefined
  readonly #sockets: Socket[] = []
  #onSocket: (() => void) | undefined

  private constructor(server: Server, path: string, folder: string | undefined) {
    super()
    this.path = path
    this.#server = server
    this.#folder = folder
    server.on('connection', (socket) => {
      this.#sockets.push(socket)
      this.#onSocket?.()
    })
  }

  /** Listens at `path`, or in a new folder that only this user can enter. */
  static async open(path?: string): Promise<MigrationListener> {
    const folder = path === undefined ? await mkdtemp(join(tmpdir(), 'qcow2-')) : undefined
    const where = path ?? join(folder!, 'migration')
    const server = createServer({ allowHalfOpen: true, pauseOnConnect: true })
    await new Promise<void>((resolve, reject) => {
      server.once('error', reject)
      server.listen(where, resolve)
    })
    return new MigrationListener(server, where, folder)
  }

  /** The address as QEMU's `migrate` wants it. */
  get uri(): string {
    return `unix:${this.path}`
  }

  /** The next connection, paused. @throws Qcow2Error `ERR_STREAM` if none comes in `timeout` milliseconds. */
  async accept(options: { readonly signal?: AbortSignal | undefined; readonly timeout?: number | undefined } = {}): Promise<DuplexStream> {
    const { signal, timeout = 30_000 } = options
    signal?.throwIfAborted()
    if (this.#sockets.length === 0) await this.#arrival(signal, timeout)
    return this.#sockets.shift()!
  }

  protected async onClose(): Promise<void> {
    for (const socket of this.#sockets) socket.destroy()
    this.#server.close()
    if (this.#folder !== undefined) await rm(this.#folder, { recursive: true, force: true })
  }

  async #arrival(signal: AbortSignal | undefined, timeout: number): Promise<void> {
    await new Promise<void>((resolve, reject) => {
      const settle = (finish: () => void): void => {
        clearTimeout(timer)
        signal?.removeEventListener('abort', onAbort)
        this.#onSocket = undefined
        finish()
      }
      const onAbort = (): void => settle(() => reject(signal?.reason as Error))
      const timer = setTimeout(() => {
        settle(() => reject(new Qcow2Error('ERR_STREAM', `QEMU did not connect to ${this.path} in ${timeout} ms`)))
      }, timeout)
      signal?.addEventListener('abort', onAbort, { once: true })
      this.#onSocket = () => settle(resolve)
    })
  }
}
