/** The requests of a trace as a drawing in text: time to the right, offset upwards. */
import type { TracedRequest } from '../../block/trace.ts'
import { formatSize } from '../size.ts'
import type { Palette } from '../terminal.ts'

const rows = 16

/** `37 reads, 1.2 MiB; 4 writes, 256 KiB; 1 flush`. */
export function summariseTrace(requests: readonly TracedRequest[]): string {
  const parts: string[] = []
  for (const operation of ['read', 'write', 'write zeroes', 'discard', 'flush', 'resize'] as const) {
    const of = requests.filter((request) => request.operation === operation)
    if (of.length === 0) continue
    const bytes = of.reduce((sum, { length }) => sum + length, 0)
    parts.push(`${of.length} × ${operation}${bytes > 0 ? `, ${formatSize(bytes)}` : ''}`)
  }
  return parts.length === 0 ? 'no requests' : parts.join('; ')
}

/** The drawing: `r` a read, `w` a write, `z` zeroes, `#` several sorts in one place. */
export function drawTrace(requests: readonly TracedRequest[], { columns, palette }: { columns: number; palette: Palette }): string[] {
  const placed = requests.filter(({ length }) => length > 0)
  if (placed.length === 0) return []
  const width = Math.max(20, columns - 14)
  const start = Math.min(...placed.map(({ submitted }) => submitted))
  const end = Math.max(...placed.map(({ submitted, completed }) => completed ?? submitted))
  const top = Math.max(...placed.map(({ offset, length }) => offset + length))
  const cells = Array.from({ length: rows }, () => new Array<string>(width).fill(' '))
  for (const { operation, offset, length, submitted, completed } of placed) {
    const mark = operation === 'read' ? 'r' : operation === 'write' ? 'w' : 'z'
    const column = (time: number): number => Math.min(width - 1, Math.floor(((time - start) / Math.max(end - start, 1e-6)) * width))
    const row = (at: number): number => Math.min(rows - 1, Math.floor((at / top) * rows))
    for (let y = row(offset); y <= row(offset + length - 1); y++) {
      for (let x = column(submitted); x <= column(completed ?? submitted); x++) {
        const before = cells[y]![x]!
        cells[y]![x] = before === ' ' || before === mark ? mark : '#'
      }
    }
  }
  const paint: Record<string, (text: string) => string> = { r: palette.blue, w: palette.red, z: palette.green }
  const lines = cells.reverse().map((line, y) => {
    const label = y === 0 ? formatSize(top) : y === rows - 1 ? '0' : ''
    const runs = line.join('').replace(/r+|w+|z+/g, (run) => paint[run[0]!]!(run))
    return `${label.padStart(10)} │${runs}`
  })
  return [...lines, `${' '.repeat(10)} └${'─'.repeat(width)}`, `${' '.repeat(12)}0 ms${`${(end - start).toFixed(1)} ms`.padStart(width - 4)}`]
}
