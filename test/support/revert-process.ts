/** Reverts by a process of its own, which may be killed at any moment. */
import { spawn, type ChildProcess } from 'node:child_process'
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join, resolve } from 'node:path'
import { build } from 'tsup'
import { onTestFinished } from 'vitest'
import type { RevertOrder } from './revert-child.ts'

/** How a process that reverts ended. */
export type RevertOutcome = 'done' | 'killed' | { readonly code: string; readonly phase: string; readonly recoverable: boolean; readonly why: string }

let program: Promise<string> | undefined

/** One file of plain JavaScript: a process that has to translate its sources first takes ten times as long to start. */
async function buildProgram(): Promise<string> {
  const outDir = mkdtempSync(join(tmpdir(), 'qcow2-revert-'))
  process.once('exit', () => rmSync(outDir, { recursive: true, force: true }))
  const entry = { revert: resolve(import.meta.dirname, 'revert-child.ts') }
  await build({ entry, outDir, config: false, format: 'esm', target: 'node20', silent: true, outExtension: () => ({ js: '.mjs' }) })
  return join(outDir, 'revert.mjs')
}

/** See {@link RevertOrder} for what it does. */
export class RevertProcess {
  readonly #child: ChildProcess
  readonly #ended: Promise<unknown>
  #said = ''
  #complained = ''
  #onLine: (() => void) | undefined

  static async start(order: RevertOrder): Promise<RevertProcess> {
    program ??= buildProgram()
    return new RevertProcess(await program, order)
  }

  private constructor(script: string, order: RevertOrder) {
    this.#child = spawn(process.execPath, [script, JSON.stringify(order)], { stdio: ['ignore', 'pipe', 'pipe'] })
    this.#ended = new Promise((settle) => this.#child.on('close', settle))
    this.#child.stdout!.on('data', (text: Buffer) => {
      this.#said += text.toString()
      this.#onLine?.()
    })
    this.#child.stderr!.on('data', (text: Buffer) => (this.#complained += text.toString()))
    onTestFinished(() => void this.#child.kill('SIGKILL'))
  }

  /** Kills it by SIGKILL, so many milliseconds after it began to talk to QEMU. */
  async killAfter(milliseconds: number): Promise<void> {
    const talking = new Promise<void>((wake) => (this.#onLine = wake))
    await Promise.race([talking, this.#ended])
    await new Promise((wake) => setTimeout(wake, milliseconds))
    this.#child.kill('SIGKILL')
  }

  /** Waits for its end. @throws Error if it ended in any other way than it may. */
  async outcome(): Promise<RevertOutcome> {
    await this.#ended
    const last = this.#said.trimEnd().split('\n').at(-1) ?? ''
    if (last === 'done') return 'done'
    const [, code, phase, recoverable] = /^failed (\S+) (\S+) (true|false)$/.exec(last) ?? []
    if (code !== undefined) return { code, phase: phase!, recoverable: recoverable === 'true', why: this.#complained.trim() }
    if (this.#child.signalCode === 'SIGKILL') return 'killed'
    throw new Error(`the process that reverts ended (${String(this.#child.exitCode)}): ${this.#said}${this.#complained}`)
  }
}
