/**
 * A process that reverts or recovers, to be killed. Its one argument is a {@link RevertOrder}; it prints a line for each
 * phase, and at the end `done` or `failed CODE PHASE RECOVERABLE`.
 */
import { Qcow2Error } from '../../src/core/errors.ts'
import { QmpClient, type Qmp } from '../../src/qmp/client.ts'
import { openSaved } from '../../src/snapshot/open-saved.ts'
import { RevertError } from '../../src/snapshot/postcopy-source.ts'
import { recover, revert } from '../../src/snapshot/revert.ts'
import { cutAfter } from './cutter.ts'
import { SlowSource } from './slow-source.ts'

/** What the process is to do. */
export interface RevertOrder {
  readonly file: string
  readonly monitor: string
  readonly incoming: string
  readonly recover: boolean
  /** Bytes of memory it may read; it waits for ever then. */
  readonly bytes?: number | undefined
  /** Bytes it may send; its connection is cut then. */
  readonly cut?: number | undefined
}

/** A monitor that tells QEMU to listen where the cutter passes things on to. */
function elsewhere(qmp: QmpClient): Qmp {
  const execute = (name: string, args: Record<string, unknown> | undefined, options: never): Promise<unknown> =>
    qmp.execute(name, typeof args?.['uri'] === 'string' ? { ...args, uri: `${args['uri']}.qemu` } : args, options)
  return { execute: execute as Qmp['execute'], events: (...names) => qmp.events(...names) }
}

const order = JSON.parse(process.argv[2]!) as RevertOrder
setInterval(() => undefined, 1000) // a source that waits for ever keeps no process alive
try {
  const qmp = await QmpClient.connect(order.monitor, { timeout: 10_000 })
  if (order.cut !== undefined) await cutAfter(order.incoming, `${order.incoming}.qemu`, order.cut)
  await using saved = await openSaved(order.file)
  const source = order.bytes === undefined ? saved : new SlowSource(saved, order.bytes).source
  let last = ''
  const onProgress = ({ phase }: { phase: string }): void => {
    if (phase !== last) console.log((last = phase))
  }
  await (order.recover ? recover : revert)(source, { qmp: order.cut === undefined ? qmp : elsewhere(qmp), incoming: order.incoming, onProgress })
  console.log('done')
} catch (error) {
  const { phase, recoverable } = error instanceof RevertError ? error : { phase: 'before', recoverable: order.recover }
  console.log('failed', Qcow2Error.is(error) ? error.code : 'untyped', phase, recoverable)
  console.error(error instanceof Error ? error.message : error)
}
process.exit()
