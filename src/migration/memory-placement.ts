/**
 * What the device sections of a stream tell about where guest memory is. Owns the few fields that do; which machine has
 * which memory map is `physical-ranges.ts`'s business.
 *
 * A PC's firmware is told the size of memory in the CMOS of the clock, so the stream has it: below and above 4 GiB apart,
 * whatever `max-ram-below-4g` was. A virtio-mem device writes its address; a DIMM writes nothing.
 */
import type { BlockDevice, CallOptions } from '../block/device.ts'
import { viewOf } from '../bytes/view.ts'

/** Where the devices say that memory is. */
export interface MemoryPlacement {
  /** Bytes of a PC's memory below 4 GiB and from 4 GiB on, as its CMOS has them, without memory that was plugged in. */
  readonly pc?: { readonly below: number; readonly above: number } | undefined
  /** The regions of virtio-mem devices; several of one path where QEMU before 8.1 leaves it open which of them counts. */
  readonly virtioMem: readonly VirtioMemRegion[]
}

/** The memory of a virtio-mem device. */
export interface VirtioMemRegion {
  /** What stands before the device's name and before that of its RAM block, with the slash. */
  readonly path: string
  /** Guest physical address. */
  readonly address: number
  /** Bytes. */
  readonly length: number
}

interface Section {
  readonly name: string
  readonly instanceId: number
  readonly offset: number
  readonly length: number
}

const clock = 'mc146818rtc'
const cmosLength = 128
const KiB = 1024
const MiB = 1024 * KiB
const unit = 64 * KiB
/** How much of a tail without description, or of one virtio-mem section, is looked at. */
const searched = 4 * MiB
/** Places in a section that may be the region of its device, at most. */
const mostRegions = 64

/** Reads what the sections tell; `tail` is where a part begins that no VM description takes apart. */
export async function readPlacement(
  device: BlockDevice,
  sections: readonly Section[],
  tail: { readonly offset: number; readonly end: number } | undefined,
  options?: CallOptions,
): Promise<MemoryPlacement> {
  const rtc = sections.find(({ name, instanceId }) => name === clock && instanceId === 0)
  const cmos = rtc === undefined ? await cmosInTail(device, tail, options) : await device.read(rtc.offset, Math.min(rtc.length, cmosLength), options)
  const virtioMem: VirtioMemRegion[] = []
  for (const section of sections) {
    const path = section.name.slice(0, section.name.lastIndexOf('/') + 1)
    if (section.name === `${path}virtio-mem-device-early`) virtioMem.push(...(await earlyRegion(device, section, path, options)))
    else if (section.name === `${path}virtio-mem` && !virtioMem.some((each) => each.path === path)) virtioMem.push(...(await lateRegion(device, section, path, options)))
  }
  return { pc: cmos?.length === cmosLength ? memoryOf(cmos) : undefined, virtioMem }
}

/**
 * ```
 * 15 base memory, KiB | 30 memory from 1 MiB on, KiB, up to 64 MiB | 34 memory from 16 MiB to 4 GiB, 64 KiB
 * 5b memory from 4 GiB on, 64 KiB (three bytes)          all little-endian
 * ```
 */
function memoryOf(cmos: Uint8Array): { below: number; above: number } {
  const word = (at: number): number => cmos[at]! | (cmos[at + 1]! << 8)
  const above = (word(0x5b) + cmos[0x5d]! * 0x1_0000) * unit
  if (word(0x34) > 0) return { below: 16 * MiB + word(0x34) * unit, above }
  return { below: word(0x30) > 0 ? MiB + word(0x30) * KiB : word(0x15) * KiB, above }
}

/** The CMOS is the first field of the clock's section, so the section's head is all that has to be found. */
async function cmosInTail(device: BlockDevice, tail: { offset: number; end: number } | undefined, options?: CallOptions): Promise<Uint8Array | undefined> {
  if (tail === undefined) return undefined
  const bytes = await device.read(tail.offset, Math.min(tail.end - tail.offset, searched), options)
  const head = [clock.length, ...new TextEncoder().encode(clock), 0, 0, 0, 0]
  for (let at = bytes.indexOf(4); at !== -1; at = bytes.indexOf(4, at + 1)) {
    if (!head.every((byte, i) => bytes[at + 5 + i] === byte)) continue
    const body = at + 5 + head.length + 4
    return bytes.subarray(body, body + cmosLength)
  }
  return undefined
}

/** QEMU 8.1 and later: `be64 address, be64 length, be64 block size, be32 node`, first in a section of its own. */
async function earlyRegion(device: BlockDevice, section: Section, path: string, options?: CallOptions): Promise<VirtioMemRegion[]> {
  if (section.length < 28) return []
  const region = regionAt(viewOf(await device.read(section.offset, 28, options)), 0)
  return region === undefined ? [] : [{ path, ...region }]
}

/** Earlier: the same fields somewhere within what the transport wrote. All that may be it; the RAM block's length decides. */
async function lateRegion(device: BlockDevice, section: Section, path: string, options?: CallOptions): Promise<VirtioMemRegion[]> {
  const view = viewOf(await device.read(section.offset, Math.min(section.length, searched), options))
  const found: VirtioMemRegion[] = []
  for (let at = 0; at + 28 <= view.byteLength && found.length < mostRegions; at++) {
    const region = regionAt(view, at)
    if (region !== undefined) found.push({ path, ...region })
  }
  return found
}

/** The four fields if they can be a region: whole blocks of a power of two of bytes, at a multiple of it. */
function regionAt(view: DataView, at: number): { address: number; length: number } | undefined {
  if (view.getUint16(at) !== 0 || view.getUint16(at + 8) !== 0 || view.getUint32(at + 16) !== 0) return undefined
  const block = view.getUint32(at + 20)
  if (block < MiB || Math.log2(block) % 1 !== 0) return undefined
  const address = view.getUint32(at) * 0x1_0000_0000 + view.getUint32(at + 4)
  const length = view.getUint32(at + 8) * 0x1_0000_0000 + view.getUint32(at + 12)
  return address > 0 && length > 0 && address % block === 0 && length % block === 0 ? { address, length } : undefined
}
