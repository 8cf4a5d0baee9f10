/**
 * An open image: its parts, and the few things about it that change. The paths (`read.ts`,
 * `write.ts`, …) are functions over this object; it wires and holds, it does not decide.
 */
import type { BlockDevice } from '../block/device.ts'
import type { FormatError } from '../core/errors.ts'
import { Mutex, RangeLock } from '../core/lock.ts'
import { Allocator } from './allocator.ts'
import { DecompressedClusters } from './decompressed.ts'
import { autoclear, incompatible, keptAutoclear } from './features.ts'
import { geometryOf, type Geometry } from './geometry.ts'
import { encodeHeaderCluster, type Header, type HeaderCluster } from './header.ts'
import type { HostFile } from './host-file.ts'
import { claimMetadata, mapL2Tables } from './metadata-claims.ts'
import { MetadataMap } from './metadata-map.ts'
import { Packer } from './packer.ts'
import type { PointerTable } from './pointer-table.ts'
import { refcountLayout } from './refcount-layout.ts'
import { Refcounts } from './refcounts.ts'
import { Requests } from './requests.ts'
import { SnapshotHolds } from './snapshot-holds.ts'
import type { SnapshotRecord } from './snapshot-table.ts'
import { TableCache } from './table-cache.ts'
import { WriteBack } from './write-back.ts'

/** Encrypts and decrypts guest data in place. Offsets and lengths are multiples of 512. */
export interface DataCipher {
  decrypt(guest: number, host: number, bytes: Uint8Array): void
  encrypt(guest: number, host: number, bytes: Uint8Array): void
}

/** One view of the guest disk: the active layer, or that of an internal snapshot. */
export interface Layer {
  readonly l1: PointerTable
  /** Bytes that unallocated clusters read; undefined: zeroes. */
  readonly backing: BlockDevice | undefined
}

/** What an image file says of itself when it is opened. */
export interface EngineState {
  readonly content: HeaderCluster
  readonly l1Table: PointerTable
  readonly refcountTable: PointerTable
  readonly snapshots: readonly SnapshotRecord[]
  /** Bytes the snapshot table takes in the file. */
  readonly snapshotTableLength: number
}

/** What an engine is made of. */
export interface EngineParts extends EngineState {
  readonly host: HostFile
  /** The external data file; undefined: guest data is in the image file itself. */
  readonly dataFile: HostFile | undefined
  readonly backing: BlockDevice | undefined
  /** Opens the backing file once more; undefined if it was given as a device. */
  readonly reopenBacking?: (() => Promise<BlockDevice | undefined>) | undefined
  readonly readOnly: boolean
  /** Bytes of the metadata caches together. */
  readonly cacheSize: number
  readonly cipher?: DataCipher | undefined
  /** What a writer owes before it changes guest data. */
  readonly prepareFirstWrite: (engine: Engine) => Promise<void>
}

/** The header is written in multiples of this, or whole clusters if they are smaller. */
const headerUnit = 4096

export class Engine {
  readonly host: HostFile
  /** Where guest data is: the image file itself or the external data file. */
  readonly data: HostFile
  readonly hasDataFile: boolean
  readonly geometry: Geometry
  readonly readOnly: boolean
  readonly reopenBacking: (() => Promise<BlockDevice | undefined>) | undefined
  /** Set once, before guest data is read or written. */
  cipher: DataCipher | undefined
  readonly l2Tables: TableCache
  readonly refcountBlocks: TableCache
  readonly refcounts: Refcounts
  readonly allocator: Allocator
  /** Places for compressed data. */
  readonly packer: Packer
  readonly metadataMap: MetadataMap
  readonly decompressed: DecompressedClusters
  readonly writeBack: WriteBack
  readonly requests: Requests = new Requests((error) => this.#noticeDamage(error))
  /** Held, by guest cluster index, while the mapping of clusters changes. */
  readonly clusterLocks: RangeLock = new RangeLock()
  /** Held while L2 tables are made or replaced, or the L1 table grows. */
  readonly tableLock: Mutex = new Mutex()
  content: HeaderCluster
  /** The guest disk as it is now. */
  active: Layer
  refcountTable: PointerTable
  snapshots: readonly SnapshotRecord[]
  readonly snapshotHolds: SnapshotHolds = new SnapshotHolds()
  /** Bytes the snapshot table takes in the file. */
  snapshotTableLength: number
  /** What made the image unusable for this open: found damaged, or its header may be either of two. */
  damage: Error | undefined
  /** Nothing in the file was changed yet. */
  unchanged = true
  /** No guest data was changed yet: what bitmaps promise still stands. */
  untouched = true
  #changing: Promise<void> | undefined
  #touching: Promise<void> | undefined
  readonly #headerLock = new Mutex()
  /** Resolves when the corrupt bit is set, if it is to be set. */
  #marking: Promise<void> = Promise.resolve()
  readonly #prepareFirstWrite: (engine: Engine) => Promise<void>

  constructor(parts: EngineParts) {
    const { header } = parts.content
    this.host = parts.host
    this.data = parts.dataFile ?? parts.host
    this.hasDataFile = parts.dataFile !== undefined
    this.readOnly = parts.readOnly
    this.reopenBacking = parts.reopenBacking
    this.cipher = parts.cipher
    this.#prepareFirstWrite = parts.prepareFirstWrite
    this.content = parts.content
    this.active = { l1: parts.l1Table, backing: parts.backing }
    this.refcountTable = parts.refcountTable
    this.snapshots = parts.snapshots
    this.snapshotTableLength = parts.snapshotTableLength
    this.geometry = geometryOf({
      clusterBits: header.clusterBits,
      extendedL2: (header.incompatibleFeatures & incompatible.extendedL2) !== 0n,
      refcountOrder: header.refcountOrder,
    })
    const { clusterSize } = this.geometry
    this.host.guard = (offset, length) => this.#refusal(offset, length)
    if (this.hasDataFile) this.data.guard = () => this.damage
    const flush = (): Promise<void> => this.writeBack.flush()
    this.l2Tables = new TableCache(this.host, clusterSize, (parts.cacheSize * 3) / 4, flush)
    this.refcountBlocks = new TableCache(this.host, clusterSize, parts.cacheSize / 4, flush)
    this.refcounts = new Refcounts(this.geometry, refcountLayout(header.refcountOrder), this.refcountBlocks, this)
    this.metadataMap = new MetadataMap(this.geometry)
    this.decompressed = new DecompressedClusters(clusterSize)
    this.allocator = new Allocator(this, this.refcounts)
    this.packer = new Packer(this.allocator, this.refcounts)
    this.writeBack = new WriteBack(this.host, this, this.allocator, () =>
      this.hasDataFile ? this.data.flush() : Promise.resolve(),
    )
    this.#claimMetadata()
  }

  /** Only writers need to know where metadata are. */
  #claimMetadata(): void {
    if (!this.readOnly) claimMetadata(this)
  }

  get header(): Header {
    return this.content.header
  }

  get l1Table(): PointerTable {
    return this.active.l1
  }

  set l1Table(table: PointerTable) {
    this.active = { l1: table, backing: this.active.backing }
  }

  get backing(): BlockDevice | undefined {
    return this.active.backing
  }

  set backing(device: BlockDevice | undefined) {
    this.active = { l1: this.active.l1, backing: device }
  }

  /** Writes everything back. */
  flush(): Promise<void> {
    return this.writeBack.flush()
  }

  /** Takes over what is in the file now, after it was changed around the engine while that was at rest. */
  reload(state: EngineState): void {
    this.content = state.content
    this.l1Table = state.l1Table
    this.refcountTable = state.refcountTable
    this.snapshots = state.snapshots
    this.snapshotTableLength = state.snapshotTableLength
    this.damage = undefined
    this.l2Tables.forgetClean()
    this.refcountBlocks.forgetClean()
    this.metadataMap.clear()
    this.#claimMetadata()
    this.allocator.rescan()
  }

  /** Something changed in memory that is not on the disk, or waits to be freed. */
  get hasUnwritten(): boolean {
    const tables = this.l1Table.hasDirty || this.refcountTable.hasDirty
    return tables || this.l2Tables.hasDirty || this.refcountBlocks.hasDirty || this.allocator.hasFreed || this.packer.isFilling
  }

  drained(): Promise<void> {
    return this.requests.drained()
  }

  /** The devices it stands on. */
  get below(): readonly BlockDevice[] {
    return [this.host.device, this.data.device, ...(this.backing === undefined ? [] : [this.backing])]
  }

  /** Throws unless the image may be written. */
  assertSound(): void {
    if (this.damage !== undefined) throw this.damage
  }

  /** Clears autoclear bits of features that are not known here. Call before any change unless `unchanged` is false. */
  change(): Promise<void> {
    return (this.#changing ??= this.#clearUnknownAutoclear().then(() => {
      this.unchanged = false
    }))
  }

  async #clearUnknownAutoclear(): Promise<void> {
    const { autoclearFeatures } = this.header
    const kept = keptAutoclear(autoclearFeatures)
    if (kept !== autoclearFeatures) await this.writeHeader({ autoclearFeatures: kept })
  }

  /** Does what a writer owes before guest data changes. Call before such a change unless `untouched` is false. */
  touch(): Promise<void> {
    return (this.#touching ??= this.change()
      .then(() => this.#prepareFirstWrite(this))
      .then(() => {
        this.untouched = false
      }))
  }

  /** The bitmaps are as they shall be: the next change of guest data is a first one again. */
  rest(): void {
    this.#touching = undefined
    this.untouched = true
  }

  /**
   * Replaces what is in use of cluster 0, durably. Fields that belong together lie in its first sector,
   * which reaches the disk whole; so a crash leaves the old header or the new one. So does a failure, and
   * nothing tells which: what either refers to has to stay, so nothing more is written.
   */
  writeHeader(fields: Partial<Header>, content: Partial<HeaderCluster> = {}): Promise<void> {
    return this.#storeHeader(fields, content, false)
  }

  #storeHeader(fields: Partial<Header>, content: Partial<HeaderCluster>, isMark: boolean): Promise<void> {
    return this.#headerLock.run(async () => {
      const next: HeaderCluster = { ...this.content, ...content, header: { ...this.header, ...fields } }
      const encoded = encodeHeaderCluster(next)
      const used = Math.max(encoded.length, encodeHeaderCluster(this.content).length)
      const bytes = this.host.allocate(Math.min(this.geometry.clusterSize, Math.ceil(used / headerUnit) * headerUnit)).fill(0)
      bytes.set(encoded)
      // the bit that says so is the last that is written to a damaged image
      if (!isMark) this.host.assertWritable(0, bytes.length)
      try {
        await this.host.device.write(0, bytes)
        await this.host.flush()
      } catch (error) {
        this.damage ??= error as Error
        throw error
      }
      this.content = next
    })
  }

  async switchRefcountTable(table: PointerTable): Promise<void> {
    const refcountTableClusters = (table.length * 8) / this.geometry.clusterSize
    await this.writeHeader({ refcountTableOffset: table.offset, refcountTableClusters })
  }

  /** A request met metadata of this image that contradict the format: nothing more is written on top of them. */
  #noticeDamage(error: unknown): void {
    // whoever made the request gets this error; that the bit could not be set adds nothing
    if (!this.readOnly && this.host.isDamagedBy(error)) this.corrupt(error as FormatError).catch(() => undefined)
  }

  /** Why a range of the image file may not be changed: asked by the file itself, before every change. */
  #refusal(offset: number, length: number): Error | undefined {
    if (this.damage !== undefined) return this.damage
    const contested = this.metadataMap.contestedAt(offset, length)
    if (contested === undefined) return undefined
    const { structure, detail, start } = contested
    const error = this.host.damaged(`${detail}; the write was stopped`, { structure, offset: start })
    this.corrupt(error).catch(() => undefined)
    return error
  }

  /** Sets the corrupt bit at once and refuses further writes. */
  async corrupt(error: FormatError): Promise<never> {
    if (this.damage === undefined) {
      this.damage = error
      const incompatibleFeatures = this.header.incompatibleFeatures | incompatible.corrupt
      if (!this.readOnly && this.header.version === 3) this.#marking = this.#storeHeader({ incompatibleFeatures }, {}, true)
    }
    await this.#marking
    throw error
  }

  /** Resolves when the corrupt bit is on the disk, if the image was found damaged. */
  marked(): Promise<void> {
    return this.#marking.catch(() => undefined)
  }

  /** True if the data file alone has to read like the disk. */
  get rawDataFile(): boolean {
    return this.hasDataFile && (this.header.autoclearFeatures & autoclear.rawDataFile) !== 0n
  }

  /** Marks the L2 tables of the active layer as metadata, after the L1 table was replaced. */
  remapTables(): void {
    mapL2Tables(this)
  }
}
