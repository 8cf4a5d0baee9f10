// Loads the memory of a saved VM at the speed of the disk: chunks are read ahead, and pages copied out of them in bulk.
//   node load-vm-state.js STREAM
import { createReadStream } from 'node:fs'
import { Qcow2Image } from 'qcow2'
import { ReadAheadPrefetcher } from 'qcow2/block'
import { MigrationParser, ramFlag, type MigrationRecord } from 'qcow2/migration'
import { saveVmState } from 'qcow2/snapshot'

{
  await using image = await Qcow2Image.create('vm.qcow2', { size: 1 << 20 })
  await saveVmState(image, createReadStream(process.argv[2] ?? 'vm.mig'), { name: 'running' })
}

await using image = await Qcow2Image.open('vm.qcow2', { readOnly: true })
await using snapshot = await image.snapshots.open('running')
const memory = new Map<string, Uint8Array>()
const load = (record: MigrationRecord): void => {
  if (record.kind === 'ram-block') memory.set(record.block.name, new Uint8Array(record.block.length))
  if (record.kind !== 'ram-pages') return
  const block = memory.get(record.block.name)!
  for (let n = 0; n < record.count; n++) {
    const at = record.pageOffsets[n]!
    const from = record.positions[n]!
    if ((record.flags[n]! & ramFlag.page) !== 0) block.set(record.bytes.subarray(from, from + record.pageSize), at)
    else block.fill(0, at, at + record.pageSize)
  }
}
// borrowed: a chunk, and what the parser makes of it, is valid until the next is asked for; loadVmState() gives chunks to keep
await using ahead = new ReadAheadPrefetcher(snapshot.vmState)
const parser = new MigrationParser()
for await (const chunk of ahead.borrowedChunks()) for (const record of parser.push(chunk)) load(record)
parser.end()
for (const [name, bytes] of memory) console.log(name, bytes.length, bytes.some((byte) => byte !== 0) ? 'loaded' : 'all zeroes')
