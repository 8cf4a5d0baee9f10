import { once } from 'node:events'
import type { BlockDevice } from '../../block/device.ts'
import { VmState } from '../../migration/vm-state.ts'
import { dirtyBitmapContext, type NbdExport, type NbdMetaContext } from '../../nbd/export.ts'
import { NbdServer } from '../../nbd/server.ts'
import { listen, listenInherited, type NbdAddress, type NbdListener } from '../../nbd/socket.ts'
import { command } from '../command.ts'
import { ExitError, UsageError } from '../errors.ts'
import type { OpenedImage } from '../image/opened.ts'
import { splitSnapshot } from '../image/names.ts'
import { forceShareOption, formatOption, imageOptsOption, objectOption, openArgument, quietOption } from '../image/options.ts'

export const serveCommand = command({
  name: 'serve',
  summary: 'Serve an image, a snapshot, VM state or guest RAM over NBD',
  description: [
    'Any NBD client can use it: QEMU itself, qemu-io, nbdcopy, the Linux kernel. The address is printed when clients can connect. It goes on until it is interrupted; then everything is flushed.',
    'A unix socket that a dead server left is replaced. Without an address, a socket that was handed over is used, as systemd and libnbd do it (LISTEN_FDS).',
    'Clients may ask where the data is (base:allocation, qemu:allocation-depth).',
  ],
  options: {
    socket: { value: 'PATH', file: true, help: 'listen on a unix socket' },
    port: { value: 'PORT', help: 'listen on TCP; 0 takes a free port' },
    bind: { value: 'HOST', help: 'with --port: the address to listen on; default 127.0.0.1. Whoever can connect can read and write' },
    'read-only': { short: 'r', help: 'refuse changes' },
    name: { short: 'x', value: 'NAME', help: 'name of the export; default the empty name, which clients ask for by default' },
    description: { short: 'D', value: 'TEXT', help: 'what listings say of the export' },
    bitmap: { short: 'B', value: 'NAME', many: true, help: 'tell clients which ranges this bitmap of the image has dirty, as qemu:dirty-bitmap:NAME' },
    vmstate: { help: 'serve the VM state of IMAGE@SNAPSHOT instead of its disk' },
    ram: { value: 'BLOCK', help: 'serve this RAM block of IMAGE@SNAPSHOT, for example pc.ram' },
    'max-connections': { value: 'COUNT', help: 'connections at once; default 16' },
    'idle-timeout': { value: 'SECONDS', help: 'disconnect clients that ask nothing for so long; default never. A client that does not finish negotiating loses its connection after 30 seconds, or to the next client' },
    once: { help: 'end when the last client leaves' },
    ...formatOption,
    ...imageOptsOption,
    ...forceShareOption,
    ...objectOption,
    ...quietOption,
  },
  arguments: [{ name: 'IMAGE', help: 'the image' }],
  examples: [
    { line: 'qcow2 serve disk.qcow2 --socket /tmp/disk.nbd', shows: 'for one host' },
    { line: "qemu-io -f raw 'nbd+unix:///?socket=/tmp/disk.nbd' -c 'read 0 512'", shows: 'a client' },
    { line: 'qcow2 serve disk.qcow2@before-update --port 10809', shows: 'an old state of the disk, read-only, on TCP' },
    { line: 'qcow2 serve vm.qcow2@running --ram pc.ram --socket /tmp/ram.nbd', shows: 'the memory of a saved VM' },
  ],
  async run(given) {
    // clients choose what is read: by whatever name the program is called, images reach no further unless that is asked for
    const context = { ...given, options: { ...given.options, references: given.options.references ?? 'tree' } as typeof given.options }
    const { options, args, print, warn, signal } = context
    const inherited = inheritedSocket(context.terminal.env)
    const address = addressOf(options, inherited !== undefined)
    const maxConnections = countOf(options['max-connections'])
    const idleTimeout = secondsOf(options['idle-timeout'])
    const stateOnly = options.vmstate || options.ram !== undefined
    const readOnly = options['read-only'] || stateOnly || isReadOnly(args[0]!)
    const opened = await openArgument(context, { readOnly })
    const closers: (() => Promise<void>)[] = [() => opened.close()]
    try {
      const device = stateOnly ? await stateDevice(opened, options.ram, closers) : opened.device
      const contexts = await Promise.all(options.bitmap.map((name) => bitmapContext(opened, name)))
      const entry: NbdExport = { name: options.name ?? '', description: options.description, device, readOnly, contexts }
      const gone = new AbortController()
      const server = new NbdServer([entry], {
        maxConnections,
        idleTimeout,
        onConnectionError: (error) => warn(error instanceof Error ? error.message : String(error)),
        onConnections: (open) => {
          if (open === 0 && options.once) gone.abort()
        },
      })
      const listener: NbdListener = address === undefined ? await listenInherited(server, inherited!) : await listen(server, address)
      closers.push(() => listener.close())
      if (!options.quiet && address !== undefined) await print(listener.uri(entry.name))
      await until(AbortSignal.any([signal, gone.signal]))
      return 0
    } finally {
      for (const close of closers.reverse()) await close()
    }
  },
})

/** The ranges as they are now: writes through the server are not in them. */
async function bitmapContext({ image, format }: OpenedImage, name: string): Promise<NbdMetaContext> {
  if (image === undefined) throw new ExitError(1, `Format driver '${format}' does not support bitmaps`)
  const ranges: { start: number; length: number }[] = []
  for await (const { offset, length } of image.bitmaps.read(name)) ranges.push({ start: offset, length })
  return dirtyBitmapContext(name, { ranges: (offset, length) => within(ranges, offset, offset + length) })
}

/** The ranges that reach into `[from, to)`, found by halving. */
function within(ranges: readonly { readonly start: number; readonly length: number }[], from: number, to: number): typeof ranges {
  let low = 0
  for (let high = ranges.length; low < high; ) {
    const middle = (low + high) >> 1
    if (ranges[middle]!.start + ranges[middle]!.length <= from) low = middle + 1
    else high = middle
  }
  let end = low
  while (end < ranges.length && ranges[end]!.start < to) end++
  return ranges.slice(low, end)
}

/** A snapshot, and what a web server has, can only be read. */
function isReadOnly(name: string): boolean {
  return splitSnapshot(name) !== undefined || /^https?:/.test(name)
}

/**
 * The file descriptor of the socket that whoever started this program listens on for it.
 * @throws UsageError if there are several
 */
function inheritedSocket(env: Readonly<Record<string, string | undefined>>): number | undefined {
  const { LISTEN_PID: pid, LISTEN_FDS: count } = env
  if (count === undefined || pid !== String(process.pid)) return undefined
  if (count !== '1') throw new UsageError(`one socket can be handed over, not LISTEN_FDS=${count}`)
  return 3
}

/** `undefined`: that of the socket handed over. */
function addressOf(options: { socket: string | undefined; port: string | undefined; bind: string | undefined }, inherited: boolean): NbdAddress | undefined {
  const { socket, port, bind } = options
  if (inherited) {
    if (socket !== undefined || port !== undefined) throw new UsageError('--socket and --port cannot be used with a socket that is handed over (LISTEN_FDS)')
    return undefined
  }
  if ((socket === undefined) === (port === undefined)) throw new UsageError('one of --socket and --port is needed')
  if (socket !== undefined) return { path: socket }
  const number = Number(port)
  if (!/^\d+$/.test(port!) || number > 65535) throw new UsageError(`--port expects a number from 0 to 65535, not '${port!}'`)
  return { host: bind ?? '127.0.0.1', port: number }
}

function countOf(text: string | undefined): number | undefined {
  if (text === undefined) return undefined
  if (!/^[1-9]\d{0,5}$/.test(text)) throw new UsageError(`--max-connections expects a positive number, not '${text}'`)
  return Number(text)
}

/** In milliseconds. */
function secondsOf(text: string | undefined): number | undefined {
  if (text === undefined) return undefined
  const seconds = Number(text)
  if (!/^\d+(?:\.\d+)?$/.test(text) || seconds * 1000 >= 2 ** 31) throw new UsageError(`--idle-timeout expects seconds, not '${text}'`)
  return seconds * 1000
}

/** The VM state behind a snapshot, or a stream file itself; or one RAM block in it. */
async function stateDevice(opened: OpenedImage, ram: string | undefined, closers: (() => Promise<void>)[]): Promise<BlockDevice> {
  const state = opened.image === undefined ? opened.device : opened.snapshot?.vmState
  if (state === undefined) throw new ExitError(1, `name the snapshot: ${opened.filename}@SNAPSHOT`)
  if (state.size === 0) throw new ExitError(1, `${opened.filename} has no VM state`)
  if (ram === undefined) return state
  const vm = await VmState.index(state, { keepOpen: true })
  closers.push(() => vm.close())
  return vm.ram.device(ram)
}

async function until(signal: AbortSignal): Promise<void> {
  if (!signal.aborted) await once(signal, 'abort')
}
