// Writes a stream of odd pieces past the page cache, in aligned requests of 1 MiB with four in flight.
import { AlignedWriteQueue, openFile, Qcow2Error, type FileDevice } from 'qcow2/block'

async function create(path: string): Promise<FileDevice> {
  try {
    return await openFile(path, { create: 'w', direct: true })
  } catch (error) {
    if (!Qcow2Error.is(error, 'ERR_UNSUPPORTED')) throw error
    return openFile(path, { create: 'w' }) // this file system has no direct I/O
  }
}

await using file = await create('stream.bin')
const queue = new AlignedWriteQueue(file, {
  onProgress: ({ done }) => process.stderr.write(`${done} bytes stored\n`),
})
const piece = new Uint8Array(4104).fill(7)
for (let n = 0; n < 2000; n++) {
  const full = queue.write(piece) // undefined: taken; a promise: all slabs are in flight
  if (full !== undefined) await full
}
await queue.close() // stores the rest and makes all of it durable
console.log(file.size)
