/**
 * The VM description: JSON behind the end of a stream that says what the device sections hold. Owns
 * finding it from the end of a stream and the lengths of the sections; decoding the fields is next
 * door in `device-fields.ts`.
 */
import { viewOf } from '../bytes/view.ts'
import { parseJson } from '../core/json.ts'
import { limits, sectionByte, streamError } from './format.ts'
import type { DeviceLength } from './framing.ts'

/** A field of a device section, or of a structure within one. */
export interface FieldDescription {
  readonly name: string
  /** For example `uint32`, `bool`, `buffer`, `timer`, `struct`; the set is open. */
  readonly type: string
  /** Bytes in the stream, everything nested included; of an array, of each element. */
  readonly size: number
  readonly array_len?: number
  readonly index?: number
  readonly struct?: StructDescription
  /** Of the types `vstruct`, `tmp`, `qtailq` and others: the structure's name and fields, not in `struct`. */
  readonly vmsd_name?: string
  readonly version?: number
  readonly fields?: readonly FieldDescription[]
}

/** Fields one after another, then subsections. */
export interface StructDescription {
  readonly vmsd_name: string
  readonly version: number
  readonly fields: readonly FieldDescription[]
  readonly subsections?: readonly StructDescription[]
}

/** One device section; in the order of the stream. */
export interface DeviceDescription extends StructDescription {
  readonly name: string
  readonly instance_id: number
}

/** The parsed VM description. */
export interface VmDescription {
  readonly page_size?: number
  readonly configuration?: StructDescription
  readonly devices: readonly DeviceDescription[]
}

/** Where the VM description lies in the bytes it was searched in. */
export interface VmDescriptionLocation {
  /** Position of the EOF byte, behind the last section. */
  readonly eof: number
  /** Position of the JSON. */
  readonly start: number
  readonly length: number
}

/**
 * Finds the VM description that ends exactly at the end of `bytes`, or is followed by zeroes only:
 * `00 06 be32 length {…}`. Its own length must fit, which makes a false find practically impossible.
 * `bytes` may be only the end of a stream; undefined if the description does not begin within.
 */
export function locateVmDescription(bytes: Uint8Array): VmDescriptionLocation | undefined {
  let end = bytes.length
  while (end > 0 && bytes[end - 1] === 0) end--
  if (bytes[end - 1] !== 0x7d) return undefined
  const view = viewOf(bytes)
  for (let at = bytes.lastIndexOf(sectionByte.vmDescription, end - 6); at > 0; at = bytes.lastIndexOf(sectionByte.vmDescription, at - 1)) {
    if (bytes[at - 1] !== sectionByte.eof || bytes[at + 5] !== 0x7b) continue
    const length = view.getUint32(at + 1)
    if (length === end - at - 5) return { eof: at - 1, start: at + 5, length }
  }
  return undefined
}

/**
 * Parses and checks the JSON.
 * @param offset Stream offset of the JSON, for errors.
 * @throws FormatError (`ERR_STREAM`) for anything that is not a VM description.
 */
export function parseVmDescription(json: Uint8Array, offset = 0): VmDescription {
  const structure = 'VM description'
  if (json.length > limits.vmDescription) {
    throw streamError(structure, 'length', `length is ${json.length}, allowed up to ${limits.vmDescription}`, offset)
  }
  let parsed: unknown
  try {
    parsed = parseJson(new TextDecoder('utf-8', { fatal: true }).decode(json))
  } catch (cause) {
    throw streamError(structure, 'JSON', `not valid JSON: ${(cause as Error).message}`, offset)
  }
  const problem = descriptionProblem(parsed)
  if (problem !== undefined) throw streamError(structure, 'devices', problem, offset)
  return parsed as VmDescription
}

function descriptionProblem(value: unknown): string | undefined {
  if (!isObject(value) || !Array.isArray(value['devices'])) return `no array 'devices'`
  for (const [i, device] of (value['devices'] as unknown[]).entries()) {
    const where = `device ${i}`
    if (!isObject(device) || typeof device['name'] !== 'string' || !isCount(device['instance_id'])) {
      return `${where} has no name and instance_id`
    }
    const problem = structProblem(device, `${where} '${device['name']}'`, 0)
    if (problem !== undefined) return problem
  }
  return undefined
}

function structProblem(value: Record<string, unknown>, where: string, depth: number): string | undefined {
  if (depth > limits.vmDescriptionDepth) return `${where}: nested deeper than ${limits.vmDescriptionDepth}`
  if (!Array.isArray(value['fields'])) return `${where} has no array 'fields'`
  for (const field of value['fields'] as unknown[]) {
    const problem = fieldProblem(field, where, depth)
    if (problem !== undefined) return problem
  }
  const subsections = value['subsections'] ?? []
  if (!Array.isArray(subsections)) return `${where}: 'subsections' is not an array`
  for (const part of subsections as unknown[]) {
    if (!isObject(part) || typeof part['vmsd_name'] !== 'string') return `${where}: a subsection without vmsd_name`
    const problem = structProblem(part, `${where} '${part['vmsd_name']}'`, depth + 1)
    if (problem !== undefined) return problem
  }
  return undefined
}

function fieldProblem(field: unknown, where: string, depth: number): string | undefined {
  if (!isObject(field) || typeof field['name'] !== 'string' || typeof field['type'] !== 'string') {
    return `${where} has a field without name and type`
  }
  const name = `${where} field '${field['name']}'`
  if (!isCount(field['size'])) return `${name}: size is not a count of bytes`
  if (field['array_len'] !== undefined && !isCount(field['array_len'])) return `${name}: array_len is not a count`
  if (field['index'] !== undefined && !isCount(field['index'])) return `${name}: index is not a count`
  markNullPointer(field)
  const inner = field['struct'] ?? (field['fields'] === undefined ? undefined : field)
  if (inner === undefined) return undefined
  if (!isObject(inner)) return `${name}: struct is not an object`
  return structProblem(inner, name, depth + 1)
}

/** QEMU 7.2 describes a missing element of an array of structures as one without fields, later ones as a `nullptr`. */
function markNullPointer(field: Record<string, unknown>): void {
  const struct = field['struct']
  if (!isObject(struct) || Object.keys(struct).length > 0) return
  delete field['struct']
  field['type'] = 'nullptr'
}

function isObject(value: unknown): value is Record<string, unknown> {
  return typeof value === 'object' && value !== null && !Array.isArray(value)
}

function isCount(value: unknown): value is number {
  return typeof value === 'number' && Number.isSafeInteger(value) && value >= 0 && value <= 2 ** 40
}

/** The lengths of all device sections, for {@link ParserOptions.devices}. */
export function deviceLengths(description: VmDescription): DeviceLength[] {
  return description.devices.map((device) => ({
    name: device.name,
    instanceId: device.instance_id,
    bodyLength: bodyLength(device),
  }))
}

/** Bytes of a structure in the stream: its fields, then its subsections with their heads. */
export function bodyLength(struct: StructDescription): number {
  const known = lengths.get(struct)
  if (known !== undefined) return known
  let length = 0
  for (const { size, array_len: count } of struct.fields) length += size * (count ?? 1)
  for (const part of struct.subsections ?? []) length += subsectionHeadLength(part.vmsd_name) + bodyLength(part)
  lengths.set(struct, length)
  return length
}

/** Each is asked for once for every element that has it. */
const lengths = new WeakMap<StructDescription, number>()

/** `05`, the counted name and the be32 version. */
export function subsectionHeadLength(name: string): number {
  return 1 + 1 + new TextEncoder().encode(name).length + 4
}
