import { existsSync } from 'node:fs'
import { QmpClient } from '../../qmp/client.ts'
import { recover, revertEagerly, type RevertOptions } from '../../snapshot/revert.ts'
import { revertFile } from '../../snapshot/revert-file.ts'
import { command } from '../command.ts'
import { ExitError, UsageError } from '../errors.ts'
import { parseAddress } from '../image/address.ts'
import { outputOption, progressOption, quietOption } from '../image/options.ts'
import { prettyJson } from '../print/shapes.ts'

export const revertCommand = command({
  name: 'revert',
  summary: 'Start a saved VM: the guest runs before its memory is there',
  description: [
    "Start QEMU as the VM was started, with '-incoming defer', and give its monitor here. Pages that the guest touches are sent first, the rest follows.",
    'If this command dies while the guest runs, the guest pauses; --recover goes on from the same saved VM.',
  ],
  options: {
    incoming: { value: 'ADDRESS', help: 'where QEMU is to wait (or waits): a path for a unix socket, or tcp:HOST:PORT' },
    monitor: { short: 'm', value: 'MONITOR', file: true, help: "QEMU's QMP monitor; without it QEMU must wait at --incoming with the capability postcopy-ram" },
    eager: { help: 'send everything before the guest runs, as an ordinary migration' },
    recover: { help: 'go on with a revert whose connection was lost; --incoming is a new address' },
    ...outputOption,
    ...progressOption,
    ...quietOption,
  },
  arguments: [{ name: 'FILE', help: 'a RAM image, an image with a saved snapshot (IMAGE@SNAPSHOT), or a stream' }],
  examples: [
    { line: 'qcow2 revert warm.qcow2 --monitor vm.qmp --incoming vm.incoming', shows: 'into a QEMU that was started with -incoming defer' },
    { line: 'qcow2 revert warm.qcow2 --monitor vm.qmp --incoming again.incoming --recover', shows: 'after a lost connection' },
  ],
  async run(context) {
    const { options, args, print, signal } = context
    if (options.incoming === undefined) throw new UsageError('--incoming is needed')
    if (options.eager && options.recover) throw new UsageError('--eager and --recover exclude each other')
    const [file, snapshot] = splitSnapshot(args[0]!)
    const progress = context.progress()
    const qmp = options.monitor === undefined ? undefined : await QmpClient.connect(parseAddress(options.monitor), { signal })
    const how: RevertOptions = {
      incoming: parseAddress(options.incoming),
      qmp,
      snapshot,
      references: 'any',
      signal,
      onProgress: ({ done, total }) => progress.update(done, total),
    }
    context.leaves('a guest that runs already is paused; revert --recover goes on')
    try {
      const report = options.eager ? await revertEagerly(file, how) : options.recover ? await recover(file, how) : await revertFile(file, how)
      progress.finish()
      if (options.output === 'json') await print(prettyJson('faultOrder' in report ? { ...report, faultOrder: undefined } : report))
      else if (!options.quiet) await print('bytes' in report ? `sent ${report.bytes} bytes in ${report.took.toFixed(0)} ms` : `the guest ran after ${report.runningAfter.toFixed(0)} ms; complete after ${report.completeAfter.toFixed(0)} ms, ${report.requests} pages asked for`)
      return 0
    } catch (error) {
      signal.throwIfAborted()
      throw new ExitError(1, error instanceof Error ? error.message : String(error), { cause: error })
    } finally {
      await qmp?.close()
    }
  },
})

/** `IMAGE@SNAPSHOT`, where there is no file of the whole name. */
function splitSnapshot(name: string): [string, string | undefined] {
  const at = name.lastIndexOf('@')
  return at < 1 || existsSync(name) ? [name, undefined] : [name.slice(0, at), name.slice(at + 1)]
}
