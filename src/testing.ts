/**
 * `qcow2/testing`: property-based tests over qcow2 images. Needs `fast-check`, an optional peer.
 * @packageDocumentation
 */
export { fault, type Fault, type FaultPlan, type FaultRequest } from './block/fault.ts'
export { MemoryDevice, type MemoryOptions } from './block/memory.ts'
export { record, Recording, type RecordedChange, type RecordedRequest } from './block/record.ts'
export * from './block/simulated-disk.ts'
export { trace, type RequestOperation, type TracedRequest, type TraceLog, type TraceOptions } from './block/trace.ts'
export * from './testing/build-image.ts'
export * from './testing/check-image.ts'
export * from './testing/model-disk.ts'
export * from './testing/operations.ts'
export * from './testing/parameters.ts'
export * from './testing/power-cut.ts'
export * from './testing/qemu-img.ts'
export * from './testing/seeded-bytes.ts'
