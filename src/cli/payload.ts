/** Where an image goes that is written from front to back: stdout, or a pipe or character device that has a name. */
import { closeSync, constants, fstatSync, openSync, statSync } from 'node:fs'
import { open } from 'node:fs/promises'
import { Socket } from 'node:net'
import { setTimeout as sleep } from 'node:timers/promises'
import { WriteError } from './errors.ts'
import { isStdout, type Terminal } from './terminal.ts'

/** Takes the bytes of an image in their order. */
export interface Payload {
  /** Resolves when `bytes` may be used again; an interrupt does not wait for a reader. @throws WriteError */
  write(bytes: Uint8Array): Promise<void>
  close(): Promise<void>
}

/** True for a target that takes bytes in their order only. */
export function isPipe(name: string): boolean {
  if (name === '-') return true
  const stats = statSync(name, { throwIfNoEntry: false })
  return stats !== undefined && (stats.isFIFO() || stats.isCharacterDevice() || stats.isSocket())
}

/**
 * Opens a target that {@link isPipe}. A named pipe is waited for until somebody reads it.
 * @throws WriteError
 */
async function openPayload(name: string, terminal: Terminal): Promise<Payload> {
  const { signal, stdout } = terminal
  if (isStdout(name, terminal)) return { write: (bytes) => unlessAborted(stdout.write(bytes), signal), close: () => Promise.resolve() }
  const pipe = await openPipe(name, signal)
  if (pipe !== undefined) {
    return {
      write: (bytes) => unlessAborted(new Promise((resolve, reject) => pipe.write(bytes, settling(resolve, reject))), signal),
      close: () => new Promise((resolve) => (signal.aborted ? pipe.destroy() : pipe.end()).once('close', () => resolve())),
    }
  }
  const file = await open(name, 'w')
  return {
    async write(bytes) {
      signal.throwIfAborted()
      for (let at = 0; at < bytes.length; ) at += (await file.write(bytes, at).catch(asWriteError)).bytesWritten
    },
    close: () => file.close(),
  }
}

/** Opens `name`, lets `task` send bytes there, and closes it. */
export async function withPayload<T>(name: string, terminal: Terminal, task: (send: (bytes: Uint8Array) => Promise<void>) => Promise<T>): Promise<T> {
  const payload = await openPayload(name, terminal)
  try {
    return await task((bytes) => payload.write(bytes))
  } finally {
    await payload.close()
  }
}

/** How often a pipe is tried that nobody reads yet, in milliseconds. */
const retryAfter = 50

/** The writing end of a named pipe: `open` would wait for a reader where no signal reaches it. Undefined for anything else. */
async function openPipe(name: string, signal: AbortSignal): Promise<Socket | undefined> {
  for (;;) {
    signal.throwIfAborted()
    try {
      const fd = openSync(name, constants.O_WRONLY | constants.O_NONBLOCK)
      if (fstatSync(fd).isFIFO()) return new Socket({ fd, readable: false, writable: true }).on('error', () => undefined)
      closeSync(fd)
      return undefined
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'ENXIO') throw new WriteError(error as NodeJS.ErrnoException)
    }
    await sleep(retryAfter, undefined, { signal })
  }
}

function settling(resolve: () => void, reject: (reason: Error) => void): (error?: Error | null) => void {
  return (error) => (error === undefined || error === null ? resolve() : reject(new WriteError(error)))
}

function asWriteError(error: NodeJS.ErrnoException): never {
  throw new WriteError(error)
}

function unlessAborted<T>(promise: Promise<T>, signal: AbortSignal): Promise<T> {
  return new Promise((resolve, reject) => {
    const onAbort = (): void => reject(signal.reason as Error)
    if (signal.aborted) onAbort()
    signal.addEventListener('abort', onAbort, { once: true })
    promise.then(resolve, reject).finally(() => signal.removeEventListener('abort', onAbort))
  })
}
