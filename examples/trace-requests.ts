// Shows the requests that reach the file when a guest writes.
import { Qcow2Image } from 'qcow2'
import { openFile, trace, type TracedRequest } from 'qcow2/block'

const log: TracedRequest[] = []
await using image = await Qcow2Image.create(trace(await openFile('disk.qcow2', { create: 'w' }), log), { size: 1 << 30 })
log.length = 0
await image.write(5_000_000, new Uint8Array(200_000))
await image.flush()
for (const { operation, offset, length } of log) console.log(operation.padEnd(12), offset, length)
