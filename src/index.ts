/**
 * `qcow2`: disk images.
 * @packageDocumentation
 */
export * from "./core/errors.ts"
export type { LuksHeader, LuksKeySlot } from './codec/crypto/luks-header.ts'
export { amendImage, type AmendOptions } from './qcow2/amend.ts'
export { Bitmaps, type AddBitmapOptions, type DirtyRange } from './qcow2/bitmaps.ts'
export type { CheckFinding, CheckReport } from './qcow2/check-report.ts'
export { checkImage, type CheckOptions } from './qcow2/check.ts'
export { commitImage, type CommitOptions } from './qcow2/commit.ts'
export { compactImage } from './qcow2/compact.ts'
export { compareDevices, type CompareOptions, type Comparison } from './qcow2/compare.ts'
export { convertToQcow2, copyDevice, type ConvertProgress, type ConvertToQcow2Options, type CopyOptions } from './qcow2/convert.ts'
export * from './qcow2/convert-stream.ts'
export type { LayoutOptions, Preallocation } from './qcow2/create.ts'
export type { EncryptionOptions } from './qcow2/encryption.ts'
export type { CompressionType, CryptMethod } from './qcow2/header.ts'
export * from './qcow2/image.ts'
export { readImageInfo, type BitmapInfo, type ImageInfo } from './qcow2/info.ts'
export type { CreateOptions } from './qcow2/new-image.ts'
export { measureConversion, measureQcow2, type Measurement, type MeasureOptions } from './qcow2/measure.ts'
export { rebaseImage, setBackingFile, type NewBacking, type RebaseOptions } from './qcow2/rebase.ts'
export type { Reference, ReferenceOptions, ReferencePolicy } from './qcow2/references.ts'
export { repairImage, type RepairOptions } from './qcow2/repair.ts'
export type { SnapshotDevice } from './qcow2/snapshot-device.ts'
export type { SnapshotInfo } from './qcow2/snapshot-info.ts'
export type { FinishOptions, SnapshotWriter } from './qcow2/snapshot-writer.ts'
export type { BeginSnapshotOptions, CreateSnapshotOptions, Snapshots } from './qcow2/snapshots.ts'
