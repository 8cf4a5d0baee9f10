/**
 * The configuration section: machine type, and subsections that say how to read the rest.
 *
 * ```
 * 07 | be32 length, machine type | { 05, u8 length, "configuration/…", be32 version, body } …
 * ```
 */
import { UnsupportedError } from '../core/errors.ts'
import { limits, sectionByte, streamError } from './format.ts'
import type { ParserInput } from './input.ts'
import type { ConfigurationRecord, ConfigurationSubsection } from './records.ts'

const structure = 'configuration section'

/** Reads the section whose byte 0x07 is the next. */
export function readConfiguration(input: ParserInput): ConfigurationRecord {
  const offset = input.offset
  input.u8()
  const length = input.u32()
  if (length === 0 || length > limits.machineName) {
    throw streamError(structure, 'name length', `machine type of ${length} bytes, allowed 1 to ${limits.machineName}`, offset + 1)
  }
  const machine = input.text(length, structure, 'machine type')
  const subsections: ConfigurationSubsection[] = []
  for (;;) {
    input.require(1)
    if (input.bytes[input.at] !== sectionByte.subsection) break
    if (subsections.length === 8) throw streamError(structure, 'subsection', 'more than 8 subsections', input.offset)
    subsections.push(readSubsection(input))
  }
  return { kind: 'configuration', offset, length: input.offset - offset, machine, subsections }
}

function readSubsection(input: ParserInput): ConfigurationSubsection {
  const offset = input.offset
  input.u8()
  const name = input.counted(structure, 'subsection name')
  const version = input.u32()
  switch (name) {
    case 'configuration/target-page-bits':
      return { name, version, pageBits: readPageBits(input) }
    case 'configuration/capabilities':
      return { name, version, capabilities: readCapabilities(input) }
    case 'configuration/uuid':
      return { name, version, uuid: input.take(16).slice() }
  }
  throw new UnsupportedError(`${structure}: subsection '${name}' at offset ${offset} is not known, so its length is not`, [name])
}

function readPageBits(input: ParserInput): number {
  const offset = input.offset
  const bits = input.u32()
  if (2 ** bits < limits.pageSizeMin || 2 ** bits > limits.pageSizeMax) {
    throw streamError(structure, 'target page bits', `target page bits is ${bits}, allowed 8 to 20`, offset)
  }
  return bits
}

function readCapabilities(input: ParserInput): string[] {
  const offset = input.offset
  const count = input.u32()
  if (count > limits.capabilities) {
    throw streamError(structure, 'capability count', `${count} capabilities, allowed up to ${limits.capabilities}`, offset)
  }
  const capabilities: string[] = []
  while (capabilities.length < count) capabilities.push(input.counted(structure, 'capability'))
  return capabilities
}

/** The capabilities that the configuration section lists. */
export function capabilitiesOf(configuration: Pick<ConfigurationRecord, 'subsections'>): readonly string[] {
  for (const part of configuration.subsections) if (part.name === 'configuration/capabilities') return part.capabilities
  return []
}

/** The target page size in bytes that the configuration section gives; most targets do not write it. */
export function pageSizeOf(configuration: Pick<ConfigurationRecord, 'subsections'>): number | undefined {
  for (const part of configuration.subsections) if (part.name === 'configuration/target-page-bits') return 2 ** part.pageBits
  return undefined
}
