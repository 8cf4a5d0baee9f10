/** Opens the connection to a monitor. The only file of this layer that knows of Node's sockets. */
import { stat } from 'node:fs/promises'
import { connect } from 'node:net'
import { Qcow2Error } from '../core/errors.ts'
import { pause } from '../core/pause.ts'
import { socketPathProblem } from '../core/socket-path.ts'
import type { DuplexStream } from './duplex.ts'
import { QmpError } from './error.ts'

/** Where something listens: a unix socket's path, or a TCP host (default localhost) and port. */
export type SocketAddress = string | { readonly host?: string; readonly port: number }

/** Options of {@link connectSocket}. */
export interface ConnectOptions {
  readonly signal?: AbortSignal | undefined
  /** Milliseconds for one attempt; default 10 000, 0 for ever. */
  readonly timeout?: number | undefined
  /** Milliseconds to try again while nothing listens there; default 0. */
  readonly wait?: number | undefined
}

/** An address in words, for messages. */
export function describeAddress(address: SocketAddress): string {
  return typeof address === 'string' ? address : `${address.host ?? 'localhost'}:${address.port}`
}

/** Milliseconds between two attempts. */
const attemptInterval = 50

/**
 * Connects to `address`.
 * @throws QmpError (`ERR_QMP`) when nothing listens there, also not within `wait` milliseconds, or an attempt takes
 *   longer than `timeout`; `signal.reason` when aborted.
 */
export async function connectSocket(address: SocketAddress, options: ConnectOptions = {}): Promise<DuplexStream> {
  const { signal, wait = 0 } = options
  signal?.throwIfAborted()
  const problem = typeof address === 'string' ? socketPathProblem(address) : undefined
  if (problem !== undefined) throw new QmpError(`cannot connect to ${describeAddress(address)}: ${problem}`)
  const end = performance.now() + wait
  for (;;) {
    try {
      return await attempt(address, options)
    } catch (cause) {
      const { code } = cause as NodeJS.ErrnoException
      if (code === undefined || Qcow2Error.is(cause)) throw cause
      if ((code !== 'ENOENT' && code !== 'ECONNREFUSED') || performance.now() >= end) {
        throw new QmpError(`cannot connect to ${describeAddress(address)}: ${await reason(address, code, cause as Error)}`, { cause })
      }
    }
    await pause(Math.min(attemptInterval, Math.max(1, end - performance.now())), signal)
  }
}

function attempt(address: SocketAddress, { signal, timeout = 10_000 }: ConnectOptions): Promise<DuplexStream> {
  return new Promise((resolve, reject) => {
    const socket =
      typeof address === 'string' ? connect(address) : connect(address.port, address.host ?? 'localhost')
    const settle = (error?: unknown): void => {
      clearTimeout(timer)
      signal?.removeEventListener('abort', onAbort)
      socket.removeListener('connect', connected)
      socket.removeListener('error', settle)
      if (error === undefined) {
        socket.setNoDelay(true)
        resolve(socket)
      } else {
        socket.on('error', () => undefined)
        socket.destroy()
        reject(error)
      }
    }
    const connected = (): void => settle()
    const onAbort = (): void => settle(signal?.reason)
    const onTimeout = (): void => settle(new QmpError(`cannot connect to ${describeAddress(address)}: no answer in ${timeout} ms`))
    const timer = timeout > 0 ? setTimeout(onTimeout, timeout) : undefined
    signal?.addEventListener('abort', onAbort, { once: true })
    socket.on('error', settle)
    socket.on('connect', connected)
  })
}

/** What a failed attempt means, and what to do. */
async function reason(address: SocketAddress, code: string, cause: Error): Promise<string> {
  if (typeof address !== 'string') return code === 'ECONNREFUSED' ? 'nothing listens there (ECONNREFUSED)' : cause.message
  if (code === 'ENOENT') return 'there is no such socket (ENOENT): is the path right, and has QEMU begun to listen?'
  if (code === 'EACCES') return 'no permission (EACCES): connect as the user that QEMU runs as, or as root'
  const stats = await stat(address).catch(() => undefined)
  if (stats?.isSocket() === false) return `it is no socket (${code})`
  return code === 'ECONNREFUSED' ? 'nothing listens on this socket any more (ECONNREFUSED): the QEMU that made it has ended' : cause.message
}
