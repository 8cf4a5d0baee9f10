/** `fio`, the yardstick for what the disk can do: direct by libaio, 1 MiB, queue depth 8; buffered by plain reads and writes. */
import { execFile } from 'node:child_process'
import { outputOf, type Measured } from './harness.ts'

export const hasFio: boolean = outputOf('fio', ['--version']) !== undefined

export interface FioJob {
  readonly file: string
  readonly bytes: number
  readonly operation: 'read' | 'write'
  readonly direct: boolean
}

interface FioStatus {
  readonly jobs: readonly { readonly read: FioSide; readonly write: FioSide; readonly usr_cpu: number; readonly sys_cpu: number }[]
}

interface FioSide {
  readonly io_bytes: number
  /** Milliseconds of I/O. */
  readonly runtime: number
}

/** Runs one job; the time is that of its I/O without fio's start, and for a write with the fsync at its end. */
export function fio(job: FioJob): Promise<Measured> {
  const args = [
    '--name=bench', `--filename=${job.file}`, `--rw=${job.operation}`, '--bs=1M',
    ...(job.direct ? ['--ioengine=libaio', '--iodepth=8', '--direct=1'] : ['--ioengine=psync', '--direct=0']),
    `--size=${job.bytes}`, '--fallocate=none', '--output-format=json',
    ...(job.operation === 'write' ? ['--end_fsync=1'] : ['--invalidate=0']),
  ]
  return new Promise((resolve, reject) => {
    execFile('fio', args, { timeout: 120_000, maxBuffer: 1 << 24 }, (error, stdout) => {
      if (error !== null) { reject(error); return; }
      const status = JSON.parse(stdout.slice(stdout.indexOf('{'))) as FioStatus
      const first = status.jobs[0]!
      const side = first[job.operation]
      if (side.io_bytes < job.bytes) { reject(new Error(`fio moved ${side.io_bytes} of ${job.bytes} bytes`)); return; }
      const seconds = side.runtime / 1000
      resolve({ seconds, cpuSeconds: ((first.usr_cpu + first.sys_cpu) / 100) * seconds })
    })
  })
}
