/** The conformance suite on every driver and filter of the core. */
import { writeFileSync } from 'node:fs'
import { mkdtempSync, rmSync } from 'node:fs'
import { open } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { pathToFileURL } from 'node:url'
import { afterAll } from 'vitest'
import { fault, MemoryDevice, openFile, pad, slice, trace } from '../../src/block.ts'
import { blockDeviceSuite } from '../suites/block-device.ts'

const folder = mkdtempSync(join(tmpdir(), 'qcow2-devices-'))
afterAll(() => rmSync(folder, { recursive: true, force: true }))

let files = 0
const newFile = (content: Uint8Array): string => {
  const path = join(folder, `${files++}.img`)
  writeFileSync(path, content)
  return path
}

blockDeviceSuite('memory', (content) => new MemoryDevice(content), { resizable: true })
blockDeviceSuite('growable memory', (content) => new MemoryDevice(content, { growable: true }))
blockDeviceSuite('read-only memory', (content) => new MemoryDevice(content, { readOnly: true }))
blockDeviceSuite(
  'memory with alignment',
  (content) => new MemoryDevice(content, { limits: { requestAlignment: 512, memoryAlignment: 512 } }),
  { resizable: true },
)

blockDeviceSuite('file', (content) => openFile(newFile(content)))
blockDeviceSuite('file with synchronous requests', (content) => openFile(newFile(content), { syncLimit: 64 << 10 }))
blockDeviceSuite('read-only file', (content) => openFile(newFile(content), { readOnly: true }))
blockDeviceSuite('file with direct I/O', (content) => openFile(newFile(content), { direct: true }))
blockDeviceSuite('file by URL', (content) => openFile(pathToFileURL(newFile(content))))
blockDeviceSuite('file by FileHandle', async (content) => openFile(await open(newFile(content), 'r+')))

blockDeviceSuite('padded file with direct I/O', async (content) => pad(await openFile(newFile(content), { direct: true })))
blockDeviceSuite(
  'padded memory',
  (content) =>
    pad(new MemoryDevice(content, { growable: true, limits: { requestAlignment: 4096, memoryAlignment: 4096 } })),
)
blockDeviceSuite('slice', (content) => {
  const whole = new Uint8Array(content.length + 8192)
  whole.set(content, 4096)
  return slice(new MemoryDevice(whole), 4096, content.length)
})
blockDeviceSuite('read-only slice', (content) => slice(new MemoryDevice(content), 0, content.length, { readOnly: true }))
blockDeviceSuite('trace', (content) => trace(new MemoryDevice(content, { growable: true }), []))
blockDeviceSuite('fault without faults', (content) => fault(new MemoryDevice(content, { growable: true }), () => undefined))
