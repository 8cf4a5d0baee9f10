import { command } from '../command.ts'
import { UsageError } from '../errors.ts'
import { forceShareOption, objectOption, progressOption, quietOption } from '../image/options.ts'
import { openVmState } from '../image/vm-state.ts'
import { secretMode, writeDevice, writeStream } from '../output.ts'
import { optionSize } from '../size.ts'
import { slice } from '../../block/slice.ts'

export const vmstateExtract = command({
  name: 'extract',
  summary: 'Write the memory or a device of a saved VM to a file',
  description: ['Memory comes out as it was: byte 0 of the file is byte 0 of the RAM block. Pages that are zero are holes in the file.'],
  options: {
    device: { short: 'd', help: 'PART is a device: its section as it is in the stream' },
    instance: { value: 'NUMBER', help: 'with --device: which of several; default 0' },
    offset: { value: 'OFFSET', help: 'begin at this byte of the RAM block' },
    length: { value: 'LENGTH', help: 'so many bytes' },
    ...progressOption,
    ...quietOption,
    ...forceShareOption,
    ...objectOption,
  },
  arguments: [
    { name: 'VM', help: 'IMAGE@SNAPSHOT, a RAM image, or a stream file' },
    { name: 'PART', word: true, help: 'a RAM block such as pc.ram, or a device' },
    { name: 'OUTPUT', help: "the file to write; '-' for stdout" },
  ],
  payload: (args) => args[2],
  examples: [
    { line: 'qcow2 vmstate extract vm.qcow2@running pc.ram memory.raw', shows: 'the memory, for a debugger' },
    { line: 'qcow2 vmstate extract vm.qcow2@running pc.ram - --offset 0x7c00 --length 512 | xxd', shows: 'the boot sector in memory' },
  ],
  async run(context) {
    const { options, args, signal } = context
    const [name, part, output] = args as [string, string, string]
    const opened = await openVmState(context, name)
    try {
      const { vm } = opened
      if (options.device) {
        const bytes = await vm.readDevice(vm.device(part, Number(options.instance ?? 0)), { signal })
        await writeStream(context, output, only(bytes), bytes.length, context.progress(), secretMode)
        return 0
      }
      const ram = vm.ram.device(part)
      const offset = options.offset === undefined ? 0 : optionSize('offset', options.offset)
      const length = options.length === undefined ? ram.size - offset : optionSize('length', options.length)
      if (length < 0 || offset + length > ram.size) throw new UsageError(`RAM block ${part} has ${ram.size} bytes; ${length} at ${offset} reach past its end`)
      await writeDevice(context, output, slice(ram, offset, length), context.progress())
      return 0
    } finally {
      await opened.close()
    }
  },
})

// eslint-disable-next-line @typescript-eslint/require-await -- a stream of one chunk
async function* only(bytes: Uint8Array): AsyncGenerator<Uint8Array, void, undefined> {
  yield bytes
}
