/** Running another program with its wall clock and its CPU time. */
import { execFile } from 'node:child_process'
import type { Measured } from './harness.ts'

/** Runs a program to its end; exit codes in `accepted` are no failure. Timed by the shell, start of the program included. */
export function timed(program: string, args: readonly string[], accepted: readonly number[] = [0]): Promise<Measured> {
  const script = `TIMEFORMAT='%R %U %S'; time "$@" >/dev/null`
  return new Promise((resolve, reject) => {
    execFile('bash', ['-c', script, 'bash', program, ...args], { timeout: 600_000, maxBuffer: 1 << 26 }, (error, _stdout, stderr) => {
      const code = error === null ? 0 : typeof error.code === 'number' ? error.code : -1
      const times = stderr.trim().split('\n').at(-1)?.split(' ').map(Number) ?? []
      if (!accepted.includes(code) || times.length !== 3) reject(new Error(`${program} ${args.join(' ')} ended with ${code}: ${stderr}`))
      else resolve({ seconds: times[0]!, cpuSeconds: times[1]! + times[2]! })
    })
  })
}
