/**
 * `qcow2/snapshot`: running VMs: QMP, and saving and reverting their state.
 * @packageDocumentation
 */
export { QmpClient, type Qmp, type QmpConnectOptions } from './qmp/client.ts'
export type * from './qmp/commands.ts'
export type { DuplexStream } from './qmp/duplex.ts'
export { QmpError } from './qmp/error.ts'
export { EventSubscription, type QmpEvent } from './qmp/events.ts'
export type { SocketAddress } from './qmp/socket.ts'
export { capture, type CaptureOptions } from './snapshot/capture.ts'
export { parseFaultOrder, type FaultOrder } from './snapshot/fault-order.ts'
export * from './snapshot/host-doctor.ts'
export type { PageServerOptions, PageServerReport } from './snapshot/page-server.ts'
export type { PageSource, SavedRamBlock } from './snapshot/page-source.ts'
export * from './snapshot/postcopy-source.ts'
export { RamImage, type OpenRamImageOptions, type RamImageBlockContent } from './snapshot/ram-image.ts'
export type { AbsentRange, RamImageBlock } from './snapshot/ram-image-layout.ts'
export * from './snapshot/ram-image-writer.ts'
export { deviceStreamSink, type SaveSink } from './snapshot/save-sink.ts'
export { MigrationListener } from './snapshot/socket.ts'
export type { StreamSummary } from './snapshot/stream-check.ts'
export * from './snapshot/vm-state-snapshot.ts'
