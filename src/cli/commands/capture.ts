import { openFile } from '../../block/file.ts'
import type { ByteSource } from '../../migration/byte-source.ts'
import { capture } from '../../snapshot/capture.ts'
import { openMemoryTarget } from '../../snapshot/memory-target.ts'
import { MigrationListener } from '../../snapshot/socket.ts'
import { command } from '../command.ts'
import { memoryTarget, memoryTargetOptions } from '../image/memory-target.ts'
import { outputOption, progressOption, quietOption } from '../image/options.ts'
import { contentOf } from '../output.ts'
import { prettyJson } from '../print/shapes.ts'
import { formatSize } from '../size.ts'

export const captureCommand = command({
  name: 'capture',
  summary: 'Store a migration stream that QEMU sends',
  description: [
    "SOURCE is '-' for stdin, a stream file, or 'listen' (or listen:PATH): then the address for QEMU's migrate command is printed, and the first connection is taken.",
    'The stream is checked; what was not whole is not kept.',
  ],
  options: { ...memoryTargetOptions, ...outputOption, ...progressOption, ...quietOption },
  arguments: [
    { name: 'SOURCE', help: "'-', a file, 'listen' or 'listen:PATH'" },
    { name: 'FILE', help: 'where the memory goes' },
  ],
  examples: [
    { line: 'qcow2 capture listen warm.qcow2', shows: "then, in QEMU's monitor: migrate unix:..." },
    { line: 'qcow2 capture - vm.qcow2 --as=snapshot --name=running < vm.stream', shows: 'a stream becomes a snapshot for loadvm' },
  ],
  async run(context) {
    const { options, args, print, signal } = context
    const [source, file] = args as [string, string]
    const target = await openMemoryTarget(memoryTarget(file, options), { signal, references: 'any' })
    const closers: (() => Promise<void>)[] = [() => target.close()]
    try {
      const stream = await openSource()
      const progress = context.progress()
      context.leaves(`${file} is as it was`)
      const summary = await capture(stream, target.sink, { signal, onProgress: ({ done }) => progress.update(done, Math.max(done, 1)) })
      progress.finish()
      const { length, machine, blocks, pages, devices } = summary
      if (options.output === 'json') await print(prettyJson({ bytes: length, machine, blocks, pages, devices }))
      else if (!options.quiet) await print(`${file}: ${formatSize(length)} of VM state of a ${machine}`)
      return 0
    } finally {
      for (const close of closers.reverse()) await close()
    }

    async function openSource(): Promise<ByteSource> {
      if (source === '-') return context.terminal.stdin
      if (source !== 'listen' && !source.startsWith('listen:')) {
        const device = await openFile(source, { readOnly: true })
        closers.push(() => device.close())
        return contentOf(device, signal)
      }
      const listener = await MigrationListener.open(source === 'listen' ? undefined : source.slice('listen:'.length))
      closers.push(() => listener.close())
      await print(listener.uri)
      return (await listener.accept({ signal, timeout: 2 ** 31 - 1 })) as unknown as ByteSource
    }
  },
})
