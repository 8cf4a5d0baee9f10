import type { VmState } from '../../migration/vm-state.ts'
import { plainStream, strippedStream } from '../../migration/convert.ts'
import { slice } from '../../block/slice.ts'
import { command } from '../command.ts'
import { forceShareOption, objectOption, progressOption, quietOption } from '../image/options.ts'
import { openVmState } from '../image/vm-state.ts'
import { contentOf, writeStream } from '../output.ts'

const forms = ['stored', 'plain', 'without-ram']

export const vmstateExport = command({
  name: 'export',
  summary: 'Write a saved VM as a migration stream that QEMU can load',
  description: ["Start QEMU with the same machine and -incoming 'file:STREAM' (or pipe it in with -incoming 'exec:cat STREAM')."],
  options: {
    form: { value: 'FORM', choices: forms, help: "'stored' (default): the bytes as they are (of a RAM image, as 'plain'); 'plain': every page once, uncompressed, for any QEMU; 'without-ram': devices only" },
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
  ],
  async run(context) {
    const opened = await openVmState(context, context.args[0]!)
    try {
      const { vm } = opened
      const pages = vm.pagesBeside ? vm.ram.counts.normal * vm.ram.pageSize : 0
      const stream = streamOf(vm, context.options.form ?? 'stored', context.signal)
      await writeStream(context, context.args[1]!, stream, vm.streamLength + pages, context.progress())
      return 0
    } finally {
      await opened.close()
    }
  },
})

function streamOf(vm: VmState, form: string, signal: AbortSignal): AsyncIterable<Uint8Array> {
  if (form === 'without-ram') return strippedStream(vm, { signal })
  if (form === 'plain' || vm.pagesBeside) return plainStream(vm, { signal })
  return contentOf(slice(vm.storage, vm.streamOffset, vm.streamLength, { readOnly: true }), signal)
}
