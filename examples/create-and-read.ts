// Makes an image, writes to it, reads it back, and shows which parts of it hold data.
import { Qcow2Image } from 'qcow2'

const MiB = 1024 * 1024
{
  await using image = await Qcow2Image.create('disk.qcow2', { size: 64 * MiB })
  await image.write(10 * MiB, new TextEncoder().encode('hello'))
  await image.flush()
}

await using image = await Qcow2Image.open('disk.qcow2', { readOnly: true })
console.log(new TextDecoder().decode(await image.read(10 * MiB, 5)))
for await (const extent of image.map()) console.log(extent.start, extent.length, extent.kind)
