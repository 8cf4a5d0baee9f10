/** The comparison of a saved VM with a QEMU that is to go on from it, in words for people. */
import type { Qmp } from '../qmp/client.ts'
import { acceleratorOf, machineOf, ramBlocksOf } from './machine-facts.ts'

/** What a saved VM needs of a QEMU. A {@link Manifest} and a page source both tell it. */
export interface Needs {
  readonly machine: string
  readonly ramBlocks: readonly { readonly name: string; readonly length: number }[]
  readonly accelerator?: 'kvm' | 'tcg'
}

/** Why the QEMU cannot go on from the saved VM, in words for people; empty if nothing was found. */
export async function differences(needs: Needs, qmp: Qmp): Promise<string[]> {
  const found: string[] = []
  const [machine, accelerator, here] = await Promise.all([machineOf(qmp), acceleratorOf(qmp), ramBlocksOf(qmp)])
  if (needs.machine !== '' && machine !== needs.machine) {
    found.push(`machine type: saved ${needs.machine}, here ${machine} (start QEMU with -M ${needs.machine})`)
  }
  if (needs.accelerator !== undefined && needs.accelerator !== accelerator) {
    found.push(`accelerator: saved under ${needs.accelerator}, here ${accelerator} (the CPU model may not be the same)`)
  }
  const blocks = new Map(here.map((block) => [block.name, block.length]))
  if (blocks.size === 0) return found
  for (const { name, length } of needs.ramBlocks) {
    const size = blocks.get(name)
    // Tables and firmware are resizable: they take the size of the saved block.
    if (size === undefined) found.push(`RAM block ${name} of ${length} bytes is missing here (a device or -m differs)`)
    else if (size !== length && !name.startsWith('/rom@')) found.push(`RAM block ${name}: saved ${length} bytes, here ${size}`)
  }
  return found
}
