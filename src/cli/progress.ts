/**
 * How far a long command is. On a terminal a bar with rate and time left, on stderr; elsewhere what
 * scripts know from qemu-img, on stdout; or JSON lines on stderr for programs. Owns the display; the
 * work tells it bytes.
 */
import { formatSize } from './size.ts'
import { paletteFor, type Terminal } from './terminal.ts'

/** What the work calls. */
export interface Progress {
  /** `done` of `total`, in bytes (or whatever `unit` says); called as often as it likes. */
  update(done: number, total: number): void
  /** The work is finished: the display shows all of it and ends its line. */
  finish(): void
  /** The work failed or was interrupted: the display only ends its line. */
  abandon(): void
}

/** How progress is to be shown. */
export type ProgressStyle = 'none' | 'human' | 'json'

/** A progress display. `now` is a clock in milliseconds. */
export function progressFor(terminal: Terminal, style: ProgressStyle, now: () => number = () => performance.now()): Progress {
  if (style === 'none') return silent
  if (style === 'json') return new JsonLines(terminal, now)
  return terminal.stderr.isTty ? new Bar(terminal, now) : new Percentages(terminal)
}

const silent: Progress = { update: () => undefined, finish: () => undefined, abandon: () => undefined }

/** `    (12.34/100%)\r` on stdout, at steps of at least one percent, as qemu-img does. */
class Percentages implements Progress {
  readonly #terminal: Terminal
  #shown = -1

  constructor(terminal: Terminal) {
    this.#terminal = terminal
    this.update(0, 1)
  }

  update(done: number, total: number): void {
    const percent = total === 0 ? 100 : (done / total) * 100
    if (percent < this.#shown + 1 && percent < 100) return
    if (percent === this.#shown) return
    this.#shown = percent
    void this.#terminal.stdout.write(`    (${percent.toFixed(2)}/100%)\r`)
  }

  finish(): void {
    // once more if it was told already, as qemu-img does
    void this.#terminal.stdout.write('    (100.00/100%)\r\n')
  }

  abandon(): void {
    void this.#terminal.stdout.write('\n')
  }
}

/** One JSON object a line, at most five a second and one at the end. */
class JsonLines implements Progress {
  readonly #terminal: Terminal
  readonly #now: () => number
  readonly #start: number
  #last = -Infinity
  #state = { done: 0, total: 0 }

  constructor(terminal: Terminal, now: () => number) {
    this.#terminal = terminal
    this.#now = now
    this.#start = now()
  }

  update(done: number, total: number): void {
    this.#state = { done, total }
    if (this.#now() - this.#last >= 200) this.#line(false)
  }

  finish(): void {
    this.#state.done = this.#state.total
    this.#line(true)
  }

  abandon(): void {
    // the last line said how far it came
  }

  #line(finished: boolean): void {
    this.#last = this.#now()
    const seconds = Number(((this.#last - this.#start) / 1000).toFixed(3))
    void this.#terminal.stderr.write(`${JSON.stringify({ event: 'progress', ...this.#state, seconds, finished })}\n`)
  }
}

/** `[#######-----]  58%  1.2 GiB/s  0:07 left`, redrawn ten times a second. */
class Bar implements Progress {
  readonly #terminal: Terminal
  readonly #now: () => number
  readonly #start: number
  #last = -Infinity
  #total = 0
  #done = 0

  constructor(terminal: Terminal, now: () => number) {
    this.#terminal = terminal
    this.#now = now
    this.#start = now()
  }

  update(done: number, total: number): void {
    this.#done = done
    this.#total = total
    if (this.#now() - this.#last < 100) return
    this.#draw()
  }

  finish(): void {
    this.#done = this.#total
    this.#draw()
    void this.#terminal.stderr.write('\n')
  }

  abandon(): void {
    if (this.#last > -Infinity) void this.#terminal.stderr.write('\n')
  }

  #draw(): void {
    this.#last = this.#now()
    const seconds = (this.#last - this.#start) / 1000
    const share = this.#total === 0 ? 1 : this.#done / this.#total
    const rate = seconds > 0 ? this.#done / seconds : 0
    const left = share >= 1 ? `${duration(seconds)} in all` : rate > 0 ? `${duration((this.#total - this.#done) / rate)} left` : ''
    const facts = `${String(Math.floor(share * 100)).padStart(4)}%  ${formatSize(Math.round(rate))}/s  ${left}`
    const width = Math.max(8, Math.min(50, (this.#terminal.stderr.columns ?? 80) - facts.length - 4))
    const full = Math.round(share * width)
    const palette = paletteFor(this.#terminal, this.#terminal.stderr)
    const bar = palette.green('#'.repeat(full)) + palette.dim('-'.repeat(width - full))
    void this.#terminal.stderr.write(`\r[${bar}]${facts}\u001b[K`)
  }
}

/** `0:07`, `12:34`, `1:02:03`. */
export function duration(seconds: number): string {
  const whole = Math.max(0, Math.round(seconds))
  const parts = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60]
  const text = parts.map((part) => String(part).padStart(2, '0'))
  return parts[0] === 0 ? `${parts[1]!}:${text[2]!}` : `${parts[0]!}:${text[1]!}:${text[2]!}`
}
