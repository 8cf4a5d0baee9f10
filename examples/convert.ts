// Converts a raw disk into a compressed image, shows how far it is, and stops when told to.
//   node convert.js SOURCE TARGET       (Ctrl-C stops it)
import { rm } from 'node:fs/promises'
import { convertToQcow2 } from 'qcow2'
import { openFile } from 'qcow2/block'

const [from = 'disk.raw', to = 'disk.qcow2'] = process.argv.slice(2)
const stop = new AbortController()
process.once('SIGINT', () => stop.abort())

await using source = await openFile(from, { readOnly: true })
await using target = await openFile(to, { create: 'wx' })
try {
  await convertToQcow2(source, target, {
    compressed: true,
    signal: stop.signal,
    onProgress: ({ done, total }) => process.stderr.write(`\r${Math.floor((100 * done) / total)} %`),
  })
  console.log(`${source.size} bytes became ${target.size}`)
} catch (error) {
  await rm(to) // what is there is no image
  if (!stop.signal.aborted) throw error
  console.log('stopped; nothing is left behind')
}
