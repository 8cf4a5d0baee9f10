/** A migration that QEMU sends to us, as its monitor shows it: how it gets its connection, and when it has really ended. */
import type { CallOptions } from '../block/device.ts'
import { Qcow2Error } from '../core/errors.ts'
import type { Qmp } from '../qmp/client.ts'
import type { MigrationInfo } from '../qmp/commands.ts'
import type { DuplexStream } from '../qmp/duplex.ts'
import { QmpError } from '../qmp/error.ts'

/** Where QEMU connects to. `MigrationListener` is one. */
export interface MigrationReceiver {
  /** For QEMU's `migrate`. */
  readonly uri: string
  /** Resolves with the connection that QEMU makes. */
  accept(options?: CallOptions): Promise<DuplexStream>
}

/** Options of {@link connectMigration}. */
interface ConnectOptions extends CallOptions {
  /** QEMU took the command. */
  readonly onStarted: () => void
}

/** Has QEMU connect, and gives the connection; or the reason, as soon as QEMU tells it or has gone. */
export async function connectMigration(qmp: Qmp, receiver: MigrationReceiver, { signal, onStarted }: ConnectOptions): Promise<DuplexStream> {
  const events = qmp.events('MIGRATION')
  const over = new AbortController()
  const onAbort = (): void => over.abort(signal?.reason)
  signal?.addEventListener('abort', onAbort, { once: true })
  try {
    signal?.throwIfAborted()
    await qmp.execute('migrate', { uri: receiver.uri }).catch((error: unknown) => {
      throw error instanceof QmpError && error.desc !== undefined ? new QmpError(withAdvice(error.message), { cause: error, desc: error.desc }) : error
    })
    onStarted()
    const failing = failure(qmp, events)
    failing.catch(() => undefined) // reported if it comes first, like the other
    const accepting = receiver.accept({ signal: over.signal })
    accepting.catch(() => undefined)
    return await Promise.race([accepting, failing])
  } finally {
    signal?.removeEventListener('abort', onAbort)
    over.abort()
    await events.return?.()
  }
}

/** Never resolves; rejects when QEMU says that the migration has failed. */
async function failure(qmp: Qmp, events: ReturnType<Qmp['events']>): Promise<never> {
  for await (const { data } of events) {
    if (data?.['status'] === 'failed' || data?.['status'] === 'cancelled') throw migrationFailed(await qmp.execute('query-migrate'))
  }
  return new Promise(() => undefined)
}

/**
 * Waits until QEMU has ended the migration and cleaned up behind it. A status alone is not enough: before the
 * clean-up, memory may still be write-protected, and switching the capability off would leave it so for ever
 * (QEMU 7.2: the guest hangs). The channel that can be yanked goes last.
 * @param timeout Milliseconds.
 */
export async function migrationEnded(qmp: Qmp, timeout: number): Promise<MigrationInfo> {
  const deadline = performance.now() + timeout
  for (;;) {
    const info = await qmp.execute('query-migrate')
    if (isOver(info.status) && !(await qmp.execute('query-yank')).some(({ type }) => type === 'migration')) return info
    if (performance.now() > deadline) {
      throw new Qcow2Error('ERR_QMP', `migrate: no more comes, but QEMU reports ${String(info.status)} for ${timeout} ms`)
    }
    await new Promise((resolve) => setTimeout(resolve, 2))
  }
}

/** What QEMU says of a migration that did not succeed. */
export function migrationFailed({ status, 'error-desc': reason = 'no reason given' }: MigrationInfo): Qcow2Error {
  return new Qcow2Error('ERR_QMP', withAdvice(`migrate: QEMU reports ${String(status)}: ${reason}`))
}

/** What QEMU says, with what to do where it cannot reach our socket. */
function withAdvice(message: string): string {
  if (!/failed to connect/i.test(message)) return message
  return `${message}; QEMU runs as another user, or sees other folders: say where its connection is taken, and with which mode (receiver; --receiver, --receiver-mode)`
}

/** No migration is under way. */
export function isOver(status: MigrationInfo['status']): boolean {
  return status === undefined || ['completed', 'failed', 'cancelled', 'none'].includes(status)
}
