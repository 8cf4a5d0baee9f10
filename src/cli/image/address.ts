/** Addresses of QEMU's sockets, as people write them: a path, `unix:PATH`, `tcp:HOST:PORT`. */
import type { SocketAddress } from '../../qmp/socket.ts'
import { UsageError } from '../errors.ts'

/** @throws UsageError for what is no address */
export function parseAddress(text: string): SocketAddress {
  if (text.startsWith('unix:')) return text.slice(5)
  if (!text.startsWith('tcp:')) return text
  const match = /^tcp:(?:\[([^\]]+)\]|([^:]*)):(\d+)$/.exec(text)
  const port = Number(match?.[3])
  if (match === null || port > 65535) throw new UsageError(`'${text}' is no address; use PATH, unix:PATH or tcp:HOST:PORT`)
  const host = match[1] ?? match[2]
  return host === undefined || host === '' ? { port } : { host, port }
}
