/** The table of internal snapshots, as qemu-img 10.0 prints it. */
import { formatSize } from '../size.ts'
import type { SnapshotEntry } from './shapes.ts'

/** `Snapshot list:` and its table, with names as `shown`; nothing where there are no snapshots. */
export function snapshotTable(snapshots: readonly SnapshotEntry[], shown: (name: string) => string = (name) => name): string[] {
  if (snapshots.length === 0) return []
  const rows = snapshots.map((snapshot) =>
    row(
      shown(text(snapshot.id)),
      shown(text(snapshot.name)),
      formatSize(snapshot['vm-state-size']),
      localDate(snapshot['date-sec']),
      clock(snapshot['vm-clock-sec'], snapshot['vm-clock-nsec']),
      snapshot.icount === undefined ? '--' : String(snapshot.icount),
    ),
  )
  return ['Snapshot list:', row('ID', 'TAG', 'VM_SIZE', 'DATE', 'VM_CLOCK', 'ICOUNT'), ...rows]
}

function row(id: string, name: string, size: string, date: string, time: string, icount: string): string {
  const left = `${id.padEnd(7)} ${name.padEnd(16)}`
  return `${left} ${size.padStart(8)} ${date.padStart(19)} ${time.padStart(15)} ${icount.padStart(10)}`
}

/** What precedes the first NUL. */
function text(bytes: string): string {
  return bytes.split('\0', 1)[0]!
}

/** `YYYY-MM-DD HH:MM:SS` in local time. */
function localDate(seconds: number): string {
  const date = new Date(seconds * 1000)
  const two = (value: number): string => String(value).padStart(2, '0')
  const day = `${String(date.getFullYear())}-${two(date.getMonth() + 1)}-${two(date.getDate())}`
  return `${day} ${two(date.getHours())}:${two(date.getMinutes())}:${two(date.getSeconds())}`
}

/** `HHHH:MM:SS.mmm` */
function clock(seconds: number, nanoseconds: number): string {
  const two = (value: number): string => String(value).padStart(2, '0')
  const hours = String(Math.floor(seconds / 3600)).padStart(4, '0')
  const millis = String(Math.floor(nanoseconds / 1_000_000)).padStart(3, '0')
  return `${hours}:${two(Math.floor(seconds / 60) % 60)}:${two(seconds % 60)}.${millis}`
}
