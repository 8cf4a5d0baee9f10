import { openFile } from '../../block/file.ts'
import { capture } from '../../snapshot/capture.ts'
import { openMemoryTarget, type MemoryTarget } from '../../snapshot/memory-target.ts'
import type { SaveSink } from '../../snapshot/save-sink.ts'
import { MigrationListener } from '../../snapshot/socket.ts'
import type { StreamSummary } from '../../snapshot/stream-check.ts'
import { command } from '../command.ts'
import { memoryTarget, memoryTargetOptions, pipeSink } from '../image/memory-target.ts'
import { receiverOptions, socketMode } from '../image/receiver.ts'
import { outputOption, progressOption, quietOption } from '../image/options.ts'
import { contentOf } from '../output.ts'
import { isPipe, withPayload } from '../payload.ts'
import { pipeChunks, untilAborted } from '../pipe-source.ts'
import { prettyJson } from '../print/shapes.ts'
import { formatSize } from '../size.ts'

/** Runs a task with a sink that is open. */
type Store = (task: (sink: SaveSink) => Promise<StreamSummary>) => Promise<StreamSummary>

export const captureCommand = command({
  name: 'capture',
  summary: 'Store a migration stream that QEMU sends',
  description: [
    "SOURCE is '-' for stdin, a stream file, or 'listen' (or listen:PATH): then the address for QEMU's migrate command is printed, and the first connection is taken.",
    'The stream is checked; what was not whole is not kept. An image that is opened for it may have its backing file anywhere.',
  ],
  options: { ...memoryTargetOptions, 'receiver-mode': receiverOptions['receiver-mode'], ...outputOption, ...progressOption, ...quietOption },
  arguments: [
    { name: 'SOURCE', help: "'-', a file, 'listen' or 'listen:PATH'" },
    { name: 'FILE', help: "where the memory goes; '-' for stdout, with --as=stream" },
  ],
  payload: (args) => args[1],
  examples: [
    { line: 'qcow2 capture listen warm.qcow2', shows: "then, in QEMU's monitor: migrate unix:..." },
    { line: 'qcow2 capture - vm.qcow2 --as=snapshot --name=running < vm.stream', shows: 'a stream becomes a snapshot for loadvm' },
  ],
  async run(context) {
    const { options, args, print, signal, terminal } = context
    const [source, file] = args as [string, string]
    const memory = memoryTarget(file, options)
    const closers: (() => Promise<void>)[] = []
    try {
      const store = await openTarget(memory)
      const stream = await openSource()
      const progress = context.progress()
      const summary = await store((sink) => capture(untilAborted(stream, signal), sink, { signal, onProgress: ({ done }) => progress.update(done) }))
      progress.finish()
      const { length, machine, blocks, pages, devices } = summary
      if (options.output === 'json') await print(prettyJson({ bytes: length, machine, blocks, pages, devices }))
      else if (!options.quiet) await print(`${file}: ${formatSize(length)} of VM state of a ${machine}`)
      return 0
    } finally {
      for (const close of closers.reverse()) await close()
    }

    async function openTarget(memory: MemoryTarget): Promise<Store> {
      if (typeof memory !== 'string' && 'stream' in memory && isPipe(file)) return (task) => withPayload(file, terminal, (send) => task(pipeSink(send)))
      const target = await openMemoryTarget(memory, { signal, references: 'any' })
      closers.push(() => target.close())
      context.leaves(`${file} is as it was`)
      return (task) => task(target.sink)
    }

    async function openSource(): Promise<AsyncIterable<Uint8Array>> {
      if (source === '-') return terminal.stdin
      if (isPipe(source)) return pipeChunks(source, signal)
      if (source !== 'listen' && !source.startsWith('listen:')) {
        const device = await openFile(source, { readOnly: true })
        closers.push(() => device.close())
        return contentOf(device, signal)
      }
      const listener = await MigrationListener.open({ path: source === 'listen' ? undefined : source.slice('listen:'.length), mode: socketMode(options['receiver-mode']), single: true })
      closers.push(() => listener.close())
      await print(listener.uri)
      return (await listener.accept({ signal, timeout: 2 ** 31 - 1 })) as unknown as AsyncIterable<Uint8Array>
    }
  },
})
