// Serves an image's disk on a unix socket to any NBD client (nbdcopy, qemu-img, a kernel); here to our own.
import { Qcow2Image } from 'qcow2'
import { MemoryDevice } from 'qcow2/block'
import { connectNbd, listen, NbdServer } from 'qcow2/nbd'

await using image = await Qcow2Image.create(new MemoryDevice(0, { growable: true }), { size: 1 << 30 })
await using listener = await listen(new NbdServer([{ name: 'disk', device: image }]), { path: 'disk.sock' })
console.log(listener.uri('disk'))

await using client = await connectNbd({ path: 'disk.sock' }, { name: 'disk' })
await client.write(12_345, new TextEncoder().encode('over the wire'))
console.log(new TextDecoder().decode(await image.read(12_345, 13)))
