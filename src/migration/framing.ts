/**
 * The framing of a stream as a state machine: header, configuration, sections with their footers, commands, the end
 * and the VM description. Owns what may follow what; the bodies of `ram` and `dirty-bitmap` are read by their own
 * files, and where the input comes from is the parser's.
 *
 * Device sections carry no length. Given the lengths (from the VM description, `devices`), every
 * section is taken apart; without them, everything from the first FULL section after RAM to the end
 * is passed through as `tail`.
 */
import { readCommand } from './commands.ts'
import { capabilitiesOf, pageSizeOf, readConfiguration } from './configuration.ts'
import { DirtyBitmapSection, dirtyBitmapFlag } from './dirty-bitmap.ts'
import { hex, limits, sectionByte, streamError } from './format.ts'
import { findFooter } from './footer-scan.ts'
import type { ParserInput } from './input.ts'
import { readHeader } from './magic.ts'
import { bytesRecord, passThrough, type Passage } from './pass-through.ts'
import { RamSection } from './ram-section.ts'
import type { ConfigurationRecord, MigrationRecord, RamBlock, SectionRecord } from './records.ts'
import { named, readHead, Sections, type SectionHead } from './sections.ts'

/** How long the body of a FULL section is, as the VM description tells. */
export interface DeviceLength {
  readonly name: string
  readonly instanceId: number
  /** Bytes between the head and the footer of the section. */
  readonly bodyLength: number
}

/** What a stream without header (a second connection that recovers a postcopy) continues. */
export interface Continuation {
  /** Iterated sections known from the first connection. */
  readonly sections: readonly { readonly id: number; readonly idstr: string }[]
  readonly blocks: readonly RamBlock[]
}

/** Options of `MigrationParser`. */
export interface ParserOptions {
  /** Target page size in bytes where the stream does not tell it. Default 4096, right for x86. */
  readonly pageSize?: number | undefined
  /** Offset of the first byte, to which all offsets in records and errors are relative. Default 0. */
  readonly offset?: number | undefined
  /** Lengths of the FULL sections in stream order. */
  readonly devices?: readonly DeviceLength[] | undefined
  /** For a stream that has no header. */
  readonly continues?: Continuation | undefined
}

/** Gives a record, undefined to go on with the next state, null if more input is needed. */
type State = () => MigrationRecord | null | undefined

/** The state machine over the input of one stream. */
export class Framing {
  readonly sections: Sections = new Sections()
  configuration: ConfigurationRecord | undefined
  ram: RamSection | undefined
  readonly #input: ParserInput
  readonly #options: ParserOptions
  readonly #dirtyBitmaps = new DirtyBitmapSection()
  readonly #passages: Passage[] = []
  #state: State
  #section: SectionHead | undefined
  #iterating = false
  #nextDevice = 0
  #complete = false

  constructor(input: ParserInput, options: ParserOptions) {
    this.#input = input
    this.#options = options
    this.#state = this.#header
    if (options.continues !== undefined) this.#continue(options.continues)
  }

  /** Target page size in bytes, as far as known by now. */
  get pageSize(): number {
    const configured = this.configuration === undefined ? undefined : pageSizeOf(this.configuration)
    return configured ?? this.#options.pageSize ?? 4096
  }

  /** The stream may end here. */
  get complete(): boolean {
    return this.#complete && this.#passages.every(({ length }) => length === 0)
  }

  /** Takes one step at the start of a structure: a record, undefined to be called again, null if more input is needed. */
  next(): MigrationRecord | null | undefined {
    return this.#state()
  }

  #continue(from: Continuation): void {
    this.sections.adopt(from.sections)
    this.ram = this.#newRam(from.blocks)
    this.#iterating = true
    this.#state = this.#element
  }

  #newRam(blocks?: readonly RamBlock[]): RamSection {
    const capabilities = this.configuration === undefined ? [] : capabilitiesOf(this.configuration)
    return new RamSection({
      pageSize: this.pageSize,
      ignoreShared: capabilities.includes('x-ignore-shared'),
      mappedRam: capabilities.includes('mapped-ram'),
      blocks,
    })
  }

  #header(): MigrationRecord {
    const record = readHeader(this.#input)
    this.#state = this.#afterHeader
    return record
  }

  #afterHeader(): MigrationRecord | undefined {
    const input = this.#input
    input.require(1)
    this.#state = this.#element
    if (input.bytes[input.at] !== sectionByte.configuration) return undefined
    this.#state = this.#afterHeader
    this.configuration = readConfiguration(input)
    this.#state = this.#element
    return this.configuration
  }

  /** An element of the stream, at whose first byte the input stands. */
  #element(): MigrationRecord | undefined {
    const input = this.#input
    const offset = input.offset
    input.require(1)
    const byte = input.bytes[input.at]!
    switch (byte) {
      case sectionByte.start:
        return this.#start()
      case sectionByte.full:
        return this.#full()
      case sectionByte.part:
        return this.#again('part')
      case sectionByte.end:
        return this.#again('end')
      case sectionByte.command:
        return this.#command()
      case sectionByte.eof:
        input.at++
        this.#complete = true
        this.#state = this.#afterEof
        return { kind: 'eof', offset, length: 1 }
    }
    throw streamError('section type', 'type', `section type is ${hex(byte)}, expected START, PART, END, FULL, COMMAND or EOF`, offset)
  }

  #start(): SectionRecord {
    const head = readHead(this.#input, 'start')
    this.sections.introduce(head)
    if (head.idstr === 'ram') {
      if (this.ram !== undefined) throw streamError('section header', 'idstr', `a second 'ram' section`, head.offset)
      this.ram = this.#newRam()
    }
    return this.#enter(head)
  }

  #again(type: 'part' | 'end'): SectionRecord {
    const head = this.sections.readAgain(this.#input, type)
    this.#iterating = true
    return this.#enter(head)
  }

  /** The body of an iterated section follows. */
  #enter(head: SectionRecord): SectionRecord {
    this.#section = head
    this.#state = head.idstr === 'ram' ? this.#ramBody : this.#dirtyBitmapBody
    return head
  }

  #ramBody(): MigrationRecord | null {
    const record = this.ram!.next(this.#input)
    if (record?.kind === 'ram-mark' && record.mark === 'eos') this.#state = this.#footer
    return record
  }

  #dirtyBitmapBody(): MigrationRecord {
    const record = this.#dirtyBitmaps.next(this.#input)
    if (record.kind === 'dirty-bitmap' && (record.flags & dirtyBitmapFlag.eos) !== 0) this.#state = this.#footer
    return record
  }

  #footer(): MigrationRecord | undefined {
    const record = this.sections.readFooter(this.#input, this.#section!)
    this.#state = this.#element
    return record
  }

  /** A device section: taken apart if its length is known or if RAM is still to come, else the tail begins. */
  #full(): MigrationRecord | undefined {
    const known = this.#options.devices !== undefined
    if (known || !this.#iterating) {
      const head = readHead(this.#input, 'full')
      this.#section = head
      this.#state = this.#deviceBody
      return head
    }
    this.#complete = true
    this.#state = this.#tail
    return undefined
  }

  #tail(): MigrationRecord {
    return this.#rest('tail')
  }

  #rest(of: 'tail' | 'trailing'): MigrationRecord {
    const input = this.#input
    input.require(1)
    return bytesRecord(input, of, input.end - input.at)
  }

  #deviceBody(): MigrationRecord | undefined {
    const { devices } = this.#options
    const { idstr, instanceId } = this.#section!
    if (devices === undefined) {
      this.#state = this.#earlyDevice
      return undefined
    }
    const device = devices[this.#nextDevice++]
    if (device?.name !== idstr || device.instanceId !== instanceId) {
      const expected = device === undefined ? 'no more sections' : `'${device.name}' instance ${device.instanceId}`
      throw streamError(named(this.#section!), 'idstr', `instance ${instanceId} is not what the VM description lists here: ${expected}`, this.#input.offset)
    }
    this.#passages.push({ of: 'device', length: device.bodyLength })
    this.#state = this.#passToFooter
    return undefined
  }

  #passToFooter(): MigrationRecord | undefined {
    const record = passThrough(this.#input, this.#passages)
    if (record === undefined) this.#state = this.#footer
    return record
  }

  /** A device section before RAM, length unknown: its end is its footer with a section behind it. */
  #earlyDevice(): MigrationRecord | undefined {
    const input = this.#input
    const end = findFooter(input, this.#section!.id, (id) => this.sections.has(id))
    if (end > input.at) return bytesRecord(input, 'device', end - input.at)
    this.#state = this.#footer
    return undefined
  }

  #command(): MigrationRecord {
    const input = this.#input
    const offset = input.offset
    const command = readCommand(input)
    if (command.name === 'packaged') {
      this.#passages.push({ of: 'package', length: command.packageLength })
      this.#iterating = true
      this.#state = this.#package
    }
    return { kind: 'command', offset, length: input.offset - offset, command }
  }

  #package(): MigrationRecord | undefined {
    const record = passThrough(this.#input, this.#passages)
    if (record === undefined) this.#state = this.#element
    return record
  }

  #afterEof(): MigrationRecord {
    const input = this.#input
    const offset = input.offset
    input.require(1)
    const byte = input.bytes[input.at]!
    if (byte !== sectionByte.vmDescription) {
      if (byte !== 0) throw streamError('end of stream', 'type', `byte ${hex(byte)} behind EOF, expected a VM description or the end`, offset)
      this.#state = this.#trailing
      return this.#trailing()
    }
    input.u8()
    const jsonLength = input.u32()
    if (jsonLength > limits.vmDescription) {
      throw streamError('VM description', 'length', `length is ${jsonLength}, allowed up to ${limits.vmDescription}`, offset + 1)
    }
    this.#passages.push({ of: 'vm-description', length: jsonLength })
    this.#state = this.#vmDescription
    return { kind: 'vm-description', offset, length: 5, jsonLength }
  }

  #vmDescription(): MigrationRecord | undefined {
    const record = passThrough(this.#input, this.#passages)
    if (record === undefined) this.#state = this.#trailing
    return record
  }

  #trailing(): MigrationRecord {
    return this.#rest('trailing')
  }

  /** What is wrong with a stream that ends where the input ends. */
  truncated(): Error {
    const input = this.#input
    const section = this.#section
    const missing = this.#passages.reduce((sum, { length }) => sum + length, 0)
    const expected = missing > 0 ? missing : Math.max(1, input.wanted - input.pending)
    const within = section === undefined ? 'stream' : named(section)
    const structure = this.#state === this.#element ? (section === undefined ? 'stream' : `stream behind ${within}`) : within
    return streamError(structure, 'length', `the stream ends here, at least ${expected} more bytes expected`, input.base + input.end)
  }
}
