/**
 * The limits QEMU enforces on an image. They are checked before any memory is taken for the table
 * they bound, so that a hostile header costs an error and nothing else.
 */

/** Smallest `cluster_bits`: 512-byte clusters. */
export const minClusterBits = 9
/** Largest `cluster_bits`: 2 MiB clusters. */
export const maxClusterBits = 21
/** Smallest `cluster_bits` with extended L2 entries: a subcluster holds at least 512 bytes. */
export const minExtendedClusterBits = 14
/** Bytes of an L1 table: 4,194,304 entries. */
export const maxL1Bytes: number = 32 << 20
/** Bytes of the refcount table: 1,048,576 entries. */
export const maxRefcountTableBytes: number = 8 << 20
/** Internal snapshots in one image. */
export const maxSnapshots = 65536
/** Bytes of the snapshot table. */
export const maxSnapshotTableBytes: number = 64 << 20
/** Bytes of extra data in one snapshot table entry. */
export const maxSnapshotExtraData = 1024
/** Bytes of the backing file name, which also has to end inside cluster 0. */
export const maxBackingFileName = 1023
/** Bytes of the backing format name. */
export const maxBackingFormatName = 15
/** Host offsets stay below this; the format allows 2^56, JavaScript's safe integers end here. */
export const maxHostOffset: number = 2 ** 53
/** Files of a backing chain that are opened together, the top one counted: a limit of this library, each costs a descriptor, memory and depth of the stack. */
export const maxBackingChain = 200
/** Bitmaps in one image. */
export const maxBitmaps = 65535
/** Bytes of the bitmap directory. */
export const maxBitmapDirectoryBytes: number = maxBitmaps * 1024
