/**
 * Where RAM blocks are in guest physical memory. Owns the memory maps of the machine types that are known, and the rule
 * that a saved VM fits one of them exactly or is refused: memory at a wrong address, or left out, is worse than none.
 */
import { Qcow2Error, UnsupportedError } from '../core/errors.ts'
import type { MemoryPlacement } from './memory-placement.ts'
import type { RamBlock } from './records.ts'

/** A run of guest physical memory and where its content is. */
export interface PhysicalRange {
  /** Name of the RAM block. */
  readonly block: string
  /** First byte within the block. */
  readonly offset: number
  /** Bytes. */
  readonly length: number
  /** Guest physical address. */
  readonly address: number
}

/** What the addresses follow from; a `VmState` is one. */
export interface PhysicalSource {
  /** Machine type; undefined for machine types up to 2.3, which do not write it. */
  readonly machine: string | undefined
  readonly ram: { readonly blocks: readonly RamBlock[] }
  /** What the devices tell; without it no PC's addresses are known. */
  readonly placement?: MemoryPlacement | undefined
}

/** Options of {@link physicalRanges} and of the exports that use it. */
export interface PhysicalMapOptions {
  /**
   * Where guest memory is, for VMs whose addresses are not known or not as the machine type has them. Only what it names
   * counts. Default: as the machine type has it.
   */
  readonly map?: readonly PhysicalRange[] | undefined
}

const MiB = 1 << 20
const GiB = 1 << 30
const fourGiB = 4 * GiB
/** From here on an AMD guest may have its memory above 4 GiB elsewhere: the last 12 GiB below 1 TiB are not for memory, nor is the PCI hole before them. */
const pcMemoryEnd = 980 * GiB
/** What the CMOS counts in, and where its three bytes begin again. */
const cmosUnit = 64 * 1024
const cmosWrap = 2 ** 24 * cmosUnit

/** Memory of devices and ROM that firmware copies or maps as it likes: not part of the memory map. */
const deviceMemory = /^\/rom@|^pc\.rom$|^isa-bios$|(^|\/)(vga\.(vram|rom)|qxl\.(vgavram|vram|rom)|vmsvga\.fifo|bochs-display-vram|tpm-ppi)$|(^|\/)[^/]+\.rom$/

/**
 * Where the RAM blocks are in guest physical memory, in ascending order: main memory, plugged-in memory of virtio-mem, and
 * firmware. Known are the PCs (`pc`, `q35`, `microvm`, `isapc`) and `virt` of Arm and of RISC-V. Memory of devices (video
 * memory, option ROMs) is left out, as are the copies that PCs show below 1 MiB.
 * @param options `map`: checked and taken instead
 * @throws UnsupportedError if the VM does not fit a known machine exactly, with the reason and what to do
 * @throws Qcow2Error `ERR_NOT_FOUND` or RangeError for a `map` that does not fit the blocks
 */
export function physicalRanges(vm: PhysicalSource, options: PhysicalMapOptions = {}): PhysicalRange[] {
  if (options.map !== undefined) return checkedMap(vm, options.map)
  const ranges = machineRanges(vm).sort((a, b) => a.address - b.address)
  const clash = overlapOf(ranges)
  if (clash !== undefined) throw unknown(vm, `RAM blocks '${clash[0].block}' and '${clash[1].block}' would overlap at address 0x${clash[1].address.toString(16)}`)
  return ranges
}

function checkedMap(vm: PhysicalSource, map: readonly PhysicalRange[]): PhysicalRange[] {
  const blocks = new Map(vm.ram.blocks.map((block) => [block.name, block]))
  for (const { block: name, offset, length, address } of map) {
    const block = blocks.get(name)
    if (block === undefined) throw new Qcow2Error('ERR_NOT_FOUND', `no RAM block '${name}'; there are ${namesOf(vm.ram.blocks)}`)
    const isCount = [offset, length, address, address + length].every((value) => Number.isSafeInteger(value) && value >= 0)
    if (!isCount || length === 0 || offset + length > block.length) {
      throw new RangeError(`map: ${length} bytes from byte ${offset} of RAM block '${name}', which has ${block.length}, at address ${address}`)
    }
  }
  const ranges = [...map].sort((a, b) => a.address - b.address)
  const clash = overlapOf(ranges)
  if (clash !== undefined) throw new RangeError(`map: '${clash[0].block}' and '${clash[1].block}' overlap at address 0x${clash[1].address.toString(16)}`)
  return ranges
}

function overlapOf(sorted: readonly PhysicalRange[]): [PhysicalRange, PhysicalRange] | undefined {
  for (let i = 1; i < sorted.length; i++) {
    const [before, range] = [sorted[i - 1]!, sorted[i]!]
    if (before.address + before.length > range.address) return [before, range]
  }
  return undefined
}

function machineRanges(vm: PhysicalSource): PhysicalRange[] {
  const { machine, ram: { blocks } } = vm
  const has = (name: string): boolean => blocks.some((block) => block.name === name)
  if (machine === undefined ? has('pc.ram') && vm.placement?.pc !== undefined : /^(pc(-.*)?|microvm|isapc)$/.test(machine)) return pcRanges(vm)
  if (machine?.startsWith('virt-') === true && (has('mach-virt.ram') || /^virt-\d/.test(machine))) {
    return virtRanges(vm, 'mach-virt.ram', GiB, [['virt.flash0', 0], ['virt.flash1', 64 * MiB]])
  }
  if (machine === 'virt' && (has('riscv_virt_board.ram') || has('riscv_virt_board.mrom'))) {
    return virtRanges(vm, 'riscv_virt_board.ram', 2 * GiB, [['riscv_virt_board.mrom', 0x1000], ['virt.flash0', 512 * MiB], ['virt.flash1', 544 * MiB]])
  }
  throw unknown(vm, machine === undefined ? 'the stream does not name the machine type' : `machine type '${machine}' is not among those whose memory map is known`)
}

/** Main memory from 0, with a hole below 4 GiB whose size the CMOS tells; firmware ends at 4 GiB. */
function pcRanges(vm: PhysicalSource): PhysicalRange[] {
  const firmware: PhysicalRange[] = []
  const rest: RamBlock[] = []
  let top = fourGiB
  for (const name of ['pc.bios', 'system.flash0', 'system.flash1']) {
    const block = vm.ram.blocks.find((each) => each.name === name)
    if (block === undefined) continue
    top -= block.length
    firmware.push({ block: name, offset: 0, length: block.length, address: top })
  }
  for (const block of vm.ram.blocks) if (!firmware.some((range) => range.block === block.name)) rest.push(block)
  const { main, plugged } = sortOut(vm, rest)
  const sizes = vm.placement?.pc
  if (sizes === undefined) throw unknown(vm, 'the stream has no readable state of the clock (mc146818rtc), whose CMOS tells how much memory is below 4 GiB')
  const ordered = mainBlocks(vm, main, (total) => fitsCmos(total, sizes))
  const total = ordered.reduce((sum, { length }) => sum + length, 0)
  if (fourGiB + total - sizes.below >= pcMemoryEnd) throw unknown(vm, 'with so much memory its place depends on the host')
  return [...split(ordered, sizes.below), ...plugged, ...firmware]
}

/** The CMOS counts in units of 64 KiB, with 24 bits above 4 GiB. */
function fitsCmos(total: number, { below, above }: { below: number; above: number }): boolean {
  if (total <= below + cmosUnit - 1 && above === 0) return total >= below
  const rest = (total - below - above) % cmosWrap
  return total > below && above > 0 && rest >= 0 && rest < cmosUnit
}

/** The blocks, one after the other, with what does not fit below the hole from 4 GiB on. */
function split(blocks: readonly RamBlock[], below: number): PhysicalRange[] {
  const ranges: PhysicalRange[] = []
  const total = blocks.reduce((sum, { length }) => sum + length, 0)
  // less than one unit more than the CMOS tells is its rounding, not memory above the hole
  const low = total < below + cmosUnit ? total : below
  let position = 0
  for (const { name: block, length } of blocks) {
    const under = Math.max(0, Math.min(length, low - position))
    if (under > 0) ranges.push({ block, offset: 0, length: under, address: position })
    if (under < length) ranges.push({ block, offset: under, length: length - under, address: fourGiB + position + under - low })
    position += length
  }
  return ranges
}

/** All of main memory in one piece from `base` on, flash and ROM at fixed places. */
function virtRanges(vm: PhysicalSource, usual: string, base: number, fixed: readonly (readonly [name: string, address: number])[]): PhysicalRange[] {
  const places = new Map(fixed)
  const ranges: PhysicalRange[] = []
  const rest: RamBlock[] = []
  for (const block of vm.ram.blocks) {
    const address = places.get(block.name)
    if (address === undefined) rest.push(block)
    else ranges.push({ block: block.name, offset: 0, length: block.length, address })
  }
  const { main, plugged } = sortOut(vm, rest)
  const [only, other] = main
  if (only === undefined) throw unknown(vm, `there is no RAM block '${usual}'`)
  if (other !== undefined) throw unknown(vm, `memory is in several RAM blocks (${namesOf(main)}), whose order or addresses the stream does not tell`)
  if (only.gpa !== undefined && only.gpa !== base) throw unknown(vm, `RAM block '${only.name}' is at address 0x${only.gpa.toString(16)}, not at 0x${base.toString(16)}`)
  return [{ block: only.name, offset: 0, length: only.length, address: base }, ...plugged, ...ranges]
}

/** Leaves out the memory of devices, and finds the blocks of virtio-mem by their path and length. */
function sortOut(vm: PhysicalSource, blocks: readonly RamBlock[]): { main: RamBlock[]; plugged: PhysicalRange[] } {
  const main: RamBlock[] = []
  const plugged: PhysicalRange[] = []
  const regions = vm.placement?.virtioMem ?? []
  for (const block of blocks) {
    if (deviceMemory.test(block.name)) continue
    const path = block.name.slice(0, block.name.lastIndexOf('/') + 1)
    const [region, other] = path === '' ? [] : regions.filter((each) => each.path === path && each.length === block.length)
    if (region !== undefined && other === undefined) plugged.push({ block: block.name, offset: 0, length: block.length, address: region.address })
    else main.push(block)
  }
  return { main, plugged }
}

/** The blocks of main memory in their order: one that has all of it, or several whose places within it the stream tells. */
function mainBlocks(vm: PhysicalSource, blocks: readonly RamBlock[], fits: (total: number) => boolean): RamBlock[] {
  const [only, other] = blocks
  if (only === undefined) throw unknown(vm, 'there is no RAM block of main memory')
  const total = blocks.reduce((sum, { length }) => sum + length, 0)
  if (other === undefined && fits(total)) return [only]
  if (other !== undefined && fits(total) && blocks.every(({ gpa }) => gpa !== undefined)) {
    const ordered = [...blocks].sort((a, b) => a.gpa! - b.gpa!)
    let next = 0
    const gapless = ordered.every(({ gpa, length }) => gpa === next && (next += length) > 0)
    if (gapless) return ordered
  }
  if (fits(total)) throw unknown(vm, `memory is in several RAM blocks (${namesOf(blocks)}; NUMA nodes?), whose order the stream does not tell`)
  const more = blocks.filter(({ length }) => !fits(length))
  if (more.length < blocks.length) throw unknown(vm, `besides main memory there is ${namesOf(more.length > 0 ? more : blocks)} (a DIMM?), whose address the stream does not tell`)
  throw unknown(vm, `the RAM blocks ${namesOf(blocks)} have ${total} bytes, which is not the size of memory that the firmware was told`)
}

/** The first names, with sizes. */
function namesOf(blocks: readonly RamBlock[]): string {
  const names = blocks.slice(0, 5).map(({ name, length }) => `'${name}' of ${length} bytes`)
  return blocks.length > 5 ? `${names.join(', ')} and ${blocks.length - 5} more` : names.join(', ') || 'none'
}

function unknown(vm: PhysicalSource, reason: string): UnsupportedError {
  const what = vm.machine === undefined ? 'this VM' : `this VM (${vm.machine})`
  const example = `${vm.ram.blocks[0]?.name ?? 'pc.ram'}:0-3G@0`
  return new UnsupportedError(`the guest physical addresses of ${what} are not certain: ${reason}; give them as a map (option map; --map '${example},…')`, ['guest physical addresses'])
}
