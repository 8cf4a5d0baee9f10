/**
 * `qcow2/migration`: the QEMU migration stream, taken apart and put together.
 * @packageDocumentation
 */
export type { ByteSource } from './migration/byte-source.ts'
export * from './migration/commands.ts'
export * from './migration/container.ts'
export * from './migration/convert.ts'
export type { DeviceValue } from './migration/device-fields.ts'
export { commandNumber, ramFlag } from './migration/format.ts'
export * from './migration/multifd.ts'
export * from './migration/parser.ts'
export * from './migration/postcopy.ts'
export * from './migration/ram-part.ts'
export type { PageCounts } from './migration/ram-index.ts'
export { RamState } from './migration/ram-state.ts'
export * from './migration/read.ts'
export * from './migration/records.ts'
export * from './migration/return-path.ts'
export * from './migration/stream-parts.ts'
export * from './migration/stream-rest.ts'
export * from './migration/vm-description.ts'
export * from './migration/vm-state.ts'
export * from './migration/writer.ts'
