/** Opens the connection to a monitor. The only file of this layer that knows of Node's sockets. */
import { connect } from 'node:net'
import type { DuplexStream } from './duplex.ts'
import { QmpError } from './error.ts'

/** Where something listens: a unix socket's path, or a TCP host (default localhost) and port. */
export type SocketAddress = string | { readonly host?: string; readonly port: number }

/** An address in words, for messages. */
export function describeAddress(address: SocketAddress): string {
  return typeof address === 'string' ? address : `${address.host ?? 'localhost'}:${address.port}`
}

/**
 * Connects to `address`.
 * @throws QmpError (`ERR_QMP`) when nothing listens there or `timeout` milliseconds have passed; `signal.reason` when aborted.
 */
export function connectSocket(
  address: SocketAddress,
  options: { readonly signal?: AbortSignal | undefined; readonly timeout?: number | undefined } = {},
): Promise<DuplexStream> {
  const { signal, timeout = 10_000 } = options
  if (signal?.aborted === true) return Promise.reject(signal.reason as Error)
  return new Promise((resolve, reject) => {
    const socket =
      typeof address === 'string' ? connect(address) : connect(address.port, address.host ?? 'localhost')
    const settle = (error?: unknown): void => {
      clearTimeout(timer)
      signal?.removeEventListener('abort', onAbort)
      socket.removeListener('connect', settle)
      socket.removeListener('error', onError)
      if (error === undefined) {
        socket.setNoDelay(true)
        resolve(socket)
      } else {
        socket.on('error', () => undefined)
        socket.destroy()
        reject(error)
      }
    }
    const onAbort = (): void => settle(signal?.reason)
    const onError = (cause: Error): void =>
      settle(new QmpError(`cannot connect to ${describeAddress(address)}: ${cause.message}`, { cause }))
    const timer = setTimeout(
      () => settle(new QmpError(`cannot connect to ${describeAddress(address)}: no answer in ${timeout} ms`)),
      timeout,
    )
    signal?.addEventListener('abort', onAbort, { once: true })
    socket.on('error', onError)
    socket.on('connect', () => settle())
  })
}
