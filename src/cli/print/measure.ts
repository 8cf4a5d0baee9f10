/** `measure` for people, as qemu-img 10.0 prints it. */
import type { MeasureEntry } from './shapes.ts'

/** The lines of a measurement. */
export function measureText(result: MeasureEntry): string[] {
  const lines = [`required size: ${result.required}`, `fully allocated size: ${result['fully-allocated']}`]
  if (result.bitmaps !== undefined) lines.push(`bitmaps size: ${result.bitmaps}`)
  return lines
}
