// Errors by their code: what is the file's fault, what is the caller's, what is the disk's.
import { writeFile } from 'node:fs/promises'
import { Qcow2Error, Qcow2Image } from 'qcow2'
import { fault, MemoryDevice } from 'qcow2/block'

async function why(task: () => Promise<unknown>): Promise<void> {
  try {
    await task()
  } catch (error) {
    if (Qcow2Error.is(error)) console.log(`${error.code}: ${error.message}`)
    else if (error instanceof RangeError) console.log(`caller: ${error.message}`)
    else throw error
  }
}

await writeFile('text.txt', 'this is no image'.repeat(40))
await why(() => Qcow2Image.open('text.txt'))
await why(() => Qcow2Image.open('nowhere.qcow2'))

await using image = await Qcow2Image.create(new MemoryDevice(0, { growable: true }), { size: 1 << 20 })
await why(() => image.read(1 << 20, 1))
await why(() => image.snapshots.apply('missing'))

const failing = fault(new MemoryDevice(1 << 20), ({ operation }) => (operation === 'read' ? { kind: 'fail' } : undefined))
await why(() => failing.read(0, 512))
