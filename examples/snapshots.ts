// Takes an internal snapshot, changes the disk, looks at the old content, and goes back to it.
import { Qcow2Image } from 'qcow2'

const text = (bytes: Uint8Array): string => new TextDecoder().decode(bytes)

await using image = await Qcow2Image.create('disk.qcow2', { size: 1 << 20 })
await image.write(0, new TextEncoder().encode('before'))
await image.snapshots.create({ name: 'clean' })
await image.write(0, new TextEncoder().encode('after!'))

{
  await using snapshot = await image.snapshots.open('clean')
  console.log('disk:', text(await image.read(0, 6)), ' snapshot:', text(await snapshot.read(0, 6)))
}

await image.snapshots.apply('clean')
console.log('applied:', text(await image.read(0, 6)))
for (const { id, name, date } of image.snapshots) console.log(id, name, date.getFullYear() > 2000)
await image.snapshots.delete('clean')
