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
