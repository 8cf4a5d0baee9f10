/** Reverts by a process of its own, which may be killed at any moment. */
import { spawn, type ChildProcess } from 'node:child_process'
import { resolve } from 'node:path'
import { onTestFinished } from 'vitest'
import type { RevertOrder } from './revert-child.ts'

/** How a process that reverts ended. */
export type RevertOutcome = 'done' | 'killed' | { readonly code: string; readonly phase: string; readonly recoverable: boolean; readonly why: string }

/** See {@link RevertOrder} for what it does. */
export class RevertProcess {
  readonly #child: ChildProcess
  readonly #ended: Promise<unknown>
  #said = ''
  #complained = ''
  #onLine: (() => void) | undefined

  constructor(order: RevertOrder) {
    const script = resolve(import.meta.dirname, 'revert-child.ts')
    this.#child = spawn(process.execPath, ['--import', 'tsx', script, JSON.stringify(order)], { stdio: ['ignore', 'pipe', 'pipe'], cwd: resolve(import.meta.dirname, '../..') })
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
