/** Sockets that QEMU connects to. The only file of this layer that opens them, besides the doctor's. */
import { chmod, mkdtemp, rm } from 'node:fs/promises'
import { createServer, type Server, type Socket } from 'node:net'
import { tmpdir } from 'node:os'
import { join, resolve } from 'node:path'
import { Qcow2Error, UnsupportedError } from '../core/errors.ts'
import { Resource } from '../core/resource.ts'
import { socketPathProblem } from '../core/socket-path.ts'
import type { Qmp } from '../qmp/client.ts'
import type { DuplexStream } from '../qmp/duplex.ts'
import { giveTo } from './host-scratch.ts'

/** Options of {@link MigrationListener.open}. */
export interface MigrationListenerOptions {
  /** Path of the socket, which must not be there. Default: in a new folder. */
  readonly path?: string | undefined
  /** Where that new folder is made; default the system's folder for temporary files. */
  readonly folder?: string | undefined
  /** Mode of the socket, default 0600: who may write to it can connect. QEMU may run as another user. */
  readonly mode?: number | undefined
  /** One connection is all: another one, as multifd and postcopy-preempt make them, breaks it with an error. Default false. */
  readonly single?: boolean | undefined
  /** Monitor of the QEMU that is to connect: root gives the socket to the user it runs as. */
  readonly qmp?: Qmp | undefined
}

/** A unix socket of our own that waits for QEMU. */
export class MigrationListener extends Resource {
  /** Where it listens. */
  readonly path: string
  readonly #server: Server
  readonly #folder: string | undefined
  readonly #sockets: Socket[] = []
  #onSocket: (() => void) | undefined
  #accepted: Socket | undefined

  private constructor(server: Server, path: string, folder: string | undefined, single: boolean) {
    super()
    this.path = path
    this.#server = server
    this.#folder = folder
    server.on('connection', (socket) => {
      if (single && (this.#accepted ?? this.#sockets[0]) !== undefined) {
        this.#refuse(socket)
        return
      }
      this.#sockets.push(socket)
      this.#onSocket?.()
    })
  }

  /**
   * Listens at `path`; without one, in a new folder of mode 0700.
   * @throws Qcow2Error `ERR_EXISTS` if something has the name, `ERR_IO` if the socket cannot be made (its path is too long, say).
   */
  static async open(options: MigrationListenerOptions | string = {}): Promise<MigrationListener> {
    const { path, folder, mode = 0o600, single = false, qmp }: MigrationListenerOptions = typeof options === 'string' ? { path: options } : options
    const own = path === undefined ? await made(() => mkdtemp(join(resolve(folder ?? tmpdir()), 'qcow2-')), folder ?? tmpdir()) : undefined
    const where = path === undefined ? join(own!, 'migration') : resolve(path)
    const server = createServer({ allowHalfOpen: true, pauseOnConnect: true })
    try {
      const problem = socketPathProblem(where)
      if (problem !== undefined) throw new Qcow2Error('ERR_IO', `no socket for QEMU can be made at ${where}: ${problem}`)
      await made(() => listening(server, where), where)
      await chmod(where, mode)
      // who may write to the socket has to come to it
      if (own !== undefined && (mode & 0o077) !== 0) await chmod(own, 0o711)
      if (qmp !== undefined) await giveTo(qmp, ...(own === undefined ? [] : [own]), where)
    } catch (error) {
      server.close()
      if (own !== undefined) await rm(own, { recursive: true, force: true })
      throw error
    }
    return new MigrationListener(server, where, own, single)
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
    this.#accepted = this.#sockets.shift()!
    return this.#accepted
  }

  /** Memory on several connections is no stream that could be kept. */
  #refuse(more: Socket): void {
    const socket = this.#accepted ?? this.#sockets[0]
    const error = new UnsupportedError('QEMU opens several connections; switch off its capabilities multifd and postcopy-preempt')
    if (socket?.listenerCount('error') === 0) socket.on('error', () => undefined) // whoever reads it gets it all the same
    socket?.destroy(error)
    more.destroy()
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

function listening(server: Server, path: string): Promise<void> {
  return new Promise((resolve, reject) => {
    server.once('error', reject)
    server.listen(path, resolve)
  })
}

/** What the system says of a socket or folder that cannot be made, as an error of this library. */
async function made<T>(make: () => Promise<T>, path: string): Promise<T> {
  try {
    return await make()
  } catch (cause) {
    const { code, message } = cause as NodeJS.ErrnoException
    if (code === 'EADDRINUSE') throw new Qcow2Error('ERR_EXISTS', `${path} is there already: choose another name for the socket, or remove it`, { cause })
    throw new Qcow2Error('ERR_IO', `no socket for QEMU can be made at ${path}: ${message}`, { cause })
  }
}
