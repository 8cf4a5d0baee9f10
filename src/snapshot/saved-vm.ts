/** The base of saved VMs: what a stream without its pages tells of each. Owns the lookup of RAM blocks; reads nothing. */
import { Qcow2Error } from '../core/errors.ts'
import { Resource } from '../core/resource.ts'
import type { StreamParts } from '../migration/stream-parts.ts'
import type { PageSource, SavedRamBlock } from './page-source.ts'

/** A saved VM made of the parts of its stream and the contents of its RAM blocks. */
export abstract class SavedVm<Block extends SavedRamBlock> extends Resource implements PageSource {
  readonly machine: string
  readonly pageSize: number
  readonly head: Uint8Array
  readonly ramSectionId: number
  readonly dirtyBitmaps: readonly string[]
  readonly footers: boolean
  readonly blocks: readonly Block[]
  readonly earlyDevices: Uint8Array
  readonly devices: Uint8Array
  readonly vmDescription: Uint8Array

  protected constructor(parts: Omit<StreamParts, 'blocks'>, pageSize: number, blocks: readonly Block[]) {
    super()
    this.machine = parts.machine
    this.pageSize = pageSize
    this.head = parts.head
    this.ramSectionId = parts.ramSectionId
    this.dirtyBitmaps = parts.dirtyBitmaps
    this.footers = parts.footers
    this.blocks = blocks
    this.earlyDevices = parts.earlyDevices
    this.devices = parts.devices
    this.vmDescription = parts.vmDescription
  }

  /** The block of that name or index. @throws Qcow2Error `ERR_NOT_FOUND` */
  block(which: string | number): Block {
    const found = typeof which === 'number' ? this.blocks[which] : this.blocks.find(({ name }) => name === which)
    if (found === undefined) throw new Qcow2Error('ERR_NOT_FOUND', `no RAM block '${which}'`)
    return found
  }
}
