/**
 * The forward-only parser: a synchronous state machine over chunks of any size. Owns the framing of
 * sections; the bodies of `ram` and `dirty-bitmap` are read by their own files. Memory is bounded:
 * one incomplete structure, the list of RAM blocks and section names, and the arrays of one batch.
 *
 * Device sections carry no length. Given the lengths (from the VM description, `devices`), every
 * section is taken apart; without them, everything from the first FULL section after RAM to the end
 * is passed through as `tail`.
 */
import { UnsupportedError } from '../core/errors.ts'
import { readCommand } from './commands.ts'
import { capabilitiesOf, pageSizeOf, readConfiguration } from './configuration.ts'
import { DirtyBitmapSection, dirtyBitmapFlag } from './dirty-bitmap.ts'
import { hex, limits, sectionByte, streamError, streamMagic, streamVersion } from './format.ts'
import { findFooter } from './footer-scan.ts'
import { ParserInput, underrun } from './input.ts'
import { describeMagic } from './magic.ts'
import { bytesRecord, passThrough, type Passage } from './pass-through.ts'
import { RamSection } from './ram-section.ts'
import type { ConfigurationRecord, MigrationRecord, RamBlock, SectionRecord, SectionType } from './records.ts'

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

/** Options of {@link MigrationParser}. */
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

interface Section {
  readonly id: number
  readonly idstr: string
  readonly instanceId: number
  readonly versionId: number
}

/** Gives a record, undefined to go on with the next state, null if more input is needed. */
type State = () => MigrationRecord | null | undefined

/**
 * Takes a stream apart as it arrives.
 *
 * ```ts
 * for await (const chunk of socket) {
 *   for (const record of parser.push(chunk)) …
 * }
 * parser.end()
 * ```
 *
 * Malformed input throws `FormatError` with code `ERR_STREAM`, what this library does not read
 * `UnsupportedError`; after an error every further call throws it again.
 */
export class MigrationParser {
  readonly #input: ParserInput
  readonly #options: ParserOptions
  readonly #sections = new Map<number, Section>()
  readonly #dirtyBitmaps = new DirtyBitmapSection()
  readonly #passages: Passage[] = []
  #ram: RamSection | undefined
  #configuration: ConfigurationRecord | undefined
  #state: State
  #section: Section | undefined
  #footers: boolean | undefined
  #iterating = false
  #nextDevice = 0
  #complete = false
  #failure: unknown

  constructor(options: ParserOptions = {}) {
    checkPageSize(options.pageSize)
    this.#options = options
    this.#input = new ParserInput(options.offset ?? 0)
    this.#state = this.#header
    if (options.continues !== undefined) this.#continue(options.continues)
  }

  /** The configuration section, once read. */
  get configuration(): ConfigurationRecord | undefined {
    return this.#configuration
  }

  /** The RAM blocks listed so far. */
  get blocks(): readonly RamBlock[] {
    return this.#ram?.blocks ?? []
  }

  /** Id of the `ram` section, once its START was read. */
  get ramSectionId(): number | undefined {
    for (const section of this.#sections.values()) if (section.idstr === 'ram') return section.id
    return undefined
  }

  /** Target page size in bytes, as far as known by now. */
  get pageSize(): number {
    const configured = this.#configuration === undefined ? undefined : pageSizeOf(this.#configuration)
    return configured ?? this.#options.pageSize ?? 4096
  }

  /** Stream offset of the first byte that no record covers yet. */
  get offset(): number {
    return this.#input.offset
  }

  /**
   * Gives the parser the next bytes and iterates over the records they complete. The iteration must
   * be finished before the next `push`; `chunk` must not change until then.
   */
  push(chunk: Uint8Array): Iterable<MigrationRecord> {
    if (!this.#input.exhausted && this.#failure === undefined) {
      throw new TypeError('the records of the chunk before were not all taken')
    }
    this.#input.push(chunk)
    return this.#records()
  }

  /**
   * Bytes from `offset` on that are pages or padding of a mapped-ram block; 0 unless all input was
   * consumed. Whoever can seek and does not want them may `skip` them.
   */
  get skippable(): number {
    if (!this.#input.exhausted || this.#input.pending > 0) return 0
    const passage = this.#ram?.passages[0]
    return passage === undefined || passage.of === 'mapped-ram-bitmap' ? 0 : passage.length
  }

  /** Passes over `length` of the {@link skippable} bytes; no record covers them. */
  skip(length: number): void {
    const { skippable } = this
    if (length > skippable) throw new RangeError(`only ${skippable} bytes can be skipped, not ${length}`)
    if (length === 0) return
    this.#ram!.passages[0]!.length -= length
    this.#input.skip(length)
  }

  /** The next record, or undefined when more input is needed. */
  next(): MigrationRecord | undefined {
    if (this.#failure !== undefined) throw this.#failure as Error
    try {
      return this.#next()
    } catch (error) {
      this.#failure = error
      throw error
    }
  }

  /** Tells that the input is over. @throws FormatError if the stream is cut short. */
  end(): void {
    if (this.#failure !== undefined) throw this.#failure as Error
    if (this.#complete && this.#input.pending === 0 && this.#passages.every(({ length }) => length === 0)) return
    this.#failure = this.#truncated()
    throw this.#failure as Error
  }

  *#records(): Generator<MigrationRecord, void, undefined> {
    for (let record = this.next(); record !== undefined; record = this.next()) yield record
  }

  #next(): MigrationRecord | undefined {
    const input = this.#input
    for (;;) {
      input.begin()
      if (input.at === input.end) return undefined
      try {
        const record = this.#state()
        if (record === undefined) continue
        if (record !== null) return record
      } catch (error) {
        if (error !== underrun) throw error
      }
      if (!input.refill()) return undefined
    }
  }

  #continue(from: Continuation): void {
    for (const { id, idstr } of from.sections) this.#sections.set(id, { id, idstr, instanceId: 0, versionId: idstr === 'ram' ? 4 : 1 })
    this.#ram = this.#newRam(from.blocks)
    this.#iterating = true
    this.#state = this.#element
  }

  #newRam(blocks?: readonly RamBlock[]): RamSection {
    const capabilities = this.#configuration === undefined ? [] : capabilitiesOf(this.#configuration)
    return new RamSection({
      pageSize: this.pageSize,
      ignoreShared: capabilities.includes('x-ignore-shared'),
      mappedRam: capabilities.includes('mapped-ram'),
      blocks,
    })
  }

  #header(): MigrationRecord {
    const input = this.#input
    const offset = input.offset
    input.require(8)
    const magic = input.u32()
    if (magic !== streamMagic) {
      const found = describeMagic(input.bytes.subarray(input.at - 4, input.end))
      throw streamError('header', 'magic', `not a QEMU migration stream: the magic is ${hex(magic)}, expected ${hex(streamMagic)}${found}`, offset)
    }
    const version = input.u32()
    if (version !== streamVersion) throw streamError('header', 'version', `version is ${version}, expected ${streamVersion}`, offset + 4)
    this.#state = this.#afterHeader
    return { kind: 'header', offset, length: 8, version }
  }

  #afterHeader(): MigrationRecord | undefined {
    const input = this.#input
    input.require(1)
    this.#state = this.#element
    if (input.bytes[input.at] !== sectionByte.configuration) return undefined
    this.#state = this.#afterHeader
    this.#configuration = readConfiguration(input)
    this.#state = this.#element
    return this.#configuration
  }

  /** An element of the stream, at whose first byte the input stands. */
  #element(): MigrationRecord | undefined {
    const input = this.#input
    const offset = input.offset
    input.require(1)
    const byte = input.bytes[input.at]!
    switch (byte) {
      case sectionByte.start:
        return this.#sectionHead('start')
      case sectionByte.full:
        return this.#full()
      case sectionByte.part:
        return this.#sectionAgain('part')
      case sectionByte.end:
        return this.#sectionAgain('end')
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

  /** `01|04 be32 id, u8 length, idstr, be32 instance id, be32 version id` */
  #sectionHead(type: SectionType): SectionRecord {
    const input = this.#input
    const offset = input.offset
    const structure = 'section header'
    input.u8()
    const id = input.u32()
    const idstr = input.counted(structure, 'idstr')
    const instanceId = input.u32()
    const versionId = input.u32()
    const section: Section = { id, idstr, instanceId, versionId }
    if (type === 'start') this.#beginIterated(section, offset)
    else this.#state = this.#deviceBody
    this.#section = section
    return { kind: 'section', type, offset, length: input.offset - offset, ...section }
  }

  #beginIterated(section: Section, offset: number): void {
    const { id, idstr, versionId } = section
    if (this.#sections.has(id)) throw streamError('section header', 'section id', `section id ${id} is used twice`, offset + 1)
    if (this.#sections.size >= limits.sections) throw streamError('section header', 'section id', `more than ${limits.sections} sections`, offset)
    const known = idstr === 'ram' ? 4 : idstr === 'dirty-bitmap' ? 1 : undefined
    if (known === undefined) {
      throw new UnsupportedError(`section '${idstr}' (id ${id}) at offset ${offset} has no length, and its contents are not known`, [idstr])
    }
    if (versionId !== known) {
      throw streamError(`section '${idstr}'`, 'version id', `version is ${versionId}, expected ${known}`, offset)
    }
    if (idstr === 'ram' && this.#ram !== undefined) throw streamError('section header', 'idstr', `a second 'ram' section`, offset)
    if (idstr === 'ram') this.#ram = this.#newRam()
    this.#sections.set(id, section)
    this.#state = idstr === 'ram' ? this.#ramBody : this.#dirtyBitmapBody
  }

  /** `02|03 be32 id` */
  #sectionAgain(type: SectionType): SectionRecord {
    const input = this.#input
    const offset = input.offset
    input.u8()
    const id = input.u32()
    const section = this.#sections.get(id)
    if (section === undefined) {
      throw streamError('section header', 'section id', `${type.toUpperCase()} of section id ${id}, which no START introduced`, offset + 1)
    }
    this.#section = section
    this.#iterating = true
    this.#state = section.idstr === 'ram' ? this.#ramBody : this.#dirtyBitmapBody
    return { kind: 'section', type, offset, length: 5, ...section }
  }

  #ramBody(): MigrationRecord | null {
    const record = this.#ram!.next(this.#input)
    if (record?.kind === 'ram-mark' && record.mark === 'eos') this.#state = this.#footer
    return record
  }

  #dirtyBitmapBody(): MigrationRecord {
    const record = this.#dirtyBitmaps.next(this.#input)
    if (record.kind === 'dirty-bitmap' && (record.flags & dirtyBitmapFlag.eos) !== 0) this.#state = this.#footer
    return record
  }

  #footer(): MigrationRecord | undefined {
    const input = this.#input
    const offset = input.offset
    const { id, idstr } = this.#section!
    const structure = `section '${idstr}' (id ${id})`
    input.require(1)
    const byte = input.bytes[input.at]!
    if (byte !== sectionByte.footer) {
      if (this.#footers === true) throw streamError(structure, 'footer', `footer expected, found ${hex(byte)}`, offset)
      this.#footers = false
      this.#state = this.#element
      return undefined
    }
    input.u8()
    const found = input.u32()
    if (this.#footers === false || found !== id) {
      throw streamError(structure, 'footer', `footer has section id ${found}, expected ${id}`, offset + 1)
    }
    this.#footers = true
    this.#state = this.#element
    return { kind: 'footer', offset, length: 5, id }
  }

  /** A device section: taken apart if its length is known or if RAM is still to come, else the tail begins. */
  #full(): MigrationRecord | undefined {
    const known = this.#options.devices !== undefined
    if (known || !this.#iterating) return this.#sectionHead('full')
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
    const { id, idstr, instanceId } = this.#section!
    if (devices === undefined) {
      this.#state = this.#earlyDevice
      return undefined
    }
    const device = devices[this.#nextDevice++]
    if (device?.name !== idstr || device.instanceId !== instanceId) {
      const expected = device === undefined ? 'no more sections' : `'${device.name}' instance ${device.instanceId}`
      throw streamError(`section '${idstr}' (id ${id})`, 'idstr', `instance ${instanceId} is not what the VM description lists here: ${expected}`, this.#input.offset)
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
    const end = findFooter(input, this.#section!.id, (id) => this.#sections.has(id))
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

  #truncated(): Error {
    const input = this.#input
    const section = this.#section
    const missing = this.#passages.reduce((sum, { length }) => sum + length, 0)
    const expected = missing > 0 ? missing : Math.max(1, input.wanted - input.pending)
    const within = section === undefined ? 'stream' : `section '${section.idstr}' (id ${section.id})`
    const structure = this.#state === this.#element ? (section === undefined ? 'stream' : `stream behind ${within}`) : within
    return streamError(structure, 'length', `the stream ends here, at least ${expected} more bytes expected`, input.base + input.end)
  }
}

function checkPageSize(pageSize: number | undefined): void {
  if (pageSize === undefined) return
  if (Math.log2(pageSize) % 1 === 0 && pageSize >= limits.pageSizeMin && pageSize <= limits.pageSizeMax) return
  throw new RangeError(`pageSize must be a power of two from ${limits.pageSizeMin} to ${limits.pageSizeMax}, not ${pageSize}`)
}
