/** A headless Chromium, driven through its debugging pipe (DevTools protocol). */
import { spawn, type ChildProcess } from 'node:child_process'
import { existsSync } from 'node:fs'
import type { Readable, Writable } from 'node:stream'
import { onTestFinished } from 'vitest'
import { tempFolder } from './temp.ts'

export const chromiumPath = ['/usr/bin/chromium', '/usr/bin/chromium-browser', '/usr/bin/google-chrome'].find((path) => existsSync(path))

const flags = [
  '--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
  '--disable-component-update', '--disable-sync', '--remote-debugging-pipe', '--hide-scrollbars',
]

interface Answer {
  id?: number
  result?: Record<string, unknown>
  error?: { message: string }
}

/** One page. The browser ends with the test. */
export class Page {
  readonly #process: ChildProcess
  readonly #waiting = new Map<number, (answer: Answer) => void>()
  #session: string | undefined
  #id = 0
  #rest = ''

  private constructor(process: ChildProcess) {
    this.#process = process
    ;(process.stdio[4] as Readable).on('data', (data: Buffer) => this.#receive(data.toString()))
  }

  static async open(options: { width?: number; height?: number; dark?: boolean } = {}): Promise<Page> {
    const process = spawn(chromiumPath!, [...flags, `--user-data-dir=${tempFolder()}`], { stdio: ['ignore', 'ignore', 'ignore', 'pipe', 'pipe'] })
    const page = new Page(process)
    onTestFinished(() => page.#end())
    const { targetId } = await page.send('Target.createTarget', { url: 'about:blank' })
    const { sessionId } = await page.send('Target.attachToTarget', { targetId, flatten: true })
    page.#session = sessionId as string
    const { width = 1000, height = 900, dark = false } = options
    await page.send('Emulation.setDeviceMetricsOverride', { width, height, deviceScaleFactor: 1, mobile: width < 600 })
    await page.send('Emulation.setEmulatedMedia', { features: [{ name: 'prefers-color-scheme', value: dark ? 'dark' : 'light' }] })
    return page
  }

  /** Asked to close, it waits for its helpers, which would go on writing into its folder. */
  async #end(): Promise<void> {
    const ended = new Promise((resolve) => this.#process.once('exit', resolve))
    this.#session = undefined
    void this.send('Browser.close').catch(() => undefined)
    const timer = setTimeout(() => this.#process.kill('SIGKILL'), 5000)
    await ended
    clearTimeout(timer)
  }

  send(method: string, params: object = {}): Promise<Record<string, unknown>> {
    const id = ++this.#id
    const message = { id, method, params, ...(this.#session === undefined ? {} : { sessionId: this.#session }) }
    ;(this.#process.stdio[3] as Writable).write(`${JSON.stringify(message)}\0`)
    return new Promise((resolve, reject) => {
      this.#waiting.set(id, ({ result, error }) => {
        if (error === undefined) resolve(result ?? {})
        else reject(new Error(`${method}: ${error.message}`))
      })
    })
  }

  /** Loads a page. */
  async goto(url: string): Promise<void> {
    await this.send('Page.navigate', { url })
    await this.until('document.readyState === "complete"')
  }

  /** The value of an expression; promises are awaited. */
  async evaluate(expression: string): Promise<unknown> {
    const { result, exceptionDetails } = await this.send('Runtime.evaluate', { expression, awaitPromise: true, returnByValue: true })
    if (exceptionDetails !== undefined) throw new Error(JSON.stringify(exceptionDetails))
    return (result as { value?: unknown }).value
  }

  async until(expression: string): Promise<void> {
    for (let tries = 0; tries < 400; tries++) {
      if ((await this.evaluate(expression)) === true) return
      await new Promise((resolve) => setTimeout(resolve, 25))
    }
    throw new Error(`the page never came to ${expression}: ${String(await this.evaluate('document.body.innerText'))}`)
  }

  /** A PNG of the whole page. */
  async screenshot(): Promise<Buffer> {
    const { data } = await this.send('Page.captureScreenshot', { captureBeyondViewport: true })
    return Buffer.from(data as string, 'base64')
  }

  #receive(text: string): void {
    const messages = (this.#rest + text).split('\0')
    this.#rest = messages.pop()!
    for (const message of messages) {
      const answer = JSON.parse(message) as Answer
      if (answer.id === undefined) continue
      this.#waiting.get(answer.id)?.(answer)
      this.#waiting.delete(answer.id)
    }
  }
}
