/** What a request costs in the driver core itself: on devices without a medium there is nothing else. */
import { execFileSync } from 'node:child_process'
import { NullDevice, pad, slice, allocateAligned, type BlockDevice } from '../../src/block.ts'
import { FilterDevice } from '../../src/block/filter.ts'
import { measure, outputOf, type Measured, type Variant } from '../harness.ts'
import type { Scenario, ScenarioContext, ScenarioResult } from '../scenario.ts'

const requestSize = 4096
const depth = 16
const size = 2 ** 30

/** Keeps `depth` reads in flight until `count` are done, as `qemu-img bench` does. */
async function readInTurn(device: BlockDevice, count: number): Promise<void> {
  let left = count
  let offset = 0
  const worker = async (): Promise<void> => {
    const target = allocateAligned(requestSize)
    while (left-- > 0) {
      await device.readInto(offset, target)
      offset = (offset + requestSize) % size
    }
  }
  await Promise.all(Array.from({ length: depth }, worker))
}

/** Passes everything: the cost of a layer. */
class Layer extends FilterDevice {}

function ours(id: string, title: string, count: number, device: () => BlockDevice): Variant {
  return {
    id,
    title,
    run: async () => {
      await readInTurn(device(), count)
      return undefined
    },
  }
}

function qemuImg(count: number): Variant {
  const image = `driver=null-co,size=${size},read-zeroes=on`
  const args = ['bench', '--image-opts', '-c', String(count), '-d', String(depth), '-s', String(requestSize), image]
  const run = (): Measured => {
    const printed = execFileSync('qemu-img', args, { encoding: 'utf8' })
    return { seconds: Number(/completed in ([\d.]+) seconds/.exec(printed)?.[1]) }
  }
  return { id: 'qemu-img', title: 'qemu-img bench, null-co', run }
}

async function run(context: ScenarioContext): Promise<ScenarioResult> {
  const count = context.quick ? 20_000 : 1_000_000
  const hasQemu = outputOf('qemu-img', ['--version']) !== undefined
  const group = await measure(
    {
      id: 'driver-overhead',
      title: `${count.toLocaleString('en')} reads of 4 KiB at depth ${depth}, no medium`,
      note: `rates are of bytes: 8192 MB/s are 2 million requests a second`,
      bytes: count * requestSize,
      variants: [
        ours('null', 'null device', count, () => new NullDevice(size)),
        ours('filters', 'null device under three filters', count, () => slice(new Layer(new Layer(pad(new NullDevice(size)))), 0)),
        ...(hasQemu ? [qemuImg(count)] : []),
      ],
      ratios: hasQemu ? [{ fast: 'null', slow: 'qemu-img', goal: 2.5 }, { fast: 'filters', slow: 'qemu-img' }] : [],
    },
    context,
  )
  return { groups: [group], figures: [], notes: hasQemu ? [] : ['qemu-img is not installed: nothing to compare with.'] }
}

export const scenario: Scenario = {
  name: 'driver-overhead',
  title: 'Requests a second through the driver core',
  about:
    'Sixteen readers ask a device without a medium for 4 KiB at a time: what remains is the cost of checks, promises and layers. ' +
    'Beside it qemu-img bench on its null-co driver, which like ours clears the buffer; its own clock is taken, without the start of the process.',
  run,
}
