/**
 * Encryption of 512-byte sectors as pure transforms in place: AES in the modes disk images use. Owns
 * the modes and the IV forms; knows nothing of keys' origin, images or clusters.
 *
 * Per-sector cipher objects of `node:crypto` cost more than the cipher. Where the mode allows it,
 * one ECB pass runs over all sectors at once and the chaining is done here.
 */
import { createCipheriv, createDecipheriv, createHash, type Cipher, type Decipher } from 'node:crypto'
import { UnsupportedError } from '../../core/errors.ts'

/** Bytes of a sector: all encryption works in whole sectors. */
export const sectorSize = 512

/** Encrypts and decrypts whole sectors in place. */
export interface SectorCipher {
  /** `data` is a multiple of 512 bytes; `sector` is the number of its first sector. */
  encrypt(data: Uint8Array, sector: number): void
  decrypt(data: Uint8Array, sector: number): void
}

/**
 * AES in a mode by its LUKS name: `xts-plain64`, `xts-plain`, `cbc-plain64`, `cbc-plain`,
 * `cbc-essiv:sha256`. The key's length selects the width (for XTS it holds two keys).
 * @throws UnsupportedError for any other mode or key length.
 */
export function aesSectorCipher(mode: string, key: Uint8Array): SectorCipher {
  const dash = mode.indexOf('-')
  const chaining = mode.slice(0, dash)
  const ivForm = mode.slice(dash + 1)
  const width = (key.length * 8) / (chaining === 'xts' ? 2 : 1)
  if (width !== 128 && width !== 256 && (width !== 192 || chaining === 'xts')) {
    throw new UnsupportedError(`encryption: AES with a key of ${key.length} bytes in mode ${mode} is not supported`, [mode])
  }
  const iv = ivGenerator(ivForm, key)
  if (chaining === 'xts') return new AesXts(key, iv)
  if (chaining === 'cbc') return new AesCbc(key, iv)
  throw new UnsupportedError(`encryption: cipher mode ${mode} is not supported, only xts and cbc are`, [mode])
}

/** Writes the 16-byte IVs of consecutive sectors. */
type IvGenerator = (target: Uint8Array, sector: number) => void

/** Those whose digest is as long as a key of AES. */
const essivHashes = ['md5', 'sha256']

function ivGenerator(form: string, key: Uint8Array): IvGenerator {
  if (form === 'plain64') return plain64
  if (form === 'plain') return plain32
  const essiv = essivHashes.find((hash) => form === `essiv:${hash}`)
  if (essiv !== undefined) {
    const ecb = encryptor(createHash(essiv).update(key).digest())
    return (target, sector) => {
      plain64(target, sector)
      target.set(ecb.update(target))
    }
  }
  throw new UnsupportedError(`encryption: IV generator ${form} is not supported`, [form])
}

function plain64(target: Uint8Array, sector: number): void {
  const view = new DataView(target.buffer, target.byteOffset, target.length)
  for (let at = 0; at < target.length; at += 16, sector++) {
    view.setUint32(at, sector >>> 0, true)
    view.setUint32(at + 4, Math.floor(sector / 0x1_0000_0000), true)
    view.setUint32(at + 8, 0)
    view.setUint32(at + 12, 0)
  }
}

function plain32(target: Uint8Array, sector: number): void {
  plain64(target, sector)
  const view = new DataView(target.buffer, target.byteOffset, target.length)
  for (let at = 4; at < target.length; at += 16) view.setUint32(at, 0)
}

/** ECB without padding keeps no state between whole blocks, so one object serves all calls. */
function encryptor(key: Uint8Array): Cipher {
  return createCipheriv(`aes-${key.length * 8}-ecb`, key, null).setAutoPadding(false)
}

function decryptor(key: Uint8Array): Decipher {
  return createDecipheriv(`aes-${key.length * 8}-ecb`, key, null).setAutoPadding(false)
}

/** XTS: each block is XORed with its tweak, goes through ECB, and is XORed with the tweak again. */
class AesXts implements SectorCipher {
  readonly #encryptor: Cipher
  readonly #decryptor: Decipher
  readonly #tweak: Cipher
  readonly #iv: IvGenerator

  constructor(key: Uint8Array, iv: IvGenerator) {
    const half = key.length / 2
    this.#encryptor = encryptor(key.subarray(0, half))
    this.#decryptor = decryptor(key.subarray(0, half))
    this.#tweak = encryptor(key.subarray(half))
    this.#iv = iv
  }

  encrypt(data: Uint8Array, sector: number): void {
    this.#transform(this.#encryptor, data, sector)
  }

  decrypt(data: Uint8Array, sector: number): void {
    this.#transform(this.#decryptor, data, sector)
  }

  #transform(ecb: Cipher | Decipher, data: Uint8Array, sector: number): void {
    const tweaks = this.#tweaks(data.length, sector)
    xor(data, tweaks)
    data.set(ecb.update(data))
    xor(data, tweaks)
  }

  /** The tweak of a sector's first block is its encrypted IV; each next is twice the one before in GF(2^128). */
  #tweaks(length: number, sector: number): Uint8Array {
    const ivs = new Uint8Array((length / sectorSize) * 16)
    this.#iv(ivs, sector)
    const first = this.#tweak.update(ivs)
    const firstView = new DataView(first.buffer, first.byteOffset, first.length)
    const tweaks = new Uint8Array(length)
    const view = new DataView(tweaks.buffer)
    for (let at = 0, from = 0; at < length; from += 16) {
      let a = firstView.getUint32(from, true)
      let b = firstView.getUint32(from + 4, true)
      let c = firstView.getUint32(from + 8, true)
      let d = firstView.getUint32(from + 12, true)
      for (const end = at + sectorSize; at < end; at += 16) {
        view.setUint32(at, a, true)
        view.setUint32(at + 4, b, true)
        view.setUint32(at + 8, c, true)
        view.setUint32(at + 12, d, true)
        const carry = (d >>> 31) * 0x87
        d = ((d << 1) | (c >>> 31)) >>> 0
        c = ((c << 1) | (b >>> 31)) >>> 0
        b = ((b << 1) | (a >>> 31)) >>> 0
        a = ((a << 1) ^ carry) >>> 0
      }
    }
    return tweaks
  }
}

/** CBC restarts in every sector. Decryption is parallel: ECB over everything, then XOR with what precedes. */
class AesCbc implements SectorCipher {
  readonly #key: Uint8Array
  readonly #name: string
  readonly #decryptor: Decipher
  readonly #iv: IvGenerator

  constructor(key: Uint8Array, iv: IvGenerator) {
    this.#key = key
    this.#name = `aes-${key.length * 8}-cbc`
    this.#decryptor = decryptor(key)
    this.#iv = iv
  }

  encrypt(data: Uint8Array, sector: number): void {
    const ivs = this.#ivs(data.length, sector)
    for (let at = 0, n = 0; at < data.length; at += sectorSize, n += 16) {
      const cipher = createCipheriv(this.#name, this.#key, ivs.subarray(n, n + 16)).setAutoPadding(false)
      data.set(cipher.update(data.subarray(at, at + sectorSize)), at)
    }
  }

  decrypt(data: Uint8Array, sector: number): void {
    const before = new Uint8Array(data.length)
    before.set(data.subarray(0, data.length - 16), 16)
    const ivs = this.#ivs(data.length, sector)
    for (let at = 0, n = 0; at < data.length; at += sectorSize, n += 16) before.set(ivs.subarray(n, n + 16), at)
    data.set(this.#decryptor.update(data))
    xor(data, before)
  }

  #ivs(length: number, sector: number): Uint8Array {
    const ivs = new Uint8Array((length / sectorSize) * 16)
    this.#iv(ivs, sector)
    return ivs
  }
}

/** `other` begins at a multiple of 4 in memory; so, nearly always, does `data`. */
function xor(data: Uint8Array, other: Uint8Array): void {
  if (data.byteOffset % 4 !== 0) {
    for (let i = 0; i < data.length; i++) data[i] = data[i]! ^ other[i]!
    return
  }
  const words = new Uint32Array(data.buffer, data.byteOffset, data.length / 4)
  const otherWords = new Uint32Array(other.buffer, other.byteOffset, other.length / 4)
  for (let i = 0; i < words.length; i++) words[i] = words[i]! ^ otherWords[i]!
}
