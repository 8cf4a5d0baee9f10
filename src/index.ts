/**
 * `qcow2`: disk images.
 * @packageDocumentation
 */
export * from "./core/errors.ts"
export * from './qcow2/image.ts'
export { checkImage, type CheckOptions } from './qcow2/check.ts'
export type { CheckFinding, CheckReport } from './qcow2/check-report.ts'
export * from './qcow2/convert.ts'
export type { LayoutOptions, Preallocation } from './qcow2/create.ts'
export type { CompressionType } from './qcow2/header.ts'
export type { Reference, ReferenceOptions, ReferencePolicy } from './qcow2/references.ts'
export { repairImage, type RepairOptions } from './qcow2/repair.ts'
export type { SnapshotDevice } from './qcow2/snapshot-device.ts'
export type { SnapshotInfo } from './qcow2/snapshot-info.ts'
export type { FinishOptions, SnapshotWriter } from './qcow2/snapshot-writer.ts'
export type { BeginSnapshotOptions, CreateSnapshotOptions, Snapshots } from './qcow2/snapshots.ts'
