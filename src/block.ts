/**
 * `qcow2/block`: the block-driver core.
 * @packageDocumentation
 */
export * from './block/device.ts'
export { disk15k, mediaRate, type DiskParameters } from './block/disk-model.ts'
export * from './block/simulated-disk.ts'
