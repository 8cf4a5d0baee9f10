/**
 * What a real QEMU does when a postcopy source breaks a rule: the reasons for the order that our source keeps (it is
 * held to it by the model in postcopy-model.test.ts). Each destination is killed afterwards; some of them hang.
 *
 * Three rules are tested by the model alone, because what QEMU does depends on timing: 3 (device state outside the
 * package), 4 (END before the device state is loaded) and 10 (closing before SHUT).
 */
import { join } from 'node:path'
import { expect, test } from 'vitest'
import {
  openReturnPath,
  packaged,
  ping,
  postcopyAdvise,
  postcopyListen,
  postcopyRamDiscard,
  postcopyRun,
} from '../../src/migration/postcopy.ts'
import { ReturnPathParser } from '../../src/migration/return-path.ts'
import { RamPart, ramPartCapacity } from '../../src/migration/ram-part.ts'
import type { DuplexStream } from '../../src/qmp/duplex.ts'
import { connectSocket } from '../../src/qmp/socket.ts'
import type { PageSource } from '../../src/snapshot/page-source.ts'
import { PostcopySource } from '../../src/snapshot/postcopy-source.ts'
import { ramSection } from '../../src/snapshot/ram-frame.ts'
import { openSaved } from '../../src/snapshot/open-saved.ts'
import { RamImageWriter } from '../../src/snapshot/ram-image-writer.ts'
import { revert } from '../../src/snapshot/revert.ts'
import { saveTo } from '../../src/snapshot/save.ts'
import { Guest } from '../support/guest.ts'
import { describeWithQemu, type Qemu } from '../support/qemu.ts'
import { captureStream, memorySource } from '../support/saved.ts'
import { makeSave, memoryOf } from '../support/saves.ts'
import { SlowSource } from '../support/slow-source.ts'
import { tempFolder } from '../support/temp.ts'

interface Rules {
  readonly discard?: boolean
  readonly returnPath?: boolean
  readonly pageSize?: number
  readonly blocks?: PageSource['blocks']
}

/** A conversation by hand. */
class ByHand {
  readonly guest: Guest
  readonly source: PageSource
  readonly stream: DuplexStream
  readonly pongs: number[] = []
  shut: number | undefined
  requests = 0
  closed = false

  constructor(guest: Guest, source: PageSource, stream: DuplexStream) {
    this.guest = guest
    this.source = source
    this.stream = stream
    const parser = new ReturnPathParser()
    stream.on('data', (chunk: Uint8Array) => {
      for (const message of parser.push(chunk)) {
        if (message.kind === 'pong') this.pongs.push(message.value)
        if (message.kind === 'shut') this.shut = message.value
        if (message.kind === 'request-pages') this.requests++
      }
    })
    stream.on('error', () => (this.closed = true))
    stream.on('close', () => (this.closed = true))
    stream.on('end', () => (this.closed = true))
  }

  static async begin(qemu: Qemu, postcopy = true): Promise<ByHand> {
    const first = await Guest.boot(qemu)
    await first.run(3)
    const source = memorySource(await captureStream(first))
    await first.kill()
    const guest = await Guest.boot(qemu, { incoming: 'defer' })
    const path = join(guest.folder, 'incoming')
    if (postcopy) await guest.qmp.execute('migrate-set-capabilities', { capabilities: [{ capability: 'postcopy-ram', state: true }] })
    await guest.qmp.execute('migrate-incoming', { uri: `unix:${path}` })
    return new ByHand(guest, source, await connectSocket(path))
  }

  send(...pieces: readonly Uint8Array[]): void {
    for (const bytes of pieces) this.stream.write(bytes)
  }

  open({ discard = true, returnPath = true, pageSize = 4096, blocks = this.source.blocks }: Rules = {}): void {
    const { head, devices } = this.source
    const state = [postcopyListen(), devices, ...(returnPath ? [ping(3)] : []), postcopyRun()]
    this.send(
      head,
      ...(returnPath ? [openReturnPath(), ping(1)] : []),
      postcopyAdvise([pageSize], 4096),
      ...ramSection({ ...partsOf(this.source), blocks }, 'start'),
      ...(discard ? blocks.flatMap(({ name, length }) => postcopyRamDiscard(name, [{ offset: 0, length }])) : []),
      ...packaged(state),
    )
  }

  /** All pages of all blocks, in one section each. */
  async pages(): Promise<Uint8Array[]> {
    const { blocks, ramSectionId: sectionId, footers } = this.source
    return Promise.all(
      blocks.map(async ({ name, length, content }) => {
        const part = new RamPart(new Uint8Array(ramPartCapacity(length / 4096, 4096)), { sectionId, pageSize: 4096, footers })
        part.begin(name)
        const bytes = await content.read(0, length)
        for (let offset = 0; offset < length; offset += 4096) part.page(offset, bytes, offset)
        return part.finish()
      }),
    )
  }

  /** The destination ends, or says that it has failed. */
  async fails(): Promise<void> {
    const over = async (): Promise<boolean> => {
      if (!this.guest.running) return true
      const { status } = await this.guest.qmp.execute('query-migrate').catch(() => ({ status: 'failed' }))
      return ['failed', 'postcopy-paused'].includes(status ?? '')
    }
    await expect.poll(over, { timeout: 10_000, interval: 10 }).toBe(true)
  }
}

const pause = (milliseconds: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, milliseconds))
const eof = Uint8Array.of(0)

function pageSection({ ramSectionId: sectionId, footers }: PageSource, block: string, offset: number): Uint8Array {
  const part = new RamPart(new Uint8Array(ramPartCapacity(1, 4096)), { sectionId, pageSize: 4096, footers })
  part.begin(block)
  part.page(offset, new Uint8Array(4096), 0)
  return part.finish()
}

describeWithQemu('traps of postcopy', (qemu) => {
  test('the rules, kept by hand, work', async () => {
    const hand = await ByHand.begin(qemu)
    hand.open()
    hand.send(...(await hand.pages()))
    await expect.poll(() => hand.pongs, { timeout: 10_000 }).toContain(3)
    hand.send(...ramSection(hand.source, 'end'), eof)
    await expect.poll(() => hand.shut, { timeout: 10_000 }).toBe(0)
    await hand.guest.run(3)
    expect(hand.guest.errors).toEqual([])
  })

  test('1: without a DISCARD it never gets to run', async () => {
    const hand = await ByHand.begin(qemu)
    hand.open({ discard: false })
    hand.send(...(await hand.pages()))
    await pause(1000)
    // it hangs while pages come, or loads its devices and then refuses to run
    expect(hand.guest.ticks).toEqual([])
  })

  test('2: a page sent twice ends or pauses it', async () => {
    const hand = await ByHand.begin(qemu)
    hand.open()
    const pages = await hand.pages()
    hand.send(...pages)
    await expect.poll(() => hand.pongs, { timeout: 10_000 }).toContain(3)
    hand.send(pages[0]!)
    await hand.fails()
  })

  test('5: pages that are missing at the end read as zeroes, unnoticed', async () => {
    const hand = await ByHand.begin(qemu)
    hand.open()
    const pages = await hand.pages()
    // pc.ram is first: of it, only what the processor needs to go on
    const { ramSectionId: sectionId, footers, blocks } = hand.source
    const part = new RamPart(new Uint8Array(ramPartCapacity(512, 4096)), { sectionId, pageSize: 4096, footers })
    part.begin(blocks[0]!.name)
    const bytes = await blocks[0]!.content.read(0, 2 << 20)
    for (let offset = 0; offset < bytes.length; offset += 4096) part.page(offset, bytes, offset)
    hand.send(part.finish(), ...pages.slice(1))
    await expect.poll(() => hand.pongs, { timeout: 10_000 }).toContain(3)
    hand.send(...ramSection(hand.source, 'end'), eof)
    await expect.poll(() => hand.shut, { timeout: 10_000 }).toBe(0)
    await expect.poll(() => hand.guest.errors.length, { timeout: 10_000 }).toBeGreaterThan(0)
  })

  test('6: without a return path it runs, but never asks for a page', async () => {
    const hand = await ByHand.begin(qemu)
    hand.open({ returnPath: false })
    await pause(500)
    expect(hand.requests).toBe(0)
    expect(hand.guest.ticks).toEqual([])
  })

  test('7: without the capability it refuses', async () => {
    const hand = await ByHand.begin(qemu, false)
    hand.open()
    await hand.fails()
  })

  test('8: a wrong page size is refused', async () => {
    const hand = await ByHand.begin(qemu)
    hand.open({ pageSize: 2 << 20 })
    await hand.fails()
    expect(hand.pongs).not.toContain(3)
  })

  test('9: without the EOF byte it runs and never completes', async () => {
    const hand = await ByHand.begin(qemu)
    hand.open()
    hand.send(...(await hand.pages()))
    await expect.poll(() => hand.pongs, { timeout: 10_000 }).toContain(3)
    hand.send(...ramSection(hand.source, 'end'))
    await hand.guest.run(3)
    expect(await hand.guest.qmp.execute('query-migrate')).toMatchObject({ status: 'postcopy-active' })
    expect(hand.shut).toBeUndefined()
  })

  test('11: a connection lost before the guest runs ends it', async () => {
    const hand = await ByHand.begin(qemu)
    const { head, devices, blocks } = hand.source
    hand.send(head, openReturnPath(), ping(1), postcopyAdvise([4096], 4096), ...ramSection(hand.source, 'start'))
    hand.send(...blocks.flatMap(({ name, length }) => postcopyRamDiscard(name, [{ offset: 0, length }])))
    hand.send(packaged([postcopyListen(), devices])[0]!)
    await expect.poll(() => hand.pongs, { timeout: 10_000 }).toContain(1)
    hand.stream.destroy()
    await hand.fails()
  })

  test.each([
    ['beyond its block', 'pc.ram', 64 << 20, /Illegal RAM offset 4000000/],
    ['in a block that it does not have', 'nothing', 0, /Can't find block nothing/],
  ])('12: a page %s ends or pauses it', async (_where, block, offset, complaint) => {
    const hand = await ByHand.begin(qemu)
    hand.open()
    hand.send(pageSection(hand.source, block, offset))
    await hand.fails()
    await expect.poll(() => hand.guest.stderr, { timeout: 10_000 }).toMatch(complaint)
    expect(hand.guest.ticks).toEqual([])
  })

  test('12: memory of another size is refused', async () => {
    const hand = await ByHand.begin(qemu)
    const [first, ...others] = hand.source.blocks
    hand.open({ blocks: [{ ...first!, length: 8 << 20 }, ...others] })
    await hand.fails()
    await expect.poll(() => hand.guest.stderr, { timeout: 10_000 }).toContain('Size mismatch: pc.ram: 0x800000 != 0x400000')
    expect(hand.pongs).not.toContain(3)
  })

  test('13: pages are asked for before the guest runs', async () => {
    const hand = await ByHand.begin(qemu)
    hand.open()
    await expect.poll(() => hand.requests, { timeout: 10_000 }).toBeGreaterThan(0)
    expect(hand.guest.ticks).toEqual([])
  })

  test('14: a PING behind the package is answered, too, before or after that within', async () => {
    const hand = await ByHand.begin(qemu)
    hand.open()
    hand.send(ping(4))
    await expect.poll(() => [...hand.pongs].sort(), { timeout: 10_000 }).toEqual([1, 3, 4])
  })

  test('15: a guest saved while it was paused runs, whatever the stream tells', async () => {
    const file = join(tempFolder(), 'paused.qcow2')
    const first = await Guest.boot(qemu)
    await first.run(3)
    await first.qmp.execute('stop')
    await saveTo(first.qmp, RamImageWriter.to(file))
    await first.kill()
    const guest = await Guest.boot(qemu, { incoming: 'defer' })
    const path = join(guest.folder, 'incoming')
    await guest.qmp.execute('migrate-set-capabilities', { capabilities: [{ capability: 'postcopy-ram', state: true }] })
    await guest.qmp.execute('migrate-incoming', { uri: `unix:${path}` })
    await using source = await openSaved(file)
    await new PostcopySource(source, await connectSocket(path)).start()
    expect(await guest.qmp.execute('query-status')).toMatchObject({ running: true })
    await guest.expectGoesOn((await memoryOf(file)).tick)
  })

  test('16: memory that is not plugged in is neither saved nor sent', async () => {
    const pluggable = {
      memory: '4M,maxmem=1G',
      args: ['-object', 'memory-backend-ram,id=pluggable,size=16M', '-device', 'virtio-mem-pci,id=vmem,memdev=pluggable,requested-size=0'],
    }
    const { file, memory } = await makeSave(qemu, 'RAM image', pluggable)
    const guest = await Guest.boot(qemu, { ...pluggable, incoming: 'defer' })
    const report = await revert(file, { qmp: guest.qmp, incoming: join(guest.folder, 'incoming') })
    expect(report.pages).toBeLessThan((4 << 20) / 4096 + 200)
    await guest.expectGoesOn(memory.tick)
    expect(await guest.qmp.execute('query-migrate')).toMatchObject({ status: 'completed' })
  })

  test('17: a page of a block that was not saved is asked for: the revert fails and says so', async () => {
    const { file } = await makeSave(qemu, 'RAM image')
    await using saved = await openSaved(file)
    // the background has nothing to send before the guest asks: it could be done with the rest before that
    const slow = new SlowSource({ ...partsOf(saved), blocks: saved.blocks.filter(({ name }) => name !== 'pc.bios') }, 0)
    setTimeout(() => slow.release(), 3000)
    const guest = await Guest.boot(qemu, { incoming: 'defer' })
    const reverting = revert(slow.source, { qmp: guest.qmp, incoming: join(guest.folder, 'incoming') })
    await expect(reverting).rejects.toMatchObject({
      code: 'ERR_STREAM',
      message: expect.stringContaining('asks for RAM block pc.bios, which the saved VM does not have') as string,
    })
  })
})

/** What a source has, without the methods of its class. */
function partsOf({ machine, pageSize, head, ramSectionId, footers, earlyDevices, devices, vmDescription, blocks }: PageSource): PageSource {
  const close = (): Promise<void> => Promise.resolve()
  return { machine, pageSize, head, ramSectionId, footers, earlyDevices, devices, vmDescription, blocks, close, [Symbol.asyncDispose]: close }
}
