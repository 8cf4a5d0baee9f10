// Checks an image without opening it, as qemu-img check does, and frees leaked clusters.
import { checkImage, Qcow2Image } from 'qcow2'

{
  await using image = await Qcow2Image.create('disk.qcow2', { size: 1 << 30 })
  await image.write(0, new Uint8Array(1 << 20).fill(1))
}
const report = await checkImage('disk.qcow2')
console.log(report.corruptions, 'corruptions,', report.leaks, 'leaks,', report.allocatedClusters, 'clusters')

await using image = await Qcow2Image.open('disk.qcow2')
const repaired = await image.check({ repair: 'leaks' })
console.log(repaired.leaksFixed, 'leaks fixed')
