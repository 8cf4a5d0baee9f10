/**
 * NBD over real sockets: a unix socket or TCP. Owns listening, connecting and the socket's
 * back-pressure; the only file of this layer that imports `node:` modules.
 */
import { lstat, stat, unlink } from 'node:fs/promises'
import { connect, createServer, type AddressInfo, type ListenOptions, type Server, type Socket } from 'node:net'
import { dirname } from 'node:path'
import { IoError, Qcow2Error } from '../core/errors.ts'
import { Resource } from '../core/resource.ts'
import { socketPathProblem } from '../core/socket-path.ts'
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
 * Listens and serves every connection with `server`, which the listener owns from now on. A unix socket whose server has
 * died is replaced; one that a server listens on, and a file that is no socket, never.
 * @throws IoError if the address cannot be listened on; Qcow2Error `ERR_BUSY` if a server listens there.
 */
export async function listen(server: NbdServer, address: NbdAddress): Promise<NbdListener> {
  const listener = 'path' in address ? await listenAt(server, address.path) : await begin(server, { port: address.port, host: address.host ?? '127.0.0.1' }, describe(address))
  const real = 'path' in address ? address : { host: address.host, port: (listener.address() as AddressInfo).port }
  return new NbdListener(server, real, listener)
}

/**
 * As {@link listen}, on a socket that listens already and that this process inherited, as in socket activation.
 * A unix socket's file stays: it belongs to whoever made it.
 * @param fd the socket's file descriptor
 */
export async function listenInherited(server: NbdServer, fd: number): Promise<NbdListener> {
  const listener = await begin(server, { fd }, `file descriptor ${fd}`)
  const address = listener.address()
  return new NbdListener(server, typeof address === 'object' && address !== null ? { host: address.address, port: address.port } : { path: address ?? '' }, listener)
}

async function listenAt(server: NbdServer, path: string): Promise<Server> {
  const problem = socketPathProblem(path)
  if (problem !== undefined) throw new IoError('open', problem, { name: path })
  try {
    return await begin(server, { path }, path)
  } catch (error) {
    const { code } = (error as IoError).cause as NodeJS.ErrnoException
    if (code === 'EADDRINUSE') await removeDead(path)
    // libuv calls a missing folder a lack of permission
    else if (code === 'EACCES' && (await isMissing(dirname(path)))) throw new IoError('open', Object.assign(new Error(`there is no folder ${dirname(path)}`), { code: 'ENOENT' }), { name: path })
    else throw error
  }
  return begin(server, { path }, path)
}

function begin(server: NbdServer, where: ListenOptions & { readonly fd?: number }, name: string): Promise<Server> {
  const listener = createServer({ pauseOnConnect: false, noDelay: true }, (socket) => {
    void server.serve(socketTransport(socket))
  })
  return new Promise((resolve, reject) => {
    listener.once('error', (error) => reject(new IoError('open', error, { name })))
    listener.listen(where, () => {
      listener.on('error', () => undefined) // a failed accept ends that connection only
      resolve(listener)
    })
  })
}

/** Removes a socket that nobody listens on. */
async function removeDead(path: string): Promise<void> {
  const before = await lstat(path)
  if (!before.isSocket()) throw new IoError('open', 'there is a file of this name, which is no socket and is not replaced', { name: path })
  const listens = await new Promise<boolean>((resolve) => {
    const probe = connect(path, () => resolve(true))
    probe.on('error', ({ code }: NodeJS.ErrnoException) => resolve(code !== 'ECONNREFUSED')).on('connect', () => probe.destroy())
  })
  if (listens) throw new Qcow2Error('ERR_BUSY', `${path}: another server listens on this socket`)
  if ((await lstat(path)).ino === before.ino) await unlink(path)
}

async function isMissing(folder: string): Promise<boolean> {
  return stat(folder).then(() => false, (error: unknown) => (error as NodeJS.ErrnoException).code === 'ENOENT')
}

/**
 * Connects to any NBD server.
 * @throws IoError if nobody listens there, or nobody answers in time; see {@link NbdClient.open} for the rest.
 */
export async function connectNbd(address: NbdAddress, options: NbdClientOptions = {}): Promise<NbdClient> {
  const { signal, timeout = defaultTimeout } = options
  signal?.throwIfAborted()
  const problem = 'path' in address ? socketPathProblem(address.path) : undefined
  if (problem !== undefined) throw new IoError('open', problem, { name: describe(address) })
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
