/**
 * Commands (section byte 0x08): what the source tells the destination besides state.
 *
 * ```
 * 08 | be16 command | be16 length | payload
 * ```
 */
import { ByteWriter } from './byte-writer.ts'
import { commandNumber, sectionByte, streamError } from './format.ts'
import { ParserInput } from './input.ts'

/** A run of bytes within a RAM block, both multiples of the page size. */
export interface RamRange {
  /** Bytes from the start of the RAM block. */
  readonly offset: number
  /** Bytes. */
  readonly length: number
}

/** A command with its payload. The names are those of {@link commandNumber}. */
export type Command =
  | { readonly name: 'openReturnPath' | 'postcopyListen' | 'postcopyRun' | 'enableColo' | 'postcopyResume' | 'switchoverStart' }
  | { readonly name: 'ping'; readonly value: number }
  /** Without page sizes: only dirty bitmaps will be postcopied. `hostPageSizes`: the OR of all blocks' page sizes. */
  | { readonly name: 'postcopyAdvise'; readonly hostPageSizes?: number; readonly pageSize?: number }
  | { readonly name: 'postcopyRamDiscard'; readonly block: string; readonly ranges: readonly RamRange[] }
  /** `packageLength` bytes of stream follow the command. */
  | { readonly name: 'packaged'; readonly packageLength: number }
  | { readonly name: 'recvBitmap'; readonly block: string }

const names = new Map(Object.entries(commandNumber).map(([name, number]) => [number, name as keyof typeof commandNumber]))

/** Reads the command whose byte 0x08 is the next. */
export function readCommand(input: ParserInput): Command {
  const offset = input.offset
  input.u8()
  const number = input.u16()
  const name = names.get(number as 1)
  if (name === undefined) throw streamError('command', 'command', `command is ${number}, allowed 1 to ${names.size}`, offset + 1)
  const length = input.u16()
  input.require(length)
  const behind = input.at + length
  const structure = `command ${name}`
  const command = readPayload(input, name, length, structure)
  if (command === undefined || input.at !== behind) {
    throw streamError(structure, 'length', `payload of ${length} bytes is not of the right length`, offset + 3)
  }
  return command
}

function readPayload(input: ParserInput, name: keyof typeof commandNumber, length: number, structure: string): Command | undefined {
  switch (name) {
    case 'ping':
      return length === 4 ? { name, value: input.u32() } : undefined
    case 'packaged':
      return length === 4 ? { name, packageLength: input.u32() } : undefined
    case 'postcopyAdvise':
      if (length === 0) return { name }
      return length === 16 ? { name, hostPageSizes: input.u64(structure, 'page sizes'), pageSize: input.u64(structure, 'target page size') } : undefined
    case 'recvBitmap':
      return length >= 2 ? { name, block: input.counted(structure, 'block name') } : undefined
    case 'postcopyRamDiscard':
      return readDiscard(input, length, structure)
    default:
      return length === 0 ? { name } : undefined
  }
}

/** `u8 0, counted block name, u8 0, then be64 start and be64 length once or more` */
function readDiscard(input: ParserInput, length: number, structure: string): Command | undefined {
  const end = input.at + length
  const offset = input.offset
  if (length < 5 || input.at + 2 + input.bytes[input.at + 1]! >= end) return undefined
  const version = input.u8()
  if (version !== 0) throw streamError(structure, 'version', `version is ${version}, expected 0`, offset)
  const block = input.counted(structure, 'block name')
  if (input.u8() !== 0) throw streamError(structure, 'block name', 'the block name is not followed by a NUL', input.offset - 1)
  if (end === input.at || (end - input.at) % 16 !== 0) return undefined
  const ranges: RamRange[] = []
  while (input.at < end) ranges.push({ offset: input.u64(structure, 'start'), length: input.u64(structure, 'length') })
  return { name: 'postcopyRamDiscard', block, ranges }
}

/** The bytes of a command; of PACKAGED without the package. */
export function encodeCommand(command: Command): Uint8Array {
  const payload = encodePayload(new ByteWriter(), command)
  if (payload.length > 0xffff) throw new RangeError(`command ${command.name}: payload of ${payload.length} bytes, allowed up to 65535`)
  return new ByteWriter().u8(sectionByte.command).u16(commandNumber[command.name]).u16(payload.length).raw(payload).bytes
}

function encodePayload(out: ByteWriter, command: Command): Uint8Array {
  switch (command.name) {
    case 'ping':
      return out.u32(command.value).bytes
    case 'packaged':
      return out.u32(command.packageLength).bytes
    case 'postcopyAdvise':
      if (command.hostPageSizes === undefined || command.pageSize === undefined) return out.bytes
      return out.u64(command.hostPageSizes).u64(command.pageSize).bytes
    case 'recvBitmap':
      return out.counted(command.block).bytes
    case 'postcopyRamDiscard':
      out.u8(0).counted(command.block).u8(0)
      for (const { offset, length } of command.ranges) out.u64(offset).u64(length)
      return out.bytes
    default:
      return out.bytes
  }
}

/** What a package contains: commands, and the device sections between them as they are. */
export interface PackageContents {
  /** Commands before the device sections: POSTCOPY_LISTEN. */
  readonly before: readonly Command[]
  readonly devices: Uint8Array
  /** Commands behind them: PING, POSTCOPY_RUN. */
  readonly after: readonly Command[]
}

/**
 * Takes a package apart. The device sections have no length; what is behind them is recognised from
 * the end, as the commands PING and POSTCOPY_RUN that every QEMU writes there.
 * @param offset Stream offset of the package, for errors.
 */
export function readPackage(bytes: Uint8Array, offset = 0): PackageContents {
  const input = new ParserInput(offset)
  input.push(bytes)
  input.begin()
  const before: Command[] = []
  while (input.at < input.end && bytes[input.at] === sectionByte.command) before.push(readWhole(input))
  const after: Command[] = []
  let end = bytes.length
  for (let found = commandAtEnd(bytes, end, input.at); found !== undefined; found = commandAtEnd(bytes, end, input.at)) {
    after.unshift(found.command)
    end = found.start
  }
  return { before, devices: bytes.subarray(input.at, end), after }
}

function readWhole(input: ParserInput): Command {
  const offset = input.offset
  const left = input.end - input.at
  const length = left < 5 ? 5 : 5 + input.view.getUint16(input.at + 3)
  if (length > left) throw streamError('package', 'length', 'the package ends within a command', offset)
  const command = readCommand(input)
  if (command.name === 'packaged') throw streamError('package', 'command', 'a package within a package', offset)
  return command
}

const run = encodeCommand({ name: 'postcopyRun' })
const ping = encodeCommand({ name: 'ping', value: 0 }).subarray(0, 5)

function commandAtEnd(bytes: Uint8Array, end: number, from: number): { command: Command; start: number } | undefined {
  const matches = (pattern: Uint8Array, start: number): boolean => start >= from && pattern.every((byte, i) => bytes[start + i] === byte)
  if (matches(run, end - run.length)) return { command: { name: 'postcopyRun' }, start: end - run.length }
  const start = end - 9
  if (!matches(ping, start)) return undefined
  const value = new DataView(bytes.buffer, bytes.byteOffset + start + 5).getUint32(0)
  return { command: { name: 'ping', value }, start }
}
