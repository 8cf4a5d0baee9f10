import { QmpClient } from '../../qmp/client.ts'
import { eagerlyBeside, revertBeside } from '../../snapshot/revert-file.ts'
import { recover, type EagerRevertReport, type RevertOptions, type RevertReport } from '../../snapshot/revert.ts'
import type { RunStateChoice } from '../../snapshot/saved-state.ts'
import { command } from '../command.ts'
import { ExitError, UsageError } from '../errors.ts'
import { parseAddress } from '../image/address.ts'
import { objectOption, outputOption, progressOption, quietOption } from '../image/options.ts'
import { openSavedVm } from '../image/saved-vm.ts'
import { prettyJson } from '../print/shapes.ts'

export const revertCommand = command({
  name: 'revert',
  summary: 'Start a saved VM: the guest runs before its memory is there',
  description: [
    "Start QEMU as the VM was started, with '-incoming defer', and give its monitor here. Pages that the guest touches are sent first, the rest follows.",
    'If this command dies while the guest runs, the guest pauses; --recover goes on from the same saved VM.',
    'The guest does afterwards what it did when it was saved: it runs, or it waits (paused, suspended, ...).',
    'An image may have its backing file anywhere: revert only from images that you trust.',
    'The manifest beside FILE is compared with QEMU and its disks first. A QEMU that does not like what it is given ends, and says why on its standard error.',
  ],
  options: {
    incoming: { value: 'ADDRESS', help: 'where QEMU is to wait (or waits): a path for a unix socket, or tcp:HOST:PORT' },
    monitor: { short: 'm', value: 'MONITOR', file: true, help: "QEMU's QMP monitor; without it QEMU must wait at --incoming with the capability postcopy-ram" },
    eager: { help: 'send everything before the guest runs, as an ordinary migration' },
    fallback: { value: 'MODE', choices: ['eager'], help: 'what to do where QEMU or its host refuse postcopy' },
    state: { value: 'STATE', choices: ['saved', 'running', 'paused'], help: "what the guest is to do: what it did when it was 'saved' (default), run (also with -S), or wait" },
    force: { help: 'go on although QEMU or its disks are not as they were saved' },
    recover: { help: 'go on with a revert whose connection was lost; --incoming is a new address' },
    ...objectOption,
    ...outputOption,
    ...progressOption,
    ...quietOption,
  },
  arguments: [{ name: 'FILE', help: 'a RAM image, an image with a saved snapshot (IMAGE@SNAPSHOT), or a stream; a path, a URL or options as for every image' }],
  examples: [
    { line: 'qcow2 revert warm.qcow2 --monitor vm.qmp --incoming vm.incoming', shows: 'into a QEMU that was started with -incoming defer' },
    { line: 'qcow2 revert warm.qcow2 --monitor vm.qmp --incoming again.incoming --recover', shows: 'after a lost connection' },
  ],
  async run(context) {
    const { options, args, print, signal } = context
    if (options.incoming === undefined) throw new UsageError('--incoming is needed')
    if (options.eager && options.recover) throw new UsageError('--eager and --recover exclude each other')
    const opened = await openSavedVm(context, args[0]!)
    const { path } = opened
    await using saved = opened.saved
    const progress = context.progress()
    const qmp = options.monitor === undefined ? undefined : await QmpClient.connect(parseAddress(options.monitor), { signal })
    const how: RevertOptions = {
      incoming: parseAddress(options.incoming),
      qmp,
      state: options.state as RunStateChoice | undefined,
      fallback: options.fallback as 'eager' | undefined,
      ignoreDifferences: options.force,
      signal,
      onProgress: ({ done, total }) => progress.update(done, total),
    }
    context.leaves('a guest that runs already is paused; revert --recover goes on')
    try {
      const report = options.eager ? await eagerlyBeside(saved, path, how) : options.recover ? await recover(saved, how) : await revertBeside(saved, path, how)
      progress.finish()
      if (!options.quiet) report.warnings.forEach((warning) => context.warn(warning))
      if (options.output === 'json') await print(prettyJson('faultOrder' in report ? { ...report, faultOrder: undefined } : report))
      else if (!options.quiet) await print(summaryOf(report))
      return 0
    } catch (error) {
      signal.throwIfAborted()
      throw new ExitError(1, error instanceof Error ? error.message : String(error), { cause: error })
    } finally {
      await qmp?.close()
    }
  },
})

function summaryOf(report: RevertReport | EagerRevertReport): string {
  const { state } = report
  const whole = 'took' in report ? report.took : report.completeAfter
  if (state !== 'running') return `the guest waits (${state}); all of it was there after ${whole.toFixed(0)} ms`
  if ('took' in report) return `sent ${report.bytes} bytes in ${whole.toFixed(0)} ms; the guest runs`
  if (report.mode === 'eager') return `the guest runs; all of it was there after ${whole.toFixed(0)} ms`
  return `the guest ran after ${report.runningAfter.toFixed(0)} ms; complete after ${whole.toFixed(0)} ms, ${report.requests} pages asked for`
}
