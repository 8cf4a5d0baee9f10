/** A passphrase typed at a terminal. Owns that it is not shown; knows nothing of what it opens. */
import { ExitError } from './errors.ts'
import { tell, visible, type Sink } from './terminal.ts'

/** What is needed of a terminal's input: that of `process.stdin`. */
export interface KeyInput {
  setRawMode(raw: boolean): unknown
  on(event: 'data', listener: (bytes: Uint8Array) => void): unknown
  on(event: 'end', listener: () => void): unknown
  removeListener(event: 'data' | 'end', listener: (bytes: Uint8Array) => void): unknown
  resume(): unknown
  pause(): unknown
}

/** Where the question is put. */
export interface AskOptions {
  readonly input: KeyInput
  readonly output: Sink
  readonly signal: AbortSignal
  /** Called for Ctrl-C, which is a byte like any other while nothing is shown. */
  readonly interrupt: () => void
}

const [interruptKey, endKey, backspace, lineFeed, enter, eraseLine, deleteKey] = [3, 4, 8, 10, 13, 21, 127] as const

/**
 * Asks for a secret and reads a line without showing it.
 * @throws ExitError if there is none; what `signal` is aborted with
 */
export function askSecret(question: string, { input, output, signal, interrupt }: AskOptions): Promise<Uint8Array> {
  return new Promise((resolve, reject) => {
    let typed: number[] = []
    const finish = (settle: () => void): void => {
      input.removeListener('data', onData)
      input.removeListener('end', onEnd)
      signal.removeEventListener('abort', onAbort)
      input.setRawMode(false)
      input.pause()
      tell(output, '\n')
      settle()
    }
    const onAbort = (): void => finish(() => reject(signal.reason as Error))
    const onEnd = (): void => finish(() => (typed.length === 0 ? reject(new ExitError(1, 'no passphrase was given')) : resolve(Uint8Array.from(typed))))
    const onData = (bytes: Uint8Array): void => {
      for (const byte of bytes) {
        if (byte === interruptKey) { interrupt(); return; }
        if (byte === enter || byte === lineFeed || byte === endKey) { onEnd(); return; }
        if (byte === backspace || byte === deleteKey) typed = withoutLast(typed)
        else if (byte === eraseLine) typed = []
        else typed.push(byte)
      }
    }
    signal.throwIfAborted()
    signal.addEventListener('abort', onAbort)
    // before the question: whoever sees it may type
    input.setRawMode(true)
    input.on('data', onData)
    input.on('end', onEnd)
    input.resume()
    tell(output, visible(question))
  })
}

/** Without the last character, of as many bytes as it has in UTF-8. */
function withoutLast(typed: readonly number[]): number[] {
  let end = typed.length - 1
  while (end > 0 && (typed[end]! & 0xc0) === 0x80) end--
  return typed.slice(0, Math.max(0, end))
}
