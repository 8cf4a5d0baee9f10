// Stores a migration stream as a snapshot that QEMU's -loadvm takes, and reads it back.
//   node save-vm-state.js STREAM
// Such a stream is what `migrate "exec:cat > STREAM"` writes.
import { createReadStream, createWriteStream } from 'node:fs'
import { Readable } from 'node:stream'
import { pipeline } from 'node:stream/promises'
import { Qcow2Image } from 'qcow2'
import { loadVmState, saveVmState } from 'qcow2/snapshot'

const stream = process.argv[2] ?? 'vm.mig'
await using image = await Qcow2Image.create('vm.qcow2', { size: 1 << 20 })
const saved = await saveVmState(image, createReadStream(stream), { name: 'running' })
console.log(`snapshot ${saved.id} "${saved.name}": ${saved.vmStateSize} bytes of VM state`)

await using snapshot = await image.snapshots.open('running')
await pipeline(Readable.from(loadVmState(snapshot)), createWriteStream('copy.mig'))
