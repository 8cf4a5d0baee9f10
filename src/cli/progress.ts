/**
 * How far a long command is. On a terminal a bar with rate and time left, on stderr; elsewhere what
 * scripts know from qemu-img, on stdout unless an image goes there; or JSON lines on stderr for programs;
 * without any of these a line on stderr for whoever sends SIGUSR1. Owns the display; the work tells it bytes.
 */
import { formatSize } from './size.ts'
import { paletteFor, tell, type Sink, type Terminal } from './terminal.ts'

/** What the work calls. */
export interface Progress {
  /** `done` of `total`, in bytes, without `total` where it cannot be known; called as often as it likes. */
  update(done: number, total?: number): void
  /** The work is finished: the display shows all of it and ends its line. */
  finish(): void
  /** The work failed or was interrupted: the display only ends its line. */
  abandon(): void
}

/** How progress is to be shown. */
export type ProgressStyle = 'none' | 'human' | 'json'

/** How a display is made. */
export interface ProgressOptions {
  /** Where qemu-img's lines go; default stdout. */
  readonly words?: Sink | undefined
  /** A clock in milliseconds. */
  readonly now?: () => number
}

/** A progress display. */
export function progressFor(terminal: Terminal, style: ProgressStyle, { words = terminal.stdout, now = () => performance.now() }: ProgressOptions = {}): Progress {
  if (style === 'none') return new OnQuery(terminal)
  // who watches need not ask
  terminal.onQuery?.(() => undefined)
  if (style === 'json') return new JsonLines(terminal, now)
  return terminal.stderr.isTty ? new Bar(terminal, now) : new Percentages(words)
}

/** Nothing until somebody asks: then a line on stderr, as of qemu-img. */
class OnQuery implements Progress {
  #done = 0
  #total: number | undefined

  constructor({ stderr, onQuery }: Terminal) {
    onQuery?.(() => tell(stderr, `    (${this.#total === undefined && this.#done > 0 ? `${this.#done} bytes` : percentOf(this.#done, this.#total)})\n`))
  }

  update(done: number, total?: number): void {
    this.#done = done
    this.#total = total
  }

  finish(): void {
    if (this.#total !== undefined) this.#done = this.#total
  }

  abandon(): void {
    // nothing is shown
  }
}

/** `    (12.34/100%)\r`, at steps of at least one percent, as qemu-img does. */
class Percentages implements Progress {
  readonly #words: Sink
  #shown = -1

  constructor(words: Sink) {
    this.#words = words
    this.update(0, 1)
  }

  update(done: number, total?: number): void {
    if (total === undefined) return
    const percent = total === 0 ? 100 : (done / total) * 100
    if (percent < this.#shown + 1 && percent < 100) return
    if (percent === this.#shown) return
    this.#shown = percent
    this.#say(`    (${percentOf(done, total)})\r`)
  }

  finish(): void {
    // once more if it was told already, as qemu-img does
    this.#say('    (100.00/100%)\r\n')
  }

  abandon(): void {
    this.#say('\n')
  }

  #say(text: string): void {
    tell(this.#words, text)
    void this.#words.flush?.().catch(() => undefined)
  }
}

function percentOf(done: number, total: number | undefined): string {
  const share = total === undefined ? 0 : total === 0 ? 1 : done / total
  return `${(share * 100).toFixed(2)}/100%`
}

/** One JSON object a line, at most five a second and one at the end. */
class JsonLines implements Progress {
  readonly #terminal: Terminal
  readonly #now: () => number
  readonly #start: number
  #last = -Infinity
  #state: { done: number; total?: number } = { done: 0 }

  constructor(terminal: Terminal, now: () => number) {
    this.#terminal = terminal
    this.#now = now
    this.#start = now()
  }

  update(done: number, total?: number): void {
    this.#state = total === undefined ? { done } : { done, total }
    if (this.#now() - this.#last >= 200) this.#line(false)
  }

  finish(): void {
    this.#state.done = this.#state.total ?? this.#state.done
    this.#line(true)
  }

  abandon(): void {
    // the last line said how far it came
  }

  #line(finished: boolean): void {
    this.#last = this.#now()
    const seconds = Number(((this.#last - this.#start) / 1000).toFixed(3))
    tell(this.#terminal.stderr, `${JSON.stringify({ event: 'progress', ...this.#state, seconds, finished })}\n`)
  }
}

/** `[#######-----]  58%  1.2 GiB/s  0:07 left`, redrawn ten times a second; without a total `1.2 GiB  300 MiB/s  0:04`. */
class Bar implements Progress {
  readonly #terminal: Terminal
  readonly #now: () => number
  readonly #start: number
  #last = -Infinity
  #total: number | undefined
  #done = 0
  #finished = false

  constructor(terminal: Terminal, now: () => number) {
    this.#terminal = terminal
    this.#now = now
    this.#start = now()
  }

  update(done: number, total?: number): void {
    this.#done = done
    this.#total = total
    if (this.#now() - this.#last < 100) return
    this.#draw()
  }

  finish(): void {
    this.#done = this.#total ?? this.#done
    this.#finished = true
    this.#draw()
    tell(this.#terminal.stderr, '\n')
  }

  abandon(): void {
    if (this.#last > -Infinity) tell(this.#terminal.stderr, '\n')
  }

  #draw(): void {
    this.#last = this.#now()
    const seconds = (this.#last - this.#start) / 1000
    const rate = seconds > 0 ? this.#done / seconds : 0
    const speed = `${formatSize(Math.round(rate))}/s`
    const line = this.#total === undefined ? `${formatSize(this.#done)}  ${speed}  ${this.#time(seconds)}` : this.#bar(this.#total, rate, speed, seconds)
    tell(this.#terminal.stderr, `\r${line}\u001b[K`)
  }

  #time(seconds: number): string {
    return `${duration(seconds)}${this.#finished ? ' in all' : ''}`
  }

  #bar(total: number, rate: number, speed: string, seconds: number): string {
    const share = total === 0 ? 1 : this.#done / total
    const left = rate > 0 ? `${duration((total - this.#done) / rate)} left` : ''
    const facts = `${String(Math.floor(share * 100)).padStart(4)}%  ${speed}  ${share >= 1 ? `${duration(seconds)} in all` : left}`
    const width = Math.max(8, Math.min(50, (this.#terminal.stderr.columns ?? 80) - facts.length - 4))
    const full = Math.round(share * width)
    const palette = paletteFor(this.#terminal, this.#terminal.stderr)
    return `[${palette.green('#'.repeat(full))}${palette.dim('-'.repeat(width - full))}]${facts}`
  }
}

/** `0:07`, `12:34`, `1:02:03`. */
export function duration(seconds: number): string {
  const whole = Math.max(0, Math.round(seconds))
  const parts = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60]
  const text = parts.map((part) => String(part).padStart(2, '0'))
  return parts[0] === 0 ? `${parts[1]!}:${text[2]!}` : `${parts[0]!}:${text[1]!}:${text[2]!}`
}
