/**
 * The numbers of the Network Block Device protocol: flags, types, commands, errors and limits. Owns
 * no behaviour.
 *
 * Format: the NBD project's `doc/proto.md`.
 */

/** Handshake flags, the same bits from server and client. */
export const handshakeFlags = { fixedNewstyle: 1, noZeroes: 2 } as const

/** Options a client may haggle with. */
export const optionTypes = {
  exportName: 1,
  abort: 2,
  list: 3,
  startTls: 5,
  info: 6,
  go: 7,
  structuredReply: 8,
  listMetaContext: 9,
  setMetaContext: 10,
} as const

/** Replies to options; errors have the top bit set. */
export const optionReplies = {
  ack: 1,
  server: 2,
  info: 3,
  metaContext: 4,
  unsupported: 0x8000_0001,
  policy: 0x8000_0002,
  invalid: 0x8000_0003,
  tlsRequired: 0x8000_0005,
  unknownExport: 0x8000_0006,
  tooBig: 0x8000_0009,
} as const

/** Kinds of information in an `info` reply. */
export const infoTypes = { export: 0, name: 1, description: 2, blockSize: 3 } as const

/** What an export can do. */
export const transmissionFlags = {
  hasFlags: 1,
  readOnly: 2,
  sendFlush: 4,
  sendFua: 8,
  rotational: 16,
  sendTrim: 32,
  sendWriteZeroes: 64,
  sendDf: 128,
  canMultiConn: 256,
  sendResize: 512,
  sendCache: 1024,
  sendFastZero: 2048,
} as const

/** Commands of the transmission phase. */
export const commands = {
  read: 0,
  write: 1,
  disconnect: 2,
  flush: 3,
  trim: 4,
  cache: 5,
  writeZeroes: 6,
  blockStatus: 7,
} as const

/** Flags of a command. */
export const commandFlags = { fua: 1, noHole: 2, dontFragment: 4, requestOne: 8, fastZero: 16 } as const

/** Types of a structured reply's chunks; errors have bit 15 set. */
export const chunkTypes = { none: 0, offsetData: 1, offsetHole: 2, blockStatus: 5, error: 0x8001, errorOffset: 0x8002 } as const

/** Set on the last chunk of a structured reply. */
export const chunkDone = 1

/** Error numbers of the protocol (Linux's, whatever the host). */
export const errors = { perm: 1, io: 5, noMemory: 12, invalid: 22, noSpace: 28, overflow: 75, notSupported: 95, shutdown: 108 } as const

/** `base:allocation` states. */
export const allocationStates = { hole: 1, zero: 2 } as const

/** `qemu:dirty-bitmap:NAME` state of a dirty range. */
export const dirtyState = 1

/** The largest payload a portable client sends, and the largest this library accepts. */
export const maxPayload: number = 32 << 20

/** The largest data of an option that is read at all. */
export const maxOptionLength: number = 64 << 10

/** Runs in one status chunk that are read at all; servers send at most 2^20. */
export const maxStatusRuns: number = 1 << 20

/** Bytes of a structured reply's chunk by its type; errors and types not listed: the longest message and its fields. */
export function maxChunkLength(type: number): number {
  if (type === chunkTypes.offsetData) return maxPayload + 8
  if (type === chunkTypes.blockStatus) return maxStatusRuns * 8 + 4
  return maxNameLength + 14
}

/** The longest name: of an export, a context, a description. */
export const maxNameLength = 4096

/** Bytes of each fixed-size message head. */
export const sizes = {
  greeting: 18,
  oldstyle: 152,
  clientFlags: 4,
  option: 16,
  optionReply: 20,
  exportName: 10,
  /** After the reply to `exportName`, unless the client waived them. */
  zeroes: 124,
  request: 28,
  simpleReply: 16,
  chunk: 20,
} as const
