/** What a real QEMU sends or writes when it migrates with given capabilities, and the RAM that this library finds in it. */
import { join } from 'node:path'
import { readFileSync } from 'node:fs'
import { MemoryDevice } from '../../src/block/memory.ts'
import { ramFlag } from '../../src/migration/format.ts'
import { MultifdParser, type MultifdPacketRecord } from '../../src/migration/multifd.ts'
import type { DeviceLength } from '../../src/migration/framing.ts'
import { MigrationParser } from '../../src/migration/parser.ts'
import type { MigrationRecord } from '../../src/migration/records.ts'
import { deviceLengths, locateVmDescription, parseVmDescription } from '../../src/migration/vm-description.ts'
import { VmState } from '../../src/migration/vm-state.ts'
import { encodeRecord } from '../../src/migration/writer.ts'
import type { DuplexStream } from '../../src/qmp/duplex.ts'
import { ChunkReader } from '../../src/snapshot/chunk-reader.ts'
import { MigrationListener } from '../../src/snapshot/socket.ts'
import type { Guest } from './guest.ts'

export interface MigrationSettings {
  readonly capabilities?: readonly string[]
  /** Of `migrate-set-parameters`. */
  readonly parameters?: Readonly<Record<string, unknown>>
  /** Connections beside the main one. */
  readonly channels?: number
  /** Into a file instead of a socket: QEMU seeks in it. */
  readonly file?: boolean
  /** Answer the end of the stream as a destination that took it all. */
  readonly acknowledge?: boolean
  /** Called when the stream flows. */
  readonly during?: () => Promise<void>
}

/** All bytes of one migration. */
export interface Migrated {
  readonly main: Uint8Array
  readonly channels: readonly Uint8Array[]
}

/** Migrates and keeps all that is sent. */
export async function migrate(guest: Guest, settings: MigrationSettings): Promise<Migrated> {
  const { capabilities = [], parameters = {}, channels = 0 } = settings
  await guest.qmp.execute('migrate-set-capabilities', { capabilities: capabilities.map((capability) => ({ capability, state: true })) })
  if (Object.keys(parameters).length > 0) await guest.qmp.execute('migrate-set-parameters', parameters)
  if (settings.file === true) return migrateToFile(guest)
  await using listener = await MigrationListener.open()
  await guest.qmp.execute('migrate', { uri: listener.uri })
  const received: Promise<Uint8Array>[] = []
  for (let connection = 0; connection <= channels; connection++) received.push(readAll(await listener.accept(), settings))
  await settings.during?.()
  const all = await Promise.all(received)
  await completed(guest)
  return { main: all.find(isMain)!, channels: all.filter((bytes) => !isMain(bytes)) }
}

async function migrateToFile(guest: Guest): Promise<Migrated> {
  const file = join(guest.folder, 'migrated')
  await guest.qmp.execute('migrate', { uri: `file:${file}` })
  await completed(guest)
  return { main: new Uint8Array(readFileSync(file)), channels: [] }
}

async function readAll(stream: DuplexStream, { acknowledge }: MigrationSettings): Promise<Uint8Array> {
  const chunks: Uint8Array[] = []
  let toAcknowledge = acknowledge === true
  for await (const chunk of new ChunkReader(stream)) {
    chunks.push(chunk)
    if (!toAcknowledge || !endsWithEof(chunk)) continue
    // SHUT 0: all is well. The end of file of a postcopy is the last byte, alone behind the last footer.
    stream.write(Buffer.from('0001000400000000', 'hex'))
    // a second one would be unread when QEMU closes the connection, which would then be reset
    toAcknowledge = false
  }
  return new Uint8Array(Buffer.concat(chunks))
}

/** The chunk ends with EOF behind a footer, or with a VM description. */
function endsWithEof(chunk: Uint8Array): boolean {
  const end = chunk.length
  return (chunk[end - 1] === 0 && chunk[end - 6] === 0x7e) || chunk[end - 1] === 0x7d
}

function isMain(bytes: Uint8Array): boolean {
  return bytes[0] === 0x51
}

async function completed(guest: Guest): Promise<void> {
  for (;;) {
    const { status, ...rest } = await guest.qmp.execute('query-migrate')
    if (status === 'completed') return
    if (status === 'failed' || status === 'cancelled') throw new Error(`migration ${status}: ${JSON.stringify(rest)}`)
    await new Promise((wake) => setTimeout(wake, 5))
  }
}

/** Takes a stream apart to its end and puts it together again. */
export function takenApart(stream: Uint8Array): { records: string[]; rebuilt: Uint8Array; flags: number } {
  const location = locateVmDescription(stream)
  let devices: DeviceLength[] | undefined
  if (location !== undefined) devices = deviceLengths(parseVmDescription(stream.subarray(location.start, location.start + location.length)))
  const parser = new MigrationParser({ devices })
  const records: string[] = []
  const pieces: Uint8Array[] = []
  let flags = 0
  for (let at = 0; at < stream.length; at += 50_000) {
    for (const record of parser.push(stream.subarray(at, at + 50_000))) {
      records.push(nameOf(record))
      pieces.push(encodeRecord(record).slice())
      if (record.kind === 'ram-pages') for (let i = 0; i < record.count; i++) flags |= record.flags[i]!
    }
  }
  parser.end()
  return { records, rebuilt: Buffer.concat(pieces), flags }
}

function nameOf(record: MigrationRecord): string {
  if (record.kind === 'section') return `${record.type} ${record.idstr}`
  if (record.kind === 'command') return record.command.name
  if (record.kind === 'ram-mark') return record.mark
  return record.kind
}

/** The guest's main memory, from all connections: a stopped guest's pages each come once, or alike. */
export async function memoryOf({ main, channels }: Migrated): Promise<Uint8Array> {
  if (channels.length === 0 && locateVmDescription(main) !== undefined) {
    await using vm = await VmState.index(new MemoryDevice(main))
    const block = vm.ram.block('pc.ram')
    return await vm.ram.read(block.index, 0, block.length)
  }
  const parser = new MigrationParser()
  let memory = new Uint8Array(0)
  for (const record of parser.push(main)) {
    if (record.kind === 'ram-block' && record.block.name === 'pc.ram') memory = new Uint8Array(record.block.length)
    if (record.kind !== 'ram-pages' || record.block.name !== 'pc.ram') continue
    for (let i = 0; i < record.count; i++) {
      const position = record.positions[i]!
      if ((record.flags[i]! & ramFlag.page) !== 0) memory.set(record.bytes.subarray(position, position + record.pageSize), record.pageOffsets[i])
      else memory.fill(0, record.pageOffsets[i], record.pageOffsets[i]! + record.pageSize)
    }
  }
  for (const packet of packetsOf(main, channels)) {
    if (packet.block !== 'pc.ram') continue
    packet.normal.forEach((offset, i) => memory.set(packet.pages.subarray(i * 4096, (i + 1) * 4096), offset))
  }
  return memory
}

/** All packets of the channels, each valid until the next is asked for. */
export function* packetsOf(main: Uint8Array, channels: readonly Uint8Array[]): Generator<MultifdPacketRecord> {
  const parser = new MigrationParser()
  for (const _ of parser.push(main)) continue
  for (const channel of channels) {
    const packets = new MultifdParser({ blocks: parser.blocks })
    for (let at = 0; at < channel.length; at += 50_000) {
      for (const record of packets.push(channel.subarray(at, at + 50_000))) if (record.kind === 'multifd-packet') yield record
    }
    packets.end()
  }
}
