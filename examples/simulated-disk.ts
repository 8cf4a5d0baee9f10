// How long would a rotational disk take? The same answer on every machine.
import { AlignedWriteQueue, NullDevice, simulatedDisk } from 'qcow2/block'

const MiB = 1024 * 1024
const total = 256 * MiB
const rate = (microseconds: number): string => `${(total / microseconds).toFixed(1)} MB/s`

{
  await using disk = simulatedDisk(new NullDevice(total))
  const slab = new Uint8Array(64 * 1024)
  for (let at = 0; at < total; at += slab.length) await disk.write(at, slab)
  console.log('64 KiB, one at a time:', rate(disk.elapsed))
}
{
  await using disk = simulatedDisk(new NullDevice(total))
  const queue = new AlignedWriteQueue(disk, { slabSize: 64 * 1024, depth: 2 })
  for (let at = 0; at < total; at += MiB) await queue.write(new Uint8Array(MiB))
  await queue.close()
  console.log('64 KiB, two in flight:', rate(disk.elapsed))
}
