/**
 * `qcow2/block`: the block-driver core.
 * @packageDocumentation
 */
export * from './block/device.ts'
export { disk15k, mediaRate, type DiskParameters } from './block/disk-model.ts'
export * from './block/fault.ts'
export * from './block/file.ts'
export * from './block/filter.ts'
export * from './block/memory.ts'
export * from './block/null.ts'
export { pad } from './block/pad.ts'
export * from './block/read-ahead-filter.ts'
export * from './block/read-ahead-window.ts'
export * from './block/read-ahead.ts'
export * from './block/simulated-disk.ts'
export * from './block/slab.ts'
export * from './block/slice.ts'
export * from './block/trace.ts'
export * from './block/write-queue.ts'
export * from './core/errors.ts'
