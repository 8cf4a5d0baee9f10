/**
 * NBD over real sockets: a unix socket or TCP. Owns listening, connecting and the socket's
 * back-pressure; the only file of this layer that imports `node:` modules.
 */
import { connect, createServer, type AddressInfo, type Server, type Socket } from 'node:net'
import { IoError } from '../core/errors.ts'
import { Resource } from '../core/resource.ts'
import { defaultTimeout, NbdClient, type NbdClientOptions } from './client.ts'
import type { NbdServer } from './server.ts'
import type { NbdTransport } from './transport.ts'
import { within } from './waiting.ts'

/** Where an NBD server listens: the path of a unix socket, or TCP (host default `127.0.0.1`). */
export type NbdAddress = { readonly path: string } | { readonly host?: string | undefined; readonly port: number }

/** A server's listening socket. Closing it closes the server too; the unix socket's file goes away. */
export class NbdListener extends Resource {
  readonly server: NbdServer
  /** The address clients connect to; the port is the real one where 0 was asked for. */
  readonly address: NbdAddress
  readonly #listener: Server

  constructor(server: NbdServer, address: NbdAddress, listener: Server) {
    super()
    this.server = server
    this.address = address
    this.#listener = listener
  }

  /** What clients call the default export or the one named, for example `nbd+unix:///?socket=/tmp/a`. */
  uri(name = ''): string {
    const path = encodeURIComponent(name)
    if ('path' in this.address) return `nbd+unix:///${path}?socket=${encodeURIComponent(this.address.path).replaceAll('%2F', '/')}`
    const { host = '127.0.0.1', port } = this.address
    return `nbd://${host.includes(':') ? `[${host}]` : host}:${port}/${path}`
  }

  protected override async onClose(): Promise<void> {
    const stopped = new Promise<void>((resolve) => this.#listener.close(() => resolve()))
    await this.server.close()
    await stopped
  }
}

/**
 * Listens and serves every connection with `server`, which the listener owns from now on.
 * @throws IoError if the address cannot be listened on.
 */
export async function listen(server: NbdServer, address: NbdAddress): Promise<NbdListener> {
  const listener = createServer({ pauseOnConnect: false, noDelay: true }, (socket) => {
    void server.serve(socketTransport(socket))
  })
  await new Promise<void>((resolve, reject) => {
    listener.once('error', (error) => reject(new IoError('open', error, { name: describe(address) })))
    if ('path' in address) listener.listen(address.path, resolve)
    else listener.listen(address.port, address.host ?? '127.0.0.1', resolve)
  })
  listener.on('error', () => undefined) // a failed accept ends that connection only
  const real = 'path' in address ? address : { host: address.host, port: (listener.address() as AddressInfo).port }
  return new NbdListener(server, real, listener)
}

/**
 * Connects to any NBD server.
 * @throws IoError if nobody listens there, or nobody answers in time; see {@link NbdClient.open} for the rest.
 */
export async function connectNbd(address: NbdAddress, options: NbdClientOptions = {}): Promise<NbdClient> {
  const { signal, timeout = defaultTimeout } = options
  signal?.throwIfAborted()
  const socket = 'path' in address ? connect(address.path) : connect(address.port, address.host ?? '127.0.0.1')
  const connected = new Promise<void>((resolve, reject) => {
    socket.once('connect', resolve)
    socket.on('error', (error) => reject(new IoError('open', error, { name: describe(address) })))
  })
  try {
    await within(connected, { signal, timeout })
  } catch (error) {
    socket.destroy()
    throw error
  }
  return NbdClient.open(socketTransport(socket), options)
}

/** Milliseconds of silence after which TCP asks whether the peer's host is there. */
const keepAliveDelay = 60_000

/** A socket as a transport. */
export function socketTransport(socket: Socket): NbdTransport {
  socket.setNoDelay(true)
  // a peer whose host is gone is noticed, also while nothing is due
  socket.setKeepAlive(true, keepAliveDelay)
  let failure: Error | undefined
  let draining: Promise<void> | undefined
  socket.on('error', (error) => (failure ??= error)) // without a listener it would end the process
  return {
    incoming: socket as AsyncIterable<Uint8Array>,
    send(parts) {
      if (socket.destroyed) return Promise.reject(new IoError('write', failure ?? 'the connection is closed', { name: 'NBD socket' }))
      socket.cork()
      let room = true
      for (const part of parts) room = socket.write(part)
      socket.uncork()
      if (room) return done
      return (draining ??= drained(socket).finally(() => (draining = undefined)))
    },
    close() {
      socket.destroySoon()
      // a peer that reads nothing more would keep the socket for ever
      setTimeout(() => socket.destroy(), 1000).unref()
    },
  }
}

function drained(socket: Socket): Promise<void> {
  return new Promise((resolve) => {
    const settle = (): void => {
      socket.off('drain', settle).off('close', settle)
      resolve()
    }
    socket.on('drain', settle).on('close', settle)
  })
}

const done: Promise<void> = Promise.resolve()

function describe(address: NbdAddress): string {
  return 'path' in address ? address.path : `${address.host ?? '127.0.0.1'}:${address.port}`
}
