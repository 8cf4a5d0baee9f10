/**
 * Device state as JSON: the bytes of a device section read by the VM description, as QEMU's
 * `analyze-migration.py` does. Fields of types this file does not know come as hexadecimal text, so
 * nothing is lost.
 */
import { viewOf } from '../bytes/view.ts'
import { limits, streamError } from './format.ts'
import { bodyLength, subsectionHeadLength, type FieldDescription, type StructDescription } from './vm-description.ts'

/** A decoded field: a structure, an array, or a plain value. 64-bit integers beyond 2^53 and bytes are `0x…` text. */
export type DeviceValue = null | boolean | number | string | DeviceValue[] | { [name: string]: DeviceValue }

/** How many values may still be decoded: a description can claim many more than there are bytes. */
export interface ValueBudget {
  left: number
}

/** What the values of one device of so many bytes may take. */
export function deviceBudget(length: number): ValueBudget {
  return { left: Math.min(limits.deviceValues, 65_536 + 4 * length) }
}

/**
 * Decodes a structure that begins at `bytes[at]`.
 * @throws FormatError (`ERR_STREAM`) if the description reaches past `bytes`, or has more values than their number allows
 */
export function decodeStruct(struct: StructDescription, bytes: Uint8Array, at = 0, budget: ValueBudget = deviceBudget(bytes.length)): { [name: string]: DeviceValue } {
  const values = Object.create(null) as { [name: string]: DeviceValue }
  for (const field of struct.fields) {
    const count = field.array_len ?? 1
    const length = field.size * count
    if (at + length > bytes.length) throw fieldError(`field '${field.name}' reaches past its section of ${bytes.length} bytes`)
    spend(budget, 1)
    // of elements that are described one by one, QEMU 10.0 leaves the last without an index
    const element = field.array_len !== undefined || field.index !== undefined || Array.isArray(values[field.name])
    if (!element) values[field.name] = decodeField(field, bytes, at, budget)
    else decodeElements(values, field, bytes, at, budget)
    at += length
  }
  for (const part of struct.subsections ?? []) {
    at += subsectionHeadLength(part.vmsd_name)
    spend(budget, 1)
    values[part.vmsd_name] = decodeStruct(part, bytes, at, budget)
    at += bodyLength(part)
  }
  return values
}

/** Elements of an array; an array may be described by several entries, each from an index on. */
function decodeElements(values: { [name: string]: DeviceValue }, field: FieldDescription, bytes: Uint8Array, at: number, budget: ValueBudget): void {
  const known = values[field.name]
  const elements = Array.isArray(known) ? known : []
  values[field.name] = elements
  if (field.size === 0) return
  const count = field.array_len ?? 1
  spend(budget, count)
  for (let i = 0; i < count; i++) elements.push(decodeField(field, bytes, at + i * field.size, budget))
}

function spend(budget: ValueBudget, values: number): void {
  budget.left -= values
  if (budget.left < 0) throw fieldError('the VM description has more values than its device section can hold')
}

function fieldError(detail: string): Error {
  return streamError('VM description', 'fields', detail, 0)
}

function decodeField(field: FieldDescription, bytes: Uint8Array, at: number, budget: ValueBudget): DeviceValue {
  const { size, type } = field
  const struct = field.struct ?? inlineStruct(field)
  if (struct !== undefined && bodyLength(struct) === size) return decodeStruct(struct, bytes.subarray(at, at + size), 0, budget)
  const view = viewOf(bytes)
  const integer = /^(u?)int(8|16|32|64)\b/.exec(type)
  if (integer !== null && Number(integer[2]) === size * 8) return readInteger(view, at, size, integer[1] !== 'u')
  if (type === 'bool' && size === 1) return bytes[at] !== 0
  if (type === 'nullptr') return null
  if (type === 'timer' && size === 8) return readTimer(view, at)
  return hexText(bytes.subarray(at, at + size))
}

function inlineStruct(field: FieldDescription): StructDescription | undefined {
  if (field.fields === undefined || (field.type !== 'vstruct' && field.type !== 'tmp')) return undefined
  return { vmsd_name: field.vmsd_name ?? field.name, version: field.version ?? 0, fields: field.fields }
}

function readInteger(view: DataView, at: number, size: number, signed: boolean): DeviceValue {
  if (size === 1) return signed ? view.getInt8(at) : view.getUint8(at)
  if (size === 2) return signed ? view.getInt16(at) : view.getUint16(at)
  if (size === 4) return signed ? view.getInt32(at) : view.getUint32(at)
  const value = signed ? view.getBigInt64(at) : view.getBigUint64(at)
  const number = Number(value)
  return Number.isSafeInteger(number) ? number : `0x${BigInt.asUintN(64, value).toString(16)}`
}

/** Nanoseconds at which the timer fires, or null if it is not armed (all ones). */
function readTimer(view: DataView, at: number): DeviceValue {
  const value = view.getBigUint64(at)
  return value === 0xffff_ffff_ffff_ffffn ? null : readInteger(view, at, 8, false)
}

const hexDigits: readonly string[] = Array.from({ length: 256 }, (_, byte) => byte.toString(16).padStart(2, '0'))

function hexText(bytes: Uint8Array): string {
  const pieces = ['0x']
  for (let at = 0; at < bytes.length; at += 8192) pieces.push(Array.from(bytes.subarray(at, at + 8192), (byte) => hexDigits[byte]!).join(''))
  return pieces.join('')
}
