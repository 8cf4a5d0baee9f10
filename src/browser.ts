/**
 * `qcow2/browser`: the reading core for browsers: a `Blob` or `File`, bytes, or a URL of a server that
 * answers range requests. Files, encryption and writing compressed clusters need Node.
 * @packageDocumentation
 */
export * from './block/blob.ts'
export * from './block/device.ts'
export * from './block/http.ts'
export * from './block/memory.ts'
export * from './block/slice.ts'
export { openSource, type Source, type SourceOptions } from './block/source.ts'
export * from './core/errors.ts'
export { RamState } from './migration/ram-state.ts'
export { VmState, type DeviceState, type VmStateOptions } from './migration/vm-state.ts'
export { checkImage, type CheckOptions } from './qcow2/check.ts'
export type { CheckFinding, CheckProblem, CheckReport } from './qcow2/check-report.ts'
export { Qcow2Image, type OpenOptions } from './qcow2/image.ts'
export { readImageInfo, type BitmapInfo, type ImageInfo } from './qcow2/info.ts'
export type { SnapshotInfo } from './qcow2/snapshot-info.ts'
