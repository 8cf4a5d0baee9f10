/**
 * Where the metadata of an image are when it is opened for writing, and which of them claim a place that is not theirs:
 * in a cluster of another structure, or past the end of the file. Nothing may be written there: it would
 * overwrite the other, or make the file as long as a wild pointer says.
 */
import { decodeBitmapsExtension, extensionType, findExtension } from './extensions.ts'
import { autoclear } from './features.ts'
import type { Geometry } from './geometry.ts'
import type { HeaderCluster } from './header.ts'
import type { HostFile } from './host-file.ts'
import type { MetadataMap } from './metadata-map.ts'
import type { PointerTable } from './pointer-table.ts'
import { hasSoundL1, type SnapshotRecord } from './snapshot-table.ts'

/** The parts of an engine that say where metadata are. */
interface Claimants {
  readonly host: HostFile
  readonly geometry: Geometry
  readonly content: HeaderCluster
  readonly l1Table: PointerTable
  readonly refcountTable: PointerTable
  readonly snapshots: readonly SnapshotRecord[]
  readonly snapshotTableLength: number
  readonly metadataMap: MetadataMap
}

/** A run of bytes in the file. */
interface Place {
  readonly offset: number
  readonly length: number
}

/** Marks all metadata, and contests what is not in a place of its own. Structures of one kind may share theirs: a check reports it. */
export function claimMetadata(claimants: Claimants): void {
  const { geometry, content, refcountTable, snapshots, snapshotTableLength, metadataMap } = claimants
  const { header } = content
  const { clusterSize } = geometry
  metadataMap.add(0, clusterSize)
  claim(claimants, 'L1 table', [{ offset: header.l1TableOffset, length: header.l1Size * 8 }])
  claim(claimants, 'refcount table', [{ offset: header.refcountTableOffset, length: header.refcountTableClusters * clusterSize }])
  claim(claimants, 'snapshot table', [{ offset: header.snapshotsOffset, length: snapshotTableLength }])
  claim(claimants, 'refcount block', clustersIn(refcountTable, clusterSize))
  // a table that cannot be one is nobody's; what it might have named is counted all the same
  const sound = snapshots.filter((record) => hasSoundL1(record, clusterSize))
  claim(claimants, 'L1 table of a snapshot', sound.map(({ l1TableOffset, l1Size }) => ({ offset: l1TableOffset, length: l1Size * 8 })))
  // without the autoclear bit the extension is stale, and what it names may be in use for something else
  const trusted = (header.autoclearFeatures & autoclear.bitmaps) !== 0n
  const bitmaps = trusted ? findExtension(content.extensions, extensionType.bitmaps) : undefined
  if (bitmaps?.length === 24) {
    const { directoryOffset, directorySize } = decodeBitmapsExtension(bitmaps)
    claim(claimants, 'bitmap directory', [{ offset: directoryOffset, length: directorySize }])
  }
  for (const place of clustersIn(claimants.l1Table, clusterSize)) contestUnlessOwn(claimants, 'L2 table', place)
  mapL2Tables(claimants)
}

/** Marks the L2 tables of the active layer. */
export function mapL2Tables({ host, geometry, l1Table, metadataMap }: Claimants): void {
  for (const { offset, length } of clustersIn(l1Table, geometry.clusterSize)) {
    if (offset < host.size) metadataMap.addL2Table(offset, length)
  }
}

function* clustersIn(table: PointerTable, clusterSize: number): Generator<Place, void, undefined> {
  for (let index = table.nextUsed(0); index < table.length; index = table.nextUsed(index + 1)) {
    const offset = table.offsetAt(index)
    if (offset !== 0) yield { offset, length: clusterSize }
  }
}

function claim(claimants: Claimants, structure: string, places: Iterable<Place>): void {
  const { host, geometry, metadataMap } = claimants
  const own: Place[] = []
  for (const place of places) {
    if (place.length === 0) continue
    contestUnlessOwn(claimants, structure, place)
    // marking what lies past the end of the file would cost memory
    if (place.offset < host.size) own.push({ offset: place.offset, length: Math.min(place.length, host.size + geometry.clusterSize - place.offset) })
  }
  for (const { offset, length } of own) metadataMap.add(offset, length)
}

function contestUnlessOwn({ host, metadataMap }: Claimants, structure: string, { offset, length }: Place): void {
  const contest = (detail: string): void => metadataMap.contest({ start: offset, end: offset + length, structure, detail })
  if (offset >= host.size) contest(`it is past the end of the file, which has ${host.size} bytes`)
  else if (metadataMap.overlapsStructure(offset, length)) contest('it lies in a cluster of other metadata')
}
