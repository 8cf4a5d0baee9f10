import type { BlockDevice } from '../../block/device.ts'
import { slice } from '../../block/slice.ts'
import { plainStream, strippedStream } from '../../migration/convert.ts'
import { exportElfCore } from '../../migration/elf-core.ts'
import { exportLime, exportPhysical, type ExportPhysicalOptions } from '../../migration/physical-export.ts'
import type { VmState } from '../../migration/vm-state.ts'
import { command } from '../command.ts'
import { ExitError, UsageError } from '../errors.ts'
import { mapOption, parseMemoryMap } from '../image/memory-map.ts'
import { forceShareOption, objectOption, progressOption, quietOption } from '../image/options.ts'
import { openVmState } from '../image/vm-state.ts'
import { contentOf, secretMode, writeLaidOut, writeStream } from '../output.ts'

/** Forms by guest physical address. */
const layouts: Readonly<Record<string, (vm: VmState, target: BlockDevice, options: ExportPhysicalOptions) => Promise<void>>> = {
  elf: exportElfCore,
  raw: exportPhysical,
  lime: exportLime,
}
const streams = ['stream', 'stored', 'plain', 'without-ram']

export const vmstateExport = command({
  name: 'export',
  summary: 'Write a saved VM as a migration stream that QEMU can load, or its memory for a debugger',
  description: [
    "Streams: start QEMU with the same machine and -incoming 'file:STREAM' (or pipe it in with -incoming 'exec:cat STREAM').",
    'Memory (elf, raw, lime): every byte is at its guest physical address. A VM whose addresses are not certain is refused, with the reason; --map gives them.',
  ],
  options: {
    form: {
      value: 'FORM',
      choices: [...streams, ...Object.keys(layouts)],
      help: "'stream' or 'stored' (default): the stream as it is (of a RAM image, as 'plain'); 'plain': every page once, uncompressed, for any QEMU; 'without-ram': devices only; 'elf': memory as an ELF core with the CPUs' registers, for crash and gdb; 'raw': memory by address, with holes; 'lime': memory in LiME's format",
    },
    ...mapOption,
    cut: { help: 'take what there is of a stream that is cut short' },
    ...progressOption,
    ...quietOption,
    ...forceShareOption,
    ...objectOption,
  },
  arguments: [
    { name: 'VM', help: 'IMAGE@SNAPSHOT, a RAM image, or a stream file' },
    { name: 'OUTPUT', help: "the file to write; '-' for stdout" },
  ],
  payload: (args) => args[1],
  examples: [
    { line: 'qcow2 vmstate export vm.qcow2@running vm.stream', shows: 'take the VM out of the image' },
    { line: 'qcow2 vmstate export --form=plain saved.gz - | ssh host qemu-system-x86_64 -incoming exec:cat', shows: 'resume it elsewhere' },
    { line: 'qcow2 vmstate export --form=elf vm.qcow2@running core && crash vmlinux core', shows: 'look into its kernel' },
  ],
  async run(context) {
    const { options, args, signal } = context
    const [name, output] = args as [string, string]
    const { form = 'stored', map } = options
    const layout = layouts[form]
    if (layout === undefined && map !== undefined) throw new UsageError(`--map goes with --form=${Object.keys(layouts).join(', ')}`)
    const opened = await openVmState(context, name)
    try {
      const { vm } = opened
      if (!options.cut) refuseCut(opened.name, vm)
      const progress = context.progress()
      if (layout === undefined) {
        const pages = vm.pagesBeside ? vm.ram.counts.normal * vm.ram.pageSize : 0
        await writeStream(context, output, streamOf(vm, form, signal), vm.streamLength + pages, progress, secretMode)
        return 0
      }
      const ranges = map === undefined ? undefined : parseMemoryMap(map, vm)
      const onProgress = ({ done, total }: { readonly done: number; readonly total: number }): void => progress.update(done, total)
      await writeLaidOut(context, output, (target) => layout(vm, target, { map: ranges, signal, onProgress }))
      progress.finish()
      return 0
    } finally {
      await opened.close()
    }
  },
})

/** No QEMU loads such a stream, and memory may be missing from it. */
function refuseCut(name: string, vm: VmState): void {
  if (vm.cut === undefined) return
  throw new ExitError(1, `${name} is cut short: ${vm.cut}; --cut takes what there is`)
}

function streamOf(vm: VmState, form: string, signal: AbortSignal): AsyncIterable<Uint8Array> {
  if (form === 'without-ram') return strippedStream(vm, { signal, cut: 'take' })
  if (form === 'plain' || vm.pagesBeside) return plainStream(vm, { signal, cut: 'take' })
  return contentOf(slice(vm.storage, vm.streamOffset, vm.streamLength, { readOnly: true }), signal)
}
