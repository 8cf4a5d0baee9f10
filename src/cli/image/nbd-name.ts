/** Names of NBD exports: URIs as the NBD project defines them, and QEMU's older form. Owns both directions; connects to nothing. */
import type { NbdAddress } from '../../nbd/socket.ts'
import { UsageError } from '../errors.ts'

/** Where an export is and what it is called. */
export interface NbdName {
  readonly address: NbdAddress
  readonly name: string
}

const defaultPort = 10809

/**
 * `nbd://HOST:PORT/NAME`, `nbd+unix:///NAME?socket=PATH`, and without slashes `nbd:HOST:PORT:exportname=NAME` and
 * `nbd:unix:PATH:exportname=NAME`. An IPv6 address stands in brackets.
 * @throws UsageError
 */
export function parseNbdName(text: string): NbdName {
  return /^nbd(\+\w+)?:\/\//.test(text) ? fromUri(text) : fromOldForm(text)
}

function fromUri(text: string): NbdName {
  const match = /^nbd(?:\+(?<kind>unix|tcp))?:\/\/(?:[^/?#]*@)?(?:\[(?<ipv6>[^\]/?#]*)\]|(?<host>[^:/?#]*))(?::(?<port>\d+))?(?:\/(?<name>[^?#]*))?(?:\?(?<query>[^#]*))?(?:#.*)?$/.exec(text)
  const { kind, ipv6, host = '', port, name = '', query = '' } = match?.groups ?? {}
  if (match === null || Number(port ?? 0) > 65535) throw new UsageError(`'${text}' is no NBD address: the form is nbd://HOST:PORT/NAME or nbd+unix:///NAME?socket=PATH`)
  if (kind !== 'unix') return { address: { host: decoded(ipv6 ?? host) || 'localhost', port: Number(port ?? defaultPort) }, name: decoded(name) }
  const socket = query.split('&').find((pair) => pair.startsWith('socket='))?.slice('socket='.length)
  if (socket === undefined || socket === '') throw new UsageError(`${text}: an nbd+unix address needs ?socket=PATH`)
  return { address: { path: decoded(socket) }, name: decoded(name) }
}

/** A percent sign that begins no code stands for itself, as in a zone of IPv6. */
function decoded(text: string): string {
  try {
    return decodeURIComponent(text)
  } catch {
    return text
  }
}

function fromOldForm(text: string): NbdName {
  const match = /^nbd:(?:unix:(?<path>[^:]+)|(?:\[(?<ipv6>[^\]]+)\]|(?<host>[^:]*)):(?<port>\d+))(?::exportname=(?<name>.*))?$/.exec(text)
  const { path, ipv6, host, port, name = '' } = match?.groups ?? {}
  if (match === null || Number(port ?? 0) > 65535) throw new UsageError(`${text}: an NBD address is nbd:unix:PATH or nbd:HOST:PORT`)
  return path === undefined ? { address: { host: ipv6 ?? host!, port: Number(port) }, name } : { address: { path }, name }
}

/** An export as QEMU calls it, however it was named. */
export function nbdUri({ address, name }: NbdName): string {
  if ('path' in address) return `nbd+unix://${name === '' ? '' : `/${name}`}?socket=${address.path}`
  const { host = 'localhost', port } = address
  return `nbd://${host.includes(':') ? `[${host}]` : host}:${port}${name === '' ? '' : `/${name}`}`
}
