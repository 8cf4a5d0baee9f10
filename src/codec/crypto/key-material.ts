/**
 * The key material of a LUKS1 key slot: the master key, spread over many stripes and encrypted under a passphrase. Owns
 * key derivation and the anti-forensic splitter; knows nothing of where the material lies in a file.
 */
import { createHash, pbkdf2, randomBytes, timingSafeEqual } from 'node:crypto'
import { promisify } from 'node:util'
import type { LuksHeader, LuksKeySlot } from './luks-header.ts'
import { aesSectorCipher, sectorSize } from './sector-cipher.ts'

const pbkdf2Async = promisify(pbkdf2)

/** `length` bytes from a passphrase, by PBKDF2. */
export function derive(passphrase: Uint8Array, salt: Uint8Array, iterations: number, length: number, hash: string): Promise<Uint8Array> {
  return pbkdf2Async(passphrase, salt, iterations, length, hash)
}

/** Bytes of the digest of the master key. */
export const digestLength = 20

/** Bytes of a slot's key material, in whole sectors. */
export function materialLength(keyBytes: number, { stripes }: Pick<LuksKeySlot, 'stripes'>): number {
  return Math.ceil((keyBytes * stripes) / sectorSize) * sectorSize
}

/** The key material of a slot that the passphrase is to open. */
export async function sealKey(header: Pick<LuksHeader, 'hash' | 'cipherMode'>, slot: LuksKeySlot, key: Uint8Array, passphrase: string | Uint8Array): Promise<Uint8Array> {
  const material = new Uint8Array(materialLength(key.length, slot))
  material.set(split(key, slot.stripes, header.hash))
  const slotKey = await derive(bytesOf(passphrase), slot.salt, slot.iterations, key.length, header.hash)
  aesSectorCipher(header.cipherMode, slotKey).encrypt(material, 0)
  return material
}

/** The master key, if the passphrase opens this slot of a LUKS area. */
export async function unsealKey(header: LuksHeader, slot: LuksKeySlot, area: Uint8Array, passphrase: string | Uint8Array): Promise<Uint8Array | undefined> {
  const slotKey = await derive(bytesOf(passphrase), slot.salt, slot.iterations, header.keyBytes, header.hash)
  const length = header.keyBytes * slot.stripes
  const material = new Uint8Array(materialLength(header.keyBytes, slot))
  material.set(area.subarray(slot.keyOffset, slot.keyOffset + material.length))
  aesSectorCipher(header.cipherMode, slotKey).decrypt(material, 0)
  const key = merge(material.subarray(0, length), slot.stripes, header.hash)
  const digest = await derive(key, header.digestSalt, header.digestIterations, digestLength, header.hash)
  return timingSafeEqual(digest, header.digest) ? key : undefined
}

/**
 * The anti-forensic splitter (LUKS1 specification, 2.4): the key is spread over many stripes, all of
 * which are needed, so that destroying any part of them destroys the key.
 */
function split(key: Uint8Array, count: number, hash: string): Uint8Array {
  const material = new Uint8Array(randomBytes(key.length * count))
  const last = material.subarray((count - 1) * key.length)
  last.set(accumulate(material, key.length, count, hash))
  for (let i = 0; i < key.length; i++) last[i] = last[i]! ^ key[i]!
  return material
}

function merge(material: Uint8Array, count: number, hash: string): Uint8Array {
  const key = accumulate(material, material.length / count, count, hash)
  const last = material.subarray((count - 1) * key.length)
  for (let i = 0; i < key.length; i++) key[i] = key[i]! ^ last[i]!
  return key
}

/** All stripes but the last, each XORed in and then diffused. */
function accumulate(material: Uint8Array, length: number, count: number, hash: string): Uint8Array {
  const sum = new Uint8Array(length)
  for (let stripe = 0; stripe < count - 1; stripe++) {
    for (let i = 0; i < length; i++) sum[i] = sum[i]! ^ material[stripe * length + i]!
    diffuse(sum, hash)
  }
  return sum
}

/** Replaces each digest-sized piece by the hash of its index and itself. */
function diffuse(bytes: Uint8Array, hash: string): void {
  const index = new Uint8Array(4)
  for (let at = 0, piece = 0; at < bytes.length; piece++) {
    new DataView(index.buffer).setUint32(0, piece)
    const pieceEnd = at + digestSize(hash)
    const digest = createHash(hash).update(index).update(bytes.subarray(at, pieceEnd)).digest()
    bytes.set(digest.subarray(0, Math.min(digest.length, bytes.length - at)), at)
    at = pieceEnd
  }
}

const digestSizes = new Map<string, number>()

/** Bytes that a hash gives. */
export function digestSize(hash: string): number {
  const known = digestSizes.get(hash)
  if (known !== undefined) return known
  const size = createHash(hash).digest().length
  digestSizes.set(hash, size)
  return size
}

function bytesOf(passphrase: string | Uint8Array): Uint8Array {
  return typeof passphrase === 'string' ? new TextEncoder().encode(passphrase) : passphrase
}
