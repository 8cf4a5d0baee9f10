/** `map`, for people and as JSON, as qemu-img 10.0 prints it. */
import type { MapEntry } from './shapes.ts'

/** The heading of the table for people. */
export const mapHeading: string = `${'Offset'.padEnd(16)}${'Length'.padEnd(16)}${'Mapped to'.padEnd(16)}File`

/** One run as a row; only runs with data that lie plainly in `file` have one. */
export function mapRow(entry: MapEntry, file: string): string {
  return `${hex(entry.start)}${hex(entry.length)}${hex(entry.offset!)}${file}`
}

/** One run on its line of the JSON array, without the brackets and commas around it. */
export function mapJson(entry: MapEntry): string {
  const { start, length, depth, present, zero, data, compressed, offset } = entry
  const where = offset === undefined ? '' : `, "offset": ${offset}`
  const flags = `"present": ${present}, "zero": ${zero}, "data": ${data}, "compressed": ${compressed}`
  return `{ "start": ${start}, "length": ${length}, "depth": ${depth}, ${flags}${where}}`
}

/** C's `%#-16llx`: no prefix on zero. */
function hex(value: number): string {
  return (value === 0 ? '0' : `0x${value.toString(16)}`).padEnd(16)
}
