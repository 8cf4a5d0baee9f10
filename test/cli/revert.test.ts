/** `revert` from whatever holds a saved VM: the command takes every name that `vmstate show` takes. */
import { copyFileSync, existsSync, mkdirSync, readFileSync, readdirSync, writeFileSync } from 'node:fs'
import { createServer as createWebServer } from 'node:http'
import { createServer, type Server } from 'node:net'
import { join } from 'node:path'
import { gzipSync } from 'node:zlib'
import { describe, expect, onTestFinished, test } from 'vitest'
import { openFile } from '../../src/block/file.ts'
import { NbdServer } from '../../src/nbd/server.ts'
import { listen } from '../../src/nbd/socket.ts'
import { Qcow2Image } from '../../src/qcow2/image.ts'
import { capture as store } from '../../src/snapshot/capture.ts'
import { openSaved } from '../../src/snapshot/open-saved.ts'
import type { PageSource } from '../../src/snapshot/page-source.ts'
import { RamImageWriter } from '../../src/snapshot/ram-image-writer.ts'
import { saveVmState } from '../../src/snapshot/vm-state-snapshot.ts'
import { capture } from '../migration/captures.ts'
import { FakeDestination } from '../support/fake-destination.ts'
import { tempFolder } from '../support/temp.ts'
import { run, type RunResult } from './run.ts'

const stream = capture('qemu100-bgsnap.mig')
const other = capture('qemu72-precopy.mig')

/** Reverts by the command into a strict destination, whose memory is compared with what is expected. */
async function expectReverts(name: string, expected: Uint8Array = stream, options: readonly string[] = []): Promise<RunResult> {
  await using source = await openSaved(expected)
  const destination = new FakeDestination(source, { requests: [{ block: 'pc.ram', page: 70 }] })
  const incoming = await listenFor(destination)
  const result = await run(['revert', name, '--state=running', '--incoming', incoming, ...options])
  expect(result).toMatchObject({ code: 0, stderr: '' })
  expect(result.stdout).toMatch(/^the guest ran after \d+ ms/)
  expect(destination.problems).toEqual([])
  await expectMemory(source, destination)
  return result
}

async function expectMemory(source: PageSource, destination: FakeDestination): Promise<void> {
  for (const { name, length, content } of source.blocks) {
    expect(Buffer.compare(destination.memory.get(name)!, await content.read(0, length)), name).toBe(0)
  }
}

async function listenFor(destination: FakeDestination): Promise<string> {
  const path = join(tempFolder(), 'incoming')
  const server: Server = createServer({ allowHalfOpen: true }, (socket) => {
    socket.pipe(destination.stream, { end: true }).pipe(socket)
    socket.on('error', () => undefined)
  })
  await new Promise<void>((resolve) => server.listen(path, resolve))
  onTestFinished(() => void server.close())
  return path
}

async function ramImage(folder = tempFolder(), bytes = stream): Promise<string> {
  const file = join(folder, 'warm.qcow2')
  await store(bytes, RamImageWriter.to(file))
  return file
}

async function served(folder: string): Promise<string> {
  const server = createWebServer((request, response) => {
    const path = join(folder, decodeURIComponent(new URL(request.url!, 'http://x').pathname))
    if (!existsSync(path)) return void response.writeHead(404).end()
    const bytes = readFileSync(path)
    const [, first, last] = /^bytes=(\d+)-(\d+)$/.exec(request.headers.range ?? '') ?? [undefined, '0', String(bytes.length - 1)]
    const end = Math.min(Number(last), bytes.length - 1)
    response.writeHead(206, { 'content-range': `bytes ${first}-${end}/${bytes.length}`, 'etag': '"1"' }).end(bytes.subarray(Number(first), end + 1))
  })
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
  onTestFinished(() => {
    server.closeAllConnections()
    server.close()
  })
  const address = server.address()
  return `http://127.0.0.1:${typeof address === 'object' && address !== null ? address.port : 0}`
}

describe('revert', () => {
  test('a RAM image, a stream, a compressed stream', async () => {
    await expectReverts(await ramImage())
    const folder = tempFolder()
    writeFileSync(join(folder, 'warm.mig'), stream)
    writeFileSync(join(folder, 'warm.mig.gz'), gzipSync(stream))
    await expectReverts(join(folder, 'warm.mig'))
    await expectReverts(join(folder, 'warm.mig.gz'))
  })

  test('an incremental RAM image, whose base is in another folder', async () => {
    const folder = tempFolder()
    mkdirSync(join(folder, 'sub'))
    const base = await ramImage(folder)
    for (const backing of ['../warm.qcow2', base]) {
      const top = join(folder, 'sub', 'top.qcow2')
      await store(stream, RamImageWriter.to(top, { backing: { file: backing, format: 'qcow2' }, references: 'any' }))
      await expectReverts(top)
    }
  })

  test('a snapshot in an overlay without its base; of several, the one that is named', async () => {
    const folder = tempFolder()
    const file = join(folder, 'state.qcow2')
    {
      await using _ = await Qcow2Image.create(join(folder, 'base.qcow2'), { size: 1 << 20 })
    }
    {
      await using image = await Qcow2Image.create(file, { backing: { file: 'base.qcow2', format: 'qcow2' } })
      await saveVmState(image, stream, { name: 'one' })
    }
    const alone = join(tempFolder(), 'alone.qcow2')
    copyFileSync(file, alone)
    await expectReverts(alone)
    await expectReverts(`${alone}@one`)
    const shown = await run(['vmstate', 'show', alone])
    expect(shown).toMatchObject({ code: 0, stderr: '' })
    {
      await using image = await Qcow2Image.open(file)
      await saveVmState(image, other, { name: 'two' })
    }
    const refused = await run(['revert', file, '--incoming', '/nowhere'])
    expect(refused).toMatchObject({ code: 1, stderr: expect.stringMatching(/several saved VMs.*: one, two\n$/) as string })
    await expectReverts(`${file}@two`, other)
    await expectReverts(`${file}@one`)
    // each has an order of faults of its own
    expect(readdirSync(folder).filter((name) => name.endsWith('.faults.json')).sort()).toEqual(['state.qcow2@one.faults.json', 'state.qcow2@two.faults.json'])
  })

  test('a web address, with a snapshot too', async () => {
    const folder = tempFolder()
    await ramImage(folder)
    {
      await using image = await Qcow2Image.create(join(folder, 'state.qcow2'), { size: 1 << 20 })
      await saveVmState(image, stream, { name: 'one' })
      await saveVmState(image, other, { name: 'two' })
    }
    const before = readdirSync(folder)
    const at = await served(folder)
    await expectReverts(`${at}/warm.qcow2`)
    await expectReverts(`${at}/state.qcow2@two`, other)
    expect(readdirSync(folder)).toEqual(before)
    const missing = await run(['revert', `${at}/nothing.qcow2`, '--incoming', '/nowhere'])
    expect(missing).toMatchObject({ code: 1, stderr: expect.stringContaining('nothing.qcow2') as string })
  })

  test('an NBD address', async () => {
    const socket = join(tempFolder(), 'nbd')
    await using device = await openFile(await ramImage(), { readOnly: true })
    const server = new NbdServer([{ name: '', device, readOnly: true }])
    const listener = await listen(server, { path: socket })
    onTestFinished(() => listener.close())
    await expectReverts(`nbd+unix:///?socket=${socket}`)
  })

  test('an encrypted image, with its key', async () => {
    const file = join(tempFolder(), 'secret.qcow2')
    {
      await using image = await Qcow2Image.create(file, { size: 1 << 20, encryption: { format: 'luks', passphrase: 'geheim', iterations: 1000 } })
      await saveVmState(image, stream, { name: 'one' })
    }
    const name = `json:{"driver":"qcow2","encrypt.key-secret":"s","file.filename":${JSON.stringify(file)}}`
    await expectReverts(name, stream, ['--object', 'secret,id=s,data=geheim'])
    expect(await run(['revert', file, '--incoming', '/nowhere'])).toMatchObject({ code: 1, stderr: expect.stringContaining('key') as string })
  })

  test.each([
    ['revert x.qcow2 --incoming y --eager --recover', '--eager and --recover exclude each other'],
    ['revert x.qcow2 --incoming y --state=asleep', 'asleep'],
    ['revert /nonexistent --incoming y', "Could not open '/nonexistent': No such file or directory"],
  ])('%s is refused', async (line, message) => {
    expect(await run(line)).toMatchObject({ code: 1, stderr: expect.stringContaining(message) as string })
  })

  test('a compressed image: what to do', async () => {
    const file = `${await ramImage()}.gz`
    writeFileSync(file, gzipSync(readFileSync(file.slice(0, -3))))
    expect(await run(['revert', file, '--incoming', '/nowhere'])).toMatchObject({ code: 1, stderr: expect.stringContaining('decompress the file first (gzip -d)') as string })
  })
})
