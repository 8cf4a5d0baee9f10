/** The order of faults beside a saved memory only hints: whatever it is, and whether it can be written, a revert goes through. */
import { execFileSync } from 'node:child_process'
import { existsSync, mkdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { open } from 'node:fs/promises'
import { dirname, join } from 'node:path'
import { expect, test } from 'vitest'
import { capture as store } from '../../src/snapshot/capture.ts'
import { fittingOrder, parseFaultOrder } from '../../src/snapshot/fault-order.ts'
import { openSaved } from '../../src/snapshot/open-saved.ts'
import { RamImageWriter } from '../../src/snapshot/ram-image-writer.ts'
import { revertFile } from '../../src/snapshot/revert-file.ts'
import { revert, type RevertReport } from '../../src/snapshot/revert.ts'
import { faultOrderPath } from '../../src/snapshot/saved-names.ts'
import { capture } from '../migration/captures.ts'
import { FakeDestination } from '../support/fake-destination.ts'
import { tempFolder } from '../support/temp.ts'

const pageSize = 4096
const requests = [70, 3, 400].map((page) => ({ block: 'pc.ram', page }))

async function ramImage(): Promise<string> {
  const file = join(tempFolder(), 'warm.qcow2')
  await store(capture('qemu100-bgsnap.mig'), RamImageWriter.to(file))
  return file
}

/** Reverts into a strict destination and compares its memory with what was saved. */
async function expectReverts(file: string, how: (stream: FakeDestination['stream']) => Promise<RevertReport> = (incoming) => revertFile(file, { incoming, state: 'running' })): Promise<RevertReport> {
  await using source = await openSaved(file)
  const destination = new FakeDestination(source, { requests })
  const report = await how(destination.stream)
  expect(destination.problems).toEqual([])
  for (const { name, length, content } of source.blocks) {
    expect(Buffer.compare(destination.memory.get(name)!, await content.read(0, length)), name).toBe(0)
  }
  return report
}

test('eight reverts at once from one saved VM', async () => {
  const file = await ramImage()
  for (let round = 0; round < 3; round++) {
    const reports = await Promise.all(Array.from({ length: 8 }, () => expectReverts(file)))
    expect(reports.flatMap(({ warnings }) => warnings)).toEqual([])
    expect(parseFaultOrder(readFileSync(faultOrderPath(file), 'utf8')).faults.length).toBeGreaterThan(0)
  }
})

const order = { version: 1, clusterSize: 65_536, blocks: ['pc.ram'], faults: [0, 1, 0, 2] }

test.each<[string, string]>([
  ['nothing', ''],
  ['cut', JSON.stringify(order).slice(0, 30)],
  ['null', 'null'],
  ['a list', '[]'],
  ['bytes', '\u0000\uffff\u0000'],
  ...Object.entries({
    'of another version': { version: 2 },
    'clusters of one byte': { clusterSize: 1 },
    'clusters of 2^52 bytes': { clusterSize: 2 ** 52 },
    'clusters of 3 bytes': { clusterSize: 3 },
    'no cluster size': { clusterSize: null },
    'a block that is no name': { blocks: [null] },
    'no faults': { faults: 'all' },
    'half a pair': { faults: [0] },
    'a negative fault': { faults: [0, -1] },
    'a fault beyond all numbers': { faults: [0, 1e300] },
  }).map(([name, edit]): [string, string] => [name, JSON.stringify({ ...order, ...edit })]),
])('an order that cannot be read is a warning and is written anew: %s', async (_name, text) => {
  const file = await ramImage()
  writeFileSync(faultOrderPath(file), text)
  expect((await expectReverts(file)).warnings).toEqual([expect.stringContaining('faults.json')])
  expect((await expectReverts(file)).warnings).toEqual([])
})

test.each<[string, object]>([
  ['of another VM', { blocks: ['mach-virt.ram'] }],
  ['of a larger VM', { faults: [0, 2 ** 40, 0, 5] }],
  ['with blocks that it does not list', { faults: [7, 0] }],
  ['with a cluster for each page', { clusterSize: 4096 }],
  ['with the largest clusters', { clusterSize: 2 << 20 }],
  ['with clusters smaller than a page', { clusterSize: 512 }],
])('an order %s goes as far as it fits', async (_name, edit) => {
  const file = await ramImage()
  writeFileSync(faultOrderPath(file), JSON.stringify({ ...order, ...edit }))
  const report = await expectReverts(file)
  expect(report.warnings).toEqual([])
  const { blocks, faults, clusterSize } = report.faultOrder
  expect(blocks.length).toBeLessThanOrEqual(1)
  for (let at = 1; at < faults.length; at += 2) expect(faults[at]! * clusterSize).toBeLessThan(4 << 20)
})

test('an order given as a value is taken as such', async () => {
  const file = await ramImage()
  for (const faultOrder of [{ ...order, clusterSize: 2 ** 52 }, { ...order, clusterSize: 1 }, { ...order, faults: [0, 2 ** 50] }, {} as typeof order]) {
    const report = await expectReverts(file, (incoming) => revert(file, { incoming, state: 'running', faultOrder: faultOrder as never }))
    expect(report.requests).toBeGreaterThan(0)
  }
  expect(fittingOrder(order as never, pageSize, [{ name: 'pc.ram', length: 65_537 }])).toEqual({ ...order, faults: [0, 1] })
  expect(fittingOrder(order as never, 131_072, [{ name: 'pc.ram', length: 1 << 20 }])).toBeUndefined()
})

test('an order that is no file', async () => {
  const file = await ramImage()
  mkdirSync(join(faultOrderPath(file), 'full'), { recursive: true })
  expect((await expectReverts(file)).warnings).toHaveLength(2)
  rmSync(faultOrderPath(file), { recursive: true })
  execFileSync('mkfifo', [faultOrderPath(file)])
  expect((await expectReverts(file)).warnings).toEqual([expect.stringMatching(/faults.json.*pipe/), expect.stringMatching(/written.*pipe/)])
})

test('a folder that takes no file: the saved VM is only read', async () => {
  const file = await ramImage()
  const handle = await open(file)
  try {
    const path = `/proc/self/fd/${handle.fd}`
    if (existsSync(path)) expect((await expectReverts(path)).requests).toBeGreaterThan(0)
  } finally {
    await handle.close()
  }
  const report = await expectReverts(file, async (incoming) => {
    const reverting = revertFile(file, { incoming, state: 'running', onRunning: () => rmSync(dirname(file), { recursive: true }) })
    return reverting
  }).catch((error: unknown) => error)
  expect(report).toMatchObject({ warnings: [expect.stringContaining('could not be written')] })
})
