/**
 * The LUKS1 header: decode and encode, and the limits that keep a hostile one from costing time or
 * memory. Knows nothing of keys. (LUKS1 on-disk format specification 1.2.3, section 6.)
 *
 *       0  magic "LUKS" ba be   6  version u16     8  cipher name[32]   40  cipher mode[32]
 *      72  hash spec[32]      104  payload offset u32, sectors          108  key bytes u32
 *     112  digest[20]         132  digest salt[32]  164  digest iterations u32   168  uuid[40]
 *     208  8 key slots of 48 bytes:
 *            0  state u32   4  iterations u32   8  salt[32]
 *           40  key material offset u32, sectors from the LUKS header   44  stripes u32
 */
import { viewOf } from '../../bytes/view.ts'
import { FormatError, UnsupportedError } from '../../core/errors.ts'

const luksHeaderSize = 592
export const keySlotCount = 8
/**
 * Anti-forensic stripes of every key slot. The format allows any number, but every program writes this one and QEMU
 * reads no other: more would cost time for each passphrase that is tried.
 */
export const stripeCount = 4000
/** Bytes of header and key material that are taken: it is 8 slots of 64 bytes in 4000 stripes, but the stripes may be more. */
export const maxLuksArea: number = 64 << 20
const slotsAt = 208
const slotSize = 48
const active = 0x00ac71f3
const disabled = 0x0000dead
const magic = [0x4c, 0x55, 0x4b, 0x53, 0xba, 0xbe]

/** One of the eight places that hold the master key under a passphrase. */
export interface LuksKeySlot {
  /** A passphrase opens it. */
  readonly active: boolean
  /** PBKDF2 iterations for the passphrase. */
  readonly iterations: number
  /** 32 bytes. */
  readonly salt: Uint8Array
  /** Bytes from the start of the LUKS header. */
  readonly keyOffset: number
  /** Anti-forensic stripes that the key is split into. */
  readonly stripes: number
}

/** A LUKS1 header, fields by the names of its specification. */
export interface LuksHeader {
  /** For example `aes`. */
  readonly cipherName: string
  /** For example `xts-plain64`. */
  readonly cipherMode: string
  /** Hash of PBKDF2, for example `sha256`. */
  readonly hash: string
  /** Bytes; without meaning inside qcow2. */
  readonly payloadOffset: number
  /** Bytes of the master key. */
  readonly keyBytes: number
  /** 20 bytes: PBKDF2 of the master key. */
  readonly digest: Uint8Array
  /** 32 bytes. */
  readonly digestSalt: Uint8Array
  /** PBKDF2 iterations of the digest. */
  readonly digestIterations: number
  /** As text. */
  readonly uuid: string
  /** All eight, used or not. */
  readonly slots: readonly LuksKeySlot[]
}

/**
 * Decodes the header at the start of `bytes`, which is the whole LUKS area: key material must lie
 * within it. `offset` is where the area is in the file, for errors.
 * @throws FormatError `ERR_FORMAT`; UnsupportedError for another version than 1.
 */
export function decodeLuksHeader(bytes: Uint8Array, offset = 0): LuksHeader {
  const fail = (field: string, detail: string, at: number): FormatError =>
    new FormatError(`${field} ${detail}`, { structure: 'LUKS header', field, offset: offset + at })
  if (bytes.length < luksHeaderSize) throw fail('length', `is ${bytes.length}, at least ${luksHeaderSize} needed`, 0)
  if (magic.some((byte, i) => bytes[i] !== byte)) throw fail('magic', 'is not "LUKS" ba be', 0)
  const view = viewOf(bytes)
  const version = view.getUint16(6)
  if (version !== 1) throw new UnsupportedError(`LUKS header: version is ${version}, only 1 is supported (offset ${offset + 6})`, ['LUKS'])
  const keyBytes = view.getUint32(108)
  if (keyBytes < 16 || keyBytes > 64) throw fail('key bytes', `is ${keyBytes}, allowed 16 to 64`, 108)
  const slots: LuksKeySlot[] = []
  for (let i = 0; i < keySlotCount; i++) {
    const at = slotsAt + i * slotSize
    const state = view.getUint32(at)
    if (state !== active && state !== disabled) throw fail(`key slot ${i} state`, `is ${state.toString(16)}`, at)
    const slot: LuksKeySlot = {
      active: state === active,
      iterations: view.getUint32(at + 4),
      salt: bytes.slice(at + 8, at + 40),
      keyOffset: view.getUint32(at + 40) * 512,
      stripes: view.getUint32(at + 44),
    }
    if (slot.active) {
      if (slot.stripes < 1 || slot.keyOffset < luksHeaderSize || slot.keyOffset + keyBytes * slot.stripes > bytes.length) {
        throw fail(`key slot ${i}`, `places ${slot.stripes} stripes at ${slot.keyOffset}, outside the LUKS area of ${bytes.length} bytes`, at)
      }
      if (slot.iterations < 1) throw fail(`key slot ${i} iterations`, 'is 0', at + 4)
      if (slot.stripes !== stripeCount) {
        const what = `LUKS header: key slot ${i} has ${slot.stripes} stripes, only ${stripeCount} are supported (offset ${offset + at})`
        throw new UnsupportedError(what, ['LUKS'])
      }
    }
    slots.push(slot)
  }
  const digestIterations = view.getUint32(164)
  if (digestIterations < 1) throw fail('digest iterations', 'is 0', 164)
  return {
    cipherName: text(bytes, 8, 32),
    cipherMode: text(bytes, 40, 32),
    hash: text(bytes, 72, 32),
    payloadOffset: view.getUint32(104) * 512,
    keyBytes,
    digest: bytes.slice(112, 132),
    digestSalt: bytes.slice(132, 164),
    digestIterations,
    uuid: text(bytes, 168, 40),
    slots,
  }
}

/** The 592 bytes of the header. */
export function encodeLuksHeader(header: LuksHeader): Uint8Array {
  const bytes = new Uint8Array(luksHeaderSize)
  const view = viewOf(bytes)
  bytes.set(magic)
  view.setUint16(6, 1)
  putText(bytes, 8, header.cipherName)
  putText(bytes, 40, header.cipherMode)
  putText(bytes, 72, header.hash)
  view.setUint32(104, header.payloadOffset / 512)
  view.setUint32(108, header.keyBytes)
  bytes.set(header.digest, 112)
  bytes.set(header.digestSalt, 132)
  view.setUint32(164, header.digestIterations)
  putText(bytes, 168, header.uuid)
  header.slots.forEach((slot, i) => {
    const at = slotsAt + i * slotSize
    view.setUint32(at, slot.active ? active : disabled)
    view.setUint32(at + 4, slot.iterations)
    bytes.set(slot.salt, at + 8)
    view.setUint32(at + 40, slot.keyOffset / 512)
    view.setUint32(at + 44, slot.stripes)
  })
  return bytes
}

function text(bytes: Uint8Array, at: number, length: number): string {
  const field = bytes.subarray(at, at + length)
  const end = field.indexOf(0)
  return new TextDecoder('latin1').decode(end < 0 ? field : field.subarray(0, end))
}

function putText(bytes: Uint8Array, at: number, value: string): void {
  bytes.set(new TextEncoder().encode(value), at)
}
