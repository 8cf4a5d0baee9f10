/** Saved VMs held in memory, for tests: taken apart by the parser, page by page. */
import { MemoryDevice } from '../../src/block/memory.ts'
import { ramFlag } from '../../src/migration/format.ts'
import { MigrationParser } from '../../src/migration/parser.ts'
import { deviceLengths, locateVmDescription, parseVmDescription } from '../../src/migration/vm-description.ts'
import { ChunkReader } from '../../src/snapshot/chunk-reader.ts'
import type { PageSource } from '../../src/snapshot/page-source.ts'
import { MigrationListener } from '../../src/snapshot/socket.ts'
import type { Guest } from './guest.ts'

/** A whole stream as a page source. Zero pages are part of the content, so all of it is data. */
export function memorySource(stream: Uint8Array): PageSource {
  const location = locateVmDescription(stream)
  if (location === undefined) throw new Error('the stream has no VM description')
  const description = parseVmDescription(stream.subarray(location.start, location.start + location.length))
  const parser = new MigrationParser({ devices: deviceLengths(description) })
  const contents = new Map<string, Uint8Array>()
  let headEnd = 0
  let ramStartEnd = 0
  let ramEnd = 0
  let firstPage = 0
  let inRam = false
  let footers = false
  for (const record of parser.push(stream)) {
    const end = record.offset + record.length
    if (record.kind === 'header' || record.kind === 'configuration') headEnd = end
    if (record.kind === 'section') inRam = record.idstr === 'ram'
    if (record.kind === 'ram-block') contents.set(record.block.name, new Uint8Array(record.block.length))
    if (record.kind === 'ram-pages' && firstPage === 0) firstPage = record.offset - 5
    if (record.kind === 'footer') footers = true
    if (record.kind === 'footer' && inRam) {
      if (ramStartEnd === 0) ramStartEnd = end
      ramEnd = end
    }
    if (record.kind !== 'ram-pages') continue
    const content = contents.get(record.block.name)!
    for (let i = 0; i < record.count; i++) {
      const page = content.subarray(record.pageOffsets[i], record.pageOffsets[i]! + record.pageSize)
      if ((record.flags[i]! & ramFlag.zero) !== 0) page.fill(0)
      else page.set(record.bytes.subarray(record.positions[i], record.positions[i]! + record.pageSize))
    }
  }
  return {
    machine: parser.configuration?.machine ?? '',
    pageSize: parser.pageSize,
    head: stream.subarray(0, headEnd),
    ramSectionId: parser.ramSectionId!,
    footers,
    blocks: parser.blocks.map(({ name, length }) => ({ name, length, content: new MemoryDevice(contents.get(name)!) })),
    earlyDevices: stream.subarray(ramStartEnd, Math.max(firstPage, ramStartEnd)),
    devices: stream.subarray(ramEnd, location.eof),
    vmDescription: stream.subarray(location.eof + 1, location.start + location.length),
    close: () => Promise.resolve(),
    [Symbol.asyncDispose]: () => Promise.resolve(),
  }
}

/** What the guest's QEMU sends for `migrate` (background snapshot unless told otherwise). */
export async function captureStream(guest: Guest, background = true): Promise<Uint8Array> {
  await using listener = await MigrationListener.open()
  const capabilities = [{ capability: 'background-snapshot', state: background }]
  if (background) await guest.qmp.execute('migrate-set-capabilities', { capabilities })
  const accepted = listener.accept()
  await guest.qmp.execute('migrate', { uri: listener.uri })
  const chunks: Uint8Array[] = []
  for await (const chunk of new ChunkReader(await accepted)) chunks.push(chunk)
  return new Uint8Array(Buffer.concat(chunks))
}
