/** The real `qemu-img` as a second opinion, where it is installed. */
import { execFile } from 'node:child_process'

/** What `qemu-img check` says of an image; the names are those of its JSON. */
export interface QemuCheck {
  /** Exit code: 0 clean, 2 corruptions, 3 leaks only, 1 the check itself failed. */
  readonly exitCode: number
  /** As `qemu-img check` counts them. */
  readonly corruptions: number
  /** Clusters. */
  readonly leaks: number
  /** Problems that prevented a part of the check. */
  readonly checkErrors: number
  /** Everything it printed. */
  readonly output: string
}

/** Options of the functions that ask qemu-img. */
export interface QemuImgOptions {
  /** Path of the program; default `qemu-img` on the `PATH`. */
  readonly qemuImg?: string | undefined
}

/** `qemu-img check`, with `repair` as its `-r`; `undefined` where there is no qemu-img. */
export async function qemuCheck(
  path: string,
  options: QemuImgOptions & { readonly repair?: 'leaks' | 'all' } = {},
): Promise<QemuCheck | undefined> {
  const repair = options.repair === undefined ? [] : ['-r', options.repair]
  const result = await run(options, ['check', '--output=json', ...repair, '-f', 'qcow2', path])
  if (result === undefined) return undefined
  const { exitCode, output } = result
  const field = (name: string): number => Number(new RegExp(`"${name}": (\\d+)`).exec(output)?.[1] ?? 0)
  return { exitCode, corruptions: field('corruptions'), leaks: field('leaks'), checkErrors: field('check-errors'), output }
}

/**
 * `qemu-img convert` of the image at `path`, or of one of its snapshots, to a raw file; false where there is no qemu-img.
 * @throws Error if it fails
 */
export async function qemuConvert(path: string, raw: string, options: QemuImgOptions & { readonly snapshot?: string } = {}): Promise<boolean> {
  const snapshot = options.snapshot === undefined ? [] : ['-l', `snapshot.name=${options.snapshot}`]
  const result = await run(options, ['convert', '-f', 'qcow2', ...snapshot, '-O', 'raw', path, raw])
  if (result === undefined) return false
  if (result.exitCode !== 0) throw new Error(`qemu-img convert ${path} failed: ${result.output}`)
  return true
}

function run(options: QemuImgOptions, args: string[]): Promise<{ exitCode: number; output: string } | undefined> {
  return new Promise((resolve, reject) => {
    const limits = { maxBuffer: 64 << 20, timeout: 120_000, killSignal: 'SIGKILL' as const }
    execFile(options.qemuImg ?? 'qemu-img', args, limits, (error, stdout, stderr) => {
      const code = error?.code
      if (code === 'ENOENT' && options.qemuImg === undefined) resolve(undefined)
      else if (error !== null && typeof code !== 'number') reject(error)
      else resolve({ exitCode: typeof code === 'number' ? code : 0, output: stdout + stderr })
    })
  })
}
