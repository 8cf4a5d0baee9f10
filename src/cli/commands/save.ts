import { QmpClient } from '../../qmp/client.ts'
import type { DiskChoice, DiskSnapshot } from '../../snapshot/choose-disks.ts'
import { describeDisk } from '../../snapshot/choose-disks.ts'
import { save } from '../../snapshot/save-files.ts'
import type { SaveMode, SaveToOptions } from '../../snapshot/save-task.ts'
import { saveTo } from '../../snapshot/save.ts'
import { command } from '../command.ts'
import { UsageError } from '../errors.ts'
import { parseAddress } from '../image/address.ts'
import { memoryTarget, memoryTargetOptions, pipeSink } from '../image/memory-target.ts'
import { openReceiver, receiverOptions } from '../image/receiver.ts'
import { outputOption, progressOption, quietOption } from '../image/options.ts'
import { isPipe, withPayload } from '../payload.ts'
import { prettyJson } from '../print/shapes.ts'
import { formatSize } from '../size.ts'

export const saveCommand = command({
  name: 'save',
  summary: 'Save a VM, running or not; it stays as it was',
  description: [
    'QEMU is told through its monitor to send its memory and its devices, which are stored durably. The saved VM exists only when everything arrived; otherwise the VM is as it was.',
    'A VM that does not run, for whatever reason, is saved as it stands and stays in its state.',
    'A manifest beside the memory (FILE.json, for a snapshot FILE@NAME.json) tells what the VM needs, and which disks were frozen. An image that is made or opened here may have its backing file anywhere.',
  ],
  options: {
    ...memoryTargetOptions,
    mode: { value: 'MODE', choices: ['background', 'stop', 'precopy'], help: "'background' (default): the guest runs on while its memory is read; 'stop': it stands still; 'precopy': it runs, changed pages are sent again" },
    fallback: { value: 'MODE', choices: ['stop', 'precopy'], help: 'what to do where a background snapshot is refused' },
    disks: { value: 'all|none|DISK,...', many: true, help: "which writable disks to freeze at the same instant: each goes on in a new overlay beside its file ('disk.qcow2' in 'disk-1.qcow2'); 'none': they are not frozen, and you see to it that they fit the memory. A VM that has some is not saved without a word about them. DISK is a node name, a drive or device id, or a file" },
    disk: { value: 'DISK=OVERLAY', many: true, help: 'freeze this disk; the guest goes on in the new file OVERLAY' },
    'disk-snapshot': { value: 'DISK=NAME', many: true, help: 'freeze this disk by an internal snapshot' },
    ...receiverOptions,
    scratch: { value: 'FOLDER', file: true, help: 'where a file as large as the memory may be while a VM that does not run is saved; QEMU must be able to write there. Default: the folder of FILE' },
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
    { line: 'qcow2 save vm.qmp warm.qcow2 --disks=all', shows: 'memory and disks of one instant' },
    { line: 'qcow2 save vm.qmp warm.qcow2 --disk disk0=after.qcow2', shows: 'the same for one disk, with a name for the file it goes on in' },
  ],
  async run(context) {
    const { options, args, print, signal } = context
    const [monitor, file] = args as [string, string]
    const memory = memoryTarget(file, options)
    const disks = diskChoice(options)
    await using qmp = await QmpClient.connect(parseAddress(monitor), { signal })
    const progress = context.progress()
    context.leaves('the VM, its disks and FILE are as they were')
    await using receiver = await openReceiver(qmp, options)
    const how: SaveToOptions = {
      disks,
      mode: options.mode as SaveMode | undefined,
      fallback: options.fallback as 'stop' | 'precopy' | undefined,
      scratch: options.scratch,
      receiver,
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
    for (const disk of manifest.disks) if (disk.frozen === false) context.warn(`disk ${describeDisk(disk)} is not frozen: it goes on changing, and the memory fits only what it is now`)
    return 0
  },
})

interface DiskOptions {
  readonly 'disks': readonly string[]
  readonly 'disk': readonly string[]
  readonly 'disk-snapshot': readonly string[]
}

/** What the options say of the disks; nothing, if they say nothing. */
function diskChoice(options: DiskOptions): DiskChoice | undefined {
  const names = options.disks.flatMap((list) => list.split(',')).filter((name) => name !== '')
  if (names.includes('none') && names.length > 1) throw new UsageError("--disks: 'none' goes with no other name")
  const list = [...names, ...options.disk.map(overlayOf), ...options['disk-snapshot'].map(internalOf)]
  return list.length === 0 ? undefined : list
}

function overlayOf(text: string): DiskSnapshot {
  const [node, overlay] = pair(text, '--disk takes DISK=OVERLAY')
  return { node, overlay }
}

function internalOf(text: string): DiskSnapshot {
  const [node, internal] = pair(text, '--disk-snapshot takes DISK=NAME')
  return { node, internal }
}

function pair(text: string, usage: string): [string, string] {
  const equals = text.indexOf('=')
  if (equals < 1) throw new UsageError(usage)
  return [text.slice(0, equals), text.slice(equals + 1)]
}
