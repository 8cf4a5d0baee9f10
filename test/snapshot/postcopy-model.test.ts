/**
 * The postcopy source against a strict model of a destination: any memory, any requests, any host page size, broken
 * connections: every page once, none missing, everything in the order a real QEMU needs.
 */
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { extent, type Extent } from '../../src/block/device.ts'
import { ReadOnlyDevice } from '../../src/block/read-only.ts'
import type { FaultOrder } from '../../src/snapshot/fault-order.ts'
import { FaultRecorder, faultsOf, parseFaultOrder } from '../../src/snapshot/fault-order.ts'
import type { PageSource } from '../../src/snapshot/page-source.ts'
import { PostcopySource } from '../../src/snapshot/postcopy-source.ts'
import { encodeReturnPath, type ReturnPathMessage } from '../../src/migration/return-path.ts'
import type { DuplexStream } from '../../src/qmp/duplex.ts'
import { duplexPair } from '../qmp/monitor.ts'
import { FakeDestination } from '../support/fake-destination.ts'

const pageSize = 4096
const long = process.env['QCOW2_LONG'] === '1'

/** Pages by what they hold: 0 zero and known, 1 zero but stored, more: content. Reads may take a while. */
class Content extends ReadOnlyDevice {
  readonly pages: readonly number[]
  reads = 0

  constructor(pages: readonly number[]) {
    super()
    this.pages = pages
  }

  get size(): number {
    return this.pages.length * pageSize
  }

  page(index: number): Uint8Array {
    const kind = this.pages[index]!
    const bytes = new Uint8Array(pageSize)
    if (kind > 1) bytes.fill(kind, kind, pageSize - kind).set([index & 255, index >> 8], 100)
    return bytes
  }

  protected async onRead(offset: number, target: Uint8Array): Promise<void> {
    this.reads++
    if (this.reads % 3 === 0) await new Promise((resolve) => setImmediate(resolve))
    for (let at = 0; at < target.length; at += pageSize) target.set(this.page((offset + at) / pageSize), at)
  }

  // eslint-disable-next-line @typescript-eslint/require-await
  protected override async *onMap(): AsyncGenerator<Extent, void, undefined> {
    for (const [index, kind] of this.pages.entries()) {
      yield extent({ start: index * pageSize, length: pageSize, depth: 0, present: kind > 0, zero: kind === 0, data: kind > 0, compressed: false })
    }
  }
}

function sourceOf(blocks: readonly (readonly number[])[]): PageSource {
  return {
    machine: 'pc',
    pageSize,
    head: Uint8Array.from(Buffer.from('5145564d00000003' + '0700000002' + '7063', 'hex')),
    ramSectionId: 2,
    footers: true,
    blocks: blocks.map((pages, index) => ({ name: `ram${index}`, length: pages.length * pageSize, content: new Content(pages) })),
    earlyDevices: new Uint8Array(0),
    devices: Uint8Array.from({ length: 300 }, (_, index) => index & 255),
    vmDescription: new Uint8Array(0),
    close: () => Promise.resolve(),
    [Symbol.asyncDispose]: () => Promise.resolve(),
  }
}

function contentOf(device: unknown): Content {
  if (device instanceof Content) return device
  throw new TypeError('not made by this test')
}

/** Everything arrived that is not zero. */
function expectComplete(source: PageSource, destination: FakeDestination): void {
  expect(destination.problems).toEqual([])
  for (const { name, content } of source.blocks) {
    const memory = destination.memory.get(name)!
    const pages = contentOf(content)
    pages.pages.forEach((_kind, index) => {
      const expected = pages.page(index)
      expect(Buffer.compare(memory.subarray(index * pageSize, (index + 1) * pageSize), expected), `${name}:${index}`).toBe(0)
    })
  }
}

const arbitraryBlocks = (unit: number): fc.Arbitrary<number[][]> =>
  fc.array(
    fc.array(fc.constantFrom(0, 0, 1, 2, 3, 200), { minLength: 1, maxLength: 80 }).map((pages) => {
      while (pages.length % unit !== 0) pages.push(0)
      return pages
    }),
    { minLength: 1, maxLength: 3 },
  )

const scenario = fc.constantFrom(1, 1, 4, 32).chain((unit) =>
  fc.record({
    unit: fc.constant(unit),
    blocks: arbitraryBlocks(unit),
    requests: fc.array(fc.tuple(fc.nat(2), fc.nat(200)), { maxLength: 30 }),
    early: fc.boolean(),
    clusterSize: fc.constantFrom(4096, 16_384, 65_536),
    window: fc.constantFrom(1, 65_536, 131_072),
    hot: fc.array(fc.tuple(fc.nat(3), fc.nat(100)), { maxLength: 10 }),
  }),
)

/** A connection whose peer stops reading for a while. */
class HeldStream implements DuplexStream {
  readonly #stream: DuplexStream
  #held: (() => void)[] | undefined
  /** Bytes written while nothing is read. */
  bytes = 0

  constructor(stream: DuplexStream) {
    this.#stream = stream
  }

  hold(): void {
    this.#held ??= []
  }

  release(): void {
    const held = this.#held!
    this.#held = undefined
    for (const write of held) write()
  }

  write(bytes: Uint8Array | string, done?: (error?: Error | null) => void): boolean {
    if (this.#held === undefined) return this.#stream.write(bytes, done)
    this.bytes += bytes.length
    this.#held.push(() => void this.#stream.write(bytes, done))
    return false
  }

  on(event: string, listener: (...values: never[]) => void): unknown {
    return this.#stream.on(event, listener)
  }

  removeListener(event: string, listener: (...values: never[]) => void): unknown {
    return this.#stream.removeListener(event, listener)
  }

  end(): unknown {
    return this.#stream.end()
  }

  destroy(error?: Error): unknown {
    return this.#stream.destroy(error)
  }

  pause(): unknown {
    return this.#stream.pause()
  }

  resume(): unknown {
    return this.#stream.resume()
  }

  get destroyed(): boolean {
    return this.#stream.destroyed
  }
}

function requestsOf(blocks: readonly (readonly number[])[], requests: readonly (readonly [number, number])[]): { block: string; page: number }[] {
  return requests.map(([block, page]) => {
    const index = block % blocks.length
    return { block: `ram${index}`, page: page % blocks[index]!.length }
  })
}

function orderOf(hot: readonly (readonly [number, number])[], clusterSize: number): FaultOrder {
  return { version: 1, clusterSize, blocks: ['ram0', 'ram1', 'ram2', 'gone'], faults: hot.flat() }
}

describe('postcopy source', () => {
  test('any memory reaches any destination whole, each page once, in the right order', async () => {
    await fc.assert(
      fc.asyncProperty(scenario, async ({ unit, blocks, requests, early, clusterSize, window, hot }) => {
        const source = sourceOf(blocks)
        const hostPageSize = unit * pageSize
        const destination = new FakeDestination(source, { requests: requestsOf(blocks, requests), early, hostPageSize })
        const hostPageSizes = unit === 1 ? undefined : Object.fromEntries(source.blocks.map(({ name }) => [name, hostPageSize]))
        const report = await new PostcopySource(source, destination.stream, {
          hostPageSizes,
          clusterSize,
          window,
          faultOrder: orderOf(hot, clusterSize),
        }).start()
        expectComplete(source, destination)
        expect(destination.order.slice(0, 3)).toEqual(['openReturnPath', 'postcopyAdvise', 'start'])
        expect(destination.order.slice(-2)).toEqual(['end', 'eof'])
        expect(report.pages).toBe(blocks.flat().filter((kind) => kind > 1).length)
      }),
      { numRuns: long ? 2000 : 60 },
    )
  })

  test('after any number of broken connections, a source that knows only the saved VM finishes', async () => {
    await fc.assert(
      fc.asyncProperty(scenario, fc.array(fc.integer({ min: 1, max: 40 }), { minLength: 1, maxLength: 4 }), async (plan, deaths) => {
        const { blocks, clusterSize } = { ...plan, blocks: plan.blocks.map((pages) => pages.map((kind) => kind + 1)) }
        const source = sourceOf(blocks)
        let destination = new FakeDestination(source, { dieAfter: deaths[0]!, requests: requestsOf(blocks, plan.requests) })
        let outcome = await new PostcopySource(source, destination.stream, { clusterSize }).start().catch((error: unknown) => error)
        for (const [index] of deaths.entries()) {
          if (!(outcome instanceof Error)) break
          expect(outcome).toMatchObject({ code: 'ERR_STREAM', name: 'RevertError' })
          const dieAfter = deaths[index + 1]
          destination = new FakeDestination(source, {
            before: destination,
            requests: requestsOf(blocks, plan.requests),
            ...(dieAfter !== undefined && { dieAfter }),
          })
          outcome = await new PostcopySource(source, destination.stream, { clusterSize }).recover().catch((error: unknown) => error)
        }
        expect(outcome).toMatchObject({ requests: expect.any(Number) as number })
        expectComplete(source, destination)
      }),
      { numRuns: long ? 1000 : 40 },
    )
  })

  test('a requested page overtakes the background', async () => {
    const pages = Array.from({ length: 4000 }, () => 5)
    const source = sourceOf([pages])
    const destination = new FakeDestination(source, { requests: [{ block: 'ram0', page: 3990 }] })
    await new PostcopySource(source, destination.stream, {}).start()
    expectComplete(source, destination)
    expect(destination.arrivals).toEqual(['ram0:3990'])
  })

  test('a destination that asks for everything and reads nothing holds up a bounded part of it', async () => {
    const pages = Array.from({ length: 8192 }, () => 5)
    const source = sourceOf([pages])
    const requests = pages.map((_kind, page) => ({ block: 'ram0', page })).reverse()
    const destination = new FakeDestination(source, { requests, atOnce: true })
    const held = new HeldStream(destination.stream)
    let began = false
    const onProgress = ({ phase }: { phase: string }): void => {
      if (phase === 'running' && !began) held.hold()
      began ||= phase === 'running'
    }
    const reverting = new PostcopySource(source, held, { onProgress }).start()
    // whatever does not wait for the destination has long been done then
    for (let turn = 0; turn < 2000; turn++) await new Promise((resolve) => setImmediate(resolve))
    expect(held.bytes).toBeGreaterThan(0)
    expect(held.bytes).toBeLessThan(2 << 20)
    held.release()
    await reverting
    expectComplete(source, destination)
  })

  test('the connection stays open until the destination says that it is through', async () => {
    const source = sourceOf([[2, 3, 0, 4]])
    const destination = new FakeDestination(source, { shutAfter: 100 })
    await new PostcopySource(source, destination.stream, {}).start()
    expectComplete(source, destination)
  })

  test('no work for each page before the guest runs', async () => {
    const source = sourceOf([Array.from({ length: 50_000 }, () => 7)])
    const [near, far] = duplexPair()
    const content = contentOf(source.blocks[0]!.content)
    let readsBefore = -1
    far.on('data', () => {
      readsBefore = readsBefore < 0 ? content.reads : readsBefore
    })
    const abort = new AbortController()
    // a window for one cluster, however long it takes
    const running = new PostcopySource(source, near, { signal: abort.signal, window: 1 }).start()
    await expect.poll(() => readsBefore).toBeGreaterThanOrEqual(0)
    expect(readsBefore).toBeLessThanOrEqual(2)
    abort.abort(new Error('enough'))
    await expect(running).rejects.toThrow('enough')
  })
})

describe('what a destination may do wrong', () => {
  const speak = (messages: readonly ReturnPathMessage[] | 'close', timeout = 30_000): Promise<unknown> => {
    const [near, far] = duplexPair()
    far.on('data', () => undefined)
    far.on('error', () => undefined)
    setImmediate(() => {
      if (messages === 'close') far.destroy()
      else for (const message of messages) far.write(encodeReturnPath(message))
    })
    return new PostcopySource(sourceOf([[2, 3, 4]]), near, { timeout }).start()
  }

  test('an unknown RAM block is another machine', async () => {
    await expect(speak([{ kind: 'request-pages', block: 'vga', offset: 0, length: 4096 }])).rejects.toThrow(
      /the destination asks for RAM block vga, which the saved VM does not have \(ram0\)/,
    )
  })

  test.each([
    [1, 4096],
    [0, 0],
    [0, 100],
    [8192, 8192],
    [1 << 30, 4096],
  ])('a request at %i for %i bytes', async (offset, length) => {
    await expect(speak([{ kind: 'request-pages', block: 'ram0', offset, length }])).rejects.toThrow(/not whole pages of 4096 bytes within 12288/)
  })

  test('giving up', async () => {
    await expect(speak([{ kind: 'shut', value: 1 }])).rejects.toThrow(/revert failed while loading: the destination gave up \(SHUT 1\)/)
  })

  test('closing', async () => {
    await expect(speak('close')).rejects.toMatchObject({ code: 'ERR_STREAM', phase: 'loading', recoverable: false })
  })

  test('silence', async () => {
    const silent = speak([{ kind: 'pong', value: 1 }], 50)
    await expect(silent).rejects.toThrow(/revert failed while loading: the destination does not finish loading device state: no word/)
  })

  test('a connection that breaks while the guest runs can be recovered', async () => {
    const source = sourceOf([Array.from({ length: 3000 }, () => 9)])
    const destination = new FakeDestination(source, { dieAfter: 2000 })
    const failed = await new PostcopySource(source, destination.stream, {}).start().catch((error: unknown) => error)
    expect(failed).toMatchObject({ recoverable: true, phase: 'running', message: expect.stringContaining('recover it with the same source') as string })
  })
})

describe('fault order', () => {
  test('a cluster counts once, in the order of its first fault, behind what was known', () => {
    const recorder = new FaultRecorder(65_536, { version: 1, clusterSize: 65_536, blocks: ['a'], faults: [0, 5] })
    for (const [block, offset] of [['b', 70_000], ['a', 0], ['b', 65_536], ['a', 5 * 65_536 + 1]] as const) recorder.add(block, offset)
    expect([...faultsOf(recorder.order)]).toEqual([
      { block: 'a', offset: 5 * 65_536 },
      { block: 'b', offset: 65_536 },
      { block: 'a', offset: 0 },
    ])
  })

  test.each(['', '{}', '{"version":2}', '{"version":1,"clusterSize":3}', '{"version":1,"clusterSize":4096,"blocks":[1]}', '{"version":1,"clusterSize":4096,"blocks":[],"faults":[1]}', 'null'])(
    '%s is refused',
    (text) => {
      expect(() => parseFaultOrder(text)).toThrow(/fault order/)
    },
  )
})
