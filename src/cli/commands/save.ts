import { QmpClient } from '../../qmp/client.ts'
import type { DiskSnapshot } from '../../snapshot/choose-disks.ts'
import { save } from '../../snapshot/save-files.ts'
import type { SaveMode, SaveToOptions } from '../../snapshot/save-task.ts'
import { saveTo } from '../../snapshot/save.ts'
import { command } from '../command.ts'
import { UsageError } from '../errors.ts'
import { parseAddress } from '../image/address.ts'
import { memoryTarget, memoryTargetOptions, pipeSink } from '../image/memory-target.ts'
import { outputOption, progressOption, quietOption } from '../image/options.ts'
import { isPipe, withPayload } from '../payload.ts'
import { prettyJson } from '../print/shapes.ts'
import { formatSize } from '../size.ts'

export const saveCommand = command({
  name: 'save',
  summary: 'Save a running VM; it runs on',
  description: [
    'QEMU is told through its monitor to send its memory and its devices, which are stored durably. The saved VM exists only when everything arrived; otherwise the VM is as it was.',
    'A manifest beside the memory (FILE.json) tells what the VM needs.',
  ],
  options: {
    ...memoryTargetOptions,
    mode: { value: 'MODE', choices: ['background', 'stop', 'precopy'], help: "'background' (default): the guest runs on while its memory is read; 'stop': it stands still; 'precopy': it runs, changed pages are sent again" },
    fallback: { value: 'MODE', choices: ['stop', 'precopy'], help: 'what to do where a background snapshot is refused' },
    disk: { value: 'NODE=OVERLAY', many: true, help: 'freeze this disk at the same instant: from now on the guest writes to the new file OVERLAY' },
    'disk-snapshot': { value: 'NODE=NAME', many: true, help: 'freeze this disk by an internal snapshot' },
    ...outputOption,
    ...progressOption,
    ...quietOption,
  },
  arguments: [
    { name: 'MONITOR', help: "QEMU's QMP monitor: a unix socket, or tcp:HOST:PORT" },
    { name: 'FILE', help: "where the memory goes; '-' for stdout, with --as=stream" },
  ],
  payload: (args) => args[1],
  examples: [
    { line: 'qcow2 save vm.qmp warm.qcow2', shows: 'the memory, for a quick revert' },
    { line: 'qcow2 save vm.qmp warm.qcow2 --disk disk0=after.qcow2', shows: 'memory and disk of one instant' },
  ],
  async run(context) {
    const { options, args, print, signal } = context
    const [monitor, file] = args as [string, string]
    const memory = memoryTarget(file, options)
    const disks = [...options.disk.map(overlayOf), ...options['disk-snapshot'].map(internalOf)]
    await using qmp = await QmpClient.connect(parseAddress(monitor), { signal })
    const progress = context.progress()
    context.leaves('the VM and FILE are as they were; overlay files of --disk may remain, unused')
    const how: SaveToOptions = {
      disks,
      mode: options.mode as SaveMode | undefined,
      fallback: options.fallback as 'stop' | 'precopy' | undefined,
      signal,
      // how much will come is not known beforehand
      onProgress: ({ done }) => progress.update(done),
    }
    const report = await (typeof memory !== 'string' && 'stream' in memory && isPipe(file)
      ? withPayload(file, context.terminal, (send) => saveTo(qmp, pipeSink(send), { ...how, memory: { kind: 'stream' } }))
      : save(qmp, { ...how, memory, references: 'any' }))
    progress.finish()
    const { mode, summary, stoppedFor, took, manifest } = report
    if (options.output === 'json') await print(prettyJson({ mode, stoppedFor, took, bytes: summary.length, manifest }))
    else if (!options.quiet) await print(`${file}: ${formatSize(summary.length)} of VM state, mode ${mode}; the guest stood still for ${stoppedFor.toFixed(0)} ms of ${took.toFixed(0)} ms`)
    return 0
  },
})

function overlayOf(text: string): DiskSnapshot {
  const [node, overlay] = pair(text, '--disk takes NODE=OVERLAY')
  return { node, overlay }
}

function internalOf(text: string): DiskSnapshot {
  const [node, internal] = pair(text, '--disk-snapshot takes NODE=NAME')
  return { node, internal }
}

function pair(text: string, usage: string): [string, string] {
  const equals = text.indexOf('=')
  if (equals < 1) throw new UsageError(usage)
  return [text.slice(0, equals), text.slice(equals + 1)]
}
