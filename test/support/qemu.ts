/**
 * Finds the real QEMUs that interop tests talk to. Debian's own on the PATH, and a newer one unpacked
 * beside it (`QCOW2_QEMU10`, default /opt/qemu-10.0; `.ci/install-qemu` puts it there).
 */
import { execFile, spawn, type ChildProcessWithoutNullStreams } from 'node:child_process'
import { existsSync } from 'node:fs'
import { execFileSync } from 'node:child_process'
import { describe, expect, test } from 'vitest'

export interface ToolResult {
  code: number
  stdout: string
  stderr: string
}

/** One installed QEMU: its tools, all of the same version. */
export class Qemu {
  readonly version: string
  readonly #folder: string
  readonly #dataFolders: readonly string[]

  constructor(version: string, folder: string, dataFolders: readonly string[]) {
    this.version = version
    this.#folder = folder
    this.#dataFolders = dataFolders
  }

  get major(): number {
    return Number.parseInt(this.version, 10)
  }

  path(tool: 'qemu-img' | 'qemu-io' | 'qemu-nbd' | 'qemu-system-x86_64'): string {
    return `${this.#folder}/${tool}`
  }

  /** Runs qemu-img; a non-zero exit is a result, not an exception. */
  img(...args: string[]): Promise<ToolResult> {
    return untilMeasured(() => run(this.path('qemu-img'), args))
  }

  /** Runs qemu-img and expects exit code 0. */
  async imgOk(...args: string[]): Promise<string> {
    const result = await this.img(...args)
    expect(result, `qemu-img ${args.join(' ')}`).toMatchObject({ code: 0 })
    return result.stdout
  }

  io(...args: string[]): Promise<ToolResult> {
    return run(this.path('qemu-io'), args)
  }

  /** Starts a virtual machine under TCG; the caller ends it. */
  system(...args: string[]): ChildProcessWithoutNullStreams {
    const data = this.#dataFolders.flatMap((folder) => ['-L', folder])
    return spawn(this.path('qemu-system-x86_64'), [...data, '-accel', 'tcg', ...args])
  }
}

/**
 * On a loaded machine QEMU's measurement of key derivation fails at times, which is not what any test is about: then the
 * program is run again.
 */
export async function untilMeasured(program: () => Promise<ToolResult>): Promise<ToolResult> {
  for (let attempt = 1; ; attempt++) {
    const result = await program()
    if (attempt === 8 || !result.stderr.includes('Unable to get accurate CPU usage')) return result
  }
}

function run(file: string, args: string[]): Promise<ToolResult> {
  return new Promise((resolve) => {
    const options = { maxBuffer: 1 << 30, timeout: 120_000, killSignal: 'SIGKILL' as const }
    execFile(file, args, options, (error, stdout, stderr) => {
      const code = error === null ? 0 : typeof error.code === 'number' ? error.code : -1
      resolve({ code, stdout, stderr })
    })
  })
}

function versionOf(img: string): string | undefined {
  try {
    return /version (\S+)/.exec(execFileSync(img, ['--version'], { encoding: 'utf8' }))?.[1]
  } catch {
    return undefined
  }
}

function find(): Qemu[] {
  const side = process.env['QCOW2_QEMU10'] ?? '/opt/qemu-10.0'
  const found: Qemu[] = []
  for (const [folder, data] of [
    ['/usr/bin', []],
    [`${side}/usr/bin`, [`${side}/usr/share/qemu`, '/usr/share/seabios']],
  ] as const) {
    if (!existsSync(`${folder}/qemu-img`)) continue
    const version = versionOf(`${folder}/qemu-img`)
    if (version !== undefined) found.push(new Qemu(version, folder, data))
  }
  return found
}

/** Every QEMU on this machine, oldest first. Empty where there is none. */
export const qemus: readonly Qemu[] = find()

/**
 * Registers the suite once for each QEMU found. Without QEMU it says so loudly, and fails in CI.
 */
export function describeWithQemu(name: string, suite: (qemu: Qemu) => void): void {
  for (const qemu of qemus) describe(`${name} (QEMU ${qemu.version})`, () => suite(qemu))
  if (qemus.length > 0) return
  describe(name, () => {
    if (process.env['CI'] === undefined) {
      console.warn(`\n*** QEMU IS NOT INSTALLED: "${name}" was not run. Run .ci/install-qemu (Debian) to test against real QEMU. ***\n`)
      test.skip('needs QEMU', () => undefined)
    } else {
      test('needs QEMU', () => expect.fail('QEMU is missing in CI: run .ci/install-qemu first'))
    }
  })
}
