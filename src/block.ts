/**
 * `qcow2/block`: the block-driver core.
 * @packageDocumentation
 */
export * from './block/device.ts'
