/** The Network Block Device protocol on the wire, gathered: numbers, options, messages. */
export { Cursor } from './cursor.ts'
export * from './messages.ts'
export * from './numbers.ts'
export * from './options.ts'
