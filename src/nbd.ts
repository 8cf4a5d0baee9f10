/**
 * `qcow2/nbd`: any block device served over the Network Block Device protocol, and any NBD export
 * used as a block device.
 * @packageDocumentation
 */
export * from './nbd/client.ts'
export { allocationContext, allocationDepthContext, dirtyBitmapContext, type DirtyRanges, type NbdExport, type NbdMetaContext } from './nbd/export.ts'
export type { StatusRun } from './nbd/messages.ts'
export * from './nbd/server.ts'
export * from './nbd/socket.ts'
export type { TransmissionLimits } from './nbd/transmission.ts'
export type { NbdTransport } from './nbd/transport.ts'
