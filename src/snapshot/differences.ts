/** The comparison of a saved VM with a QEMU that is to go on from it, in words for people. */
import type { Qmp } from '../qmp/client.ts'
import { compareDisks, type Comparison } from './compare-disks.ts'
import { acceleratorOf, cpusOf, devicesOf, machineOf, ramBlocksOf } from './machine-facts.ts'
import type { Manifest } from './manifest.ts'

/** What a saved VM needs of a QEMU. A {@link Manifest} and a page source both tell it. */
export interface Needs extends Partial<Pick<Manifest, 'accelerator' | 'cpus' | 'devices' | 'disks' | 'qemu' | 'created' | 'memory'>> {
  readonly machine: string
  readonly ramBlocks: readonly { readonly name: string; readonly length: number }[]
}

/** Why the QEMU cannot go on from the saved VM, in words for people; empty if nothing was found. */
export async function differences(needs: Needs, qmp: Qmp): Promise<string[]> {
  return [...(await compareVm(needs, qmp)).differences]
}

/** Compares all that the saved VM tells. `memory` is where the saved memory is now: disks that moved with it are found. */
export async function compareVm(needs: Needs, qmp: Qmp, memory?: string): Promise<Comparison> {
  const found: string[] = []
  const [machine, accelerator] = await Promise.all([machineOf(qmp), acceleratorOf(qmp)])
  const sameMachine = needs.machine === '' || machine === needs.machine
  if (!sameMachine) found.push(`machine type: saved ${needs.machine}, here ${machine} (start QEMU with -M ${needs.machine})`)
  if (needs.accelerator !== undefined && needs.accelerator !== accelerator) {
    found.push(`accelerator: saved under ${needs.accelerator}, here ${accelerator} (the CPU model may not be the same)`)
  }
  found.push(...(await cpuDifferences(needs, qmp)), ...(await blockDifferences(needs, qmp)))
  // another machine has other devices anyway
  if (sameMachine) found.push(...(await deviceDifferences(needs, qmp)))
  const place = { created: needs.created ?? '', savedMemory: needs.memory?.file, memory }
  const disks = await compareDisks(needs.disks ?? [], qmp, place)
  return { differences: [...found, ...disks.differences], remarks: [...(await versionRemarks(needs, qmp)), ...disks.remarks] }
}

async function cpuDifferences({ cpus }: Needs, qmp: Qmp): Promise<string[]> {
  if (cpus === undefined) return []
  const here = await cpusOf(qmp)
  const found: string[] = []
  if (cpus.count !== here.count) found.push(`CPUs: saved ${cpus.count}, here ${here.count} (start QEMU with -smp ${cpus.count})`)
  const [saved, now] = [cpus.type, here.type].map((type) => type.replace(/(-[a-z0-9_]+)?-cpu$/, '')) as [string, string]
  if (cpus.type !== here.type) found.push(`CPU model: saved ${saved}, here ${now} (start QEMU with -cpu ${saved})`)
  return found
}

async function blockDifferences({ ramBlocks }: Needs, qmp: Qmp): Promise<string[]> {
  const found: string[] = []
  const blocks = new Map((await ramBlocksOf(qmp)).map((block) => [block.name, block.length]))
  if (blocks.size === 0) return found
  for (const { name, length } of ramBlocks) {
    const size = blocks.get(name)
    // Tables and firmware are resizable: they take the size of the saved block.
    if (size === undefined) found.push(`RAM block ${name} of ${length} bytes is missing here (a device or -m differs)`)
    else if (size !== length && !name.startsWith('/rom@')) found.push(`RAM block ${name}: saved ${length} bytes, here ${size}`)
  }
  return found
}

async function deviceDifferences({ devices }: Needs, qmp: Qmp): Promise<string[]> {
  if (devices === undefined) return []
  const here = await devicesOf(qmp)
  const [missing, more] = [without(devices, here), without(here, devices)]
  const found: string[] = []
  if (missing.length > 0) found.push(`devices of the saved VM that are not here: ${missing.join(', ')}`)
  if (more.length > 0) found.push(`devices here that the saved VM did not have: ${more.join(', ')}`)
  if (found.length > 0) found.push('start QEMU with the same -device options, in the same order or with addr=')
  return found
}

/** The items of `list` that are not in `taken`, each counted. */
function without(list: readonly string[], taken: readonly string[]): string[] {
  const left = [...taken]
  return list.filter((item) => {
    const index = left.indexOf(item)
    if (index >= 0) left.splice(index, 1)
    return index < 0
  })
}

/** Machine types are kept alike over versions, but an older QEMU need not know what a newer one saves. */
async function versionRemarks({ qemu }: Needs, qmp: Qmp): Promise<string[]> {
  if (qemu === undefined) return []
  const here = (await qmp.execute('query-version')).qemu
  const [then, now] = [qemu.qemu, here].map(({ major, minor }) => major * 1000 + minor) as [number, number]
  const words = ({ major, minor, micro }: typeof here): string => `${major}.${minor}.${micro}`
  return now < then ? [`saved by QEMU ${words(qemu.qemu)}, here ${words(here)}: an older QEMU may not know what a newer one saves`] : []
}
