/**
 * LUKS1 as QEMU uses it inside qcow2 (crypt_method 2): unlocking with a passphrase, and making a new
 * header. Owns key derivation and the anti-forensic splitter; the sector transform is
 * `sector-cipher.ts`, the layout `luks-header.ts`.
 */
import { createHash, getHashes, pbkdf2, randomBytes, randomUUID, timingSafeEqual } from 'node:crypto'
import { promisify } from 'node:util'
import { Qcow2Error, UnsupportedError } from '../../core/errors.ts'
import { decodeLuksHeader, encodeLuksHeader, keySlotCount, type LuksHeader, type LuksKeySlot } from './luks-header.ts'
import { aesSectorCipher, sectorSize, type SectorCipher } from './sector-cipher.ts'

const derive = promisify(pbkdf2)
const stripes = 4000
const digestLength = 20

/**
 * Hashes that trying all key slots may take: about half a minute, which no one sets on purpose and a hostile image
 * might. One iteration takes one for each hash length of the key; cryptsetup's own benchmark yields a few million
 * iterations for a slot.
 */
const mostHashes = 100_000_000
/** What `createLuks` accepts stays within that. */
const mostIterations = 40_000_000

/** Options of {@link openLuks}. */
export interface OpenLuksOptions {
  /** Where the area is in the file, for errors. Default 0. */
  readonly offset?: number | undefined
  /** Tried before each key slot: a derivation that has begun cannot be stopped. */
  readonly signal?: AbortSignal | undefined
}

/**
 * Finds the key slot that the passphrase opens.
 * @param area The LUKS header and key material, as they lie in the file.
 * @throws Qcow2Error `ERR_NOT_FOUND` if no slot opens; UnsupportedError for ciphers other than AES, and for a header
 * whose iterations would take minutes.
 */
export async function openLuks(area: Uint8Array, passphrase: string | Uint8Array, options: OpenLuksOptions = {}): Promise<SectorCipher> {
  const header = decodeLuksHeader(area, options.offset)
  if (header.cipherName !== 'aes') {
    throw new UnsupportedError(`encryption: cipher ${header.cipherName} is not supported, only aes is`, [header.cipherName])
  }
  checkHash(header.hash)
  checkIterations(header)
  for (const slot of header.slots) {
    if (!slot.active) continue
    options.signal?.throwIfAborted()
    const key = await unlock(header, slot, area, bytesOf(passphrase))
    if (key !== undefined) return aesSectorCipher(header.cipherMode, key)
  }
  throw new Qcow2Error('ERR_NOT_FOUND', 'encryption: the passphrase opens no key slot of the LUKS header')
}

/** What a new LUKS header can be told. */
export interface CreateLuksOptions {
  /** PBKDF2 iterations of the key slot; more make guessing dearer and opening slower. Default 600,000. */
  readonly iterations?: number | undefined
}

/**
 * A new LUKS area as QEMU makes them: aes-256, xts-plain64, sha256, slot 0 of 8 in use.
 * @returns The bytes of the area, to be stored at the encryption header's offset, and its cipher.
 */
export async function createLuks(
  passphrase: string | Uint8Array,
  options: CreateLuksOptions = {},
): Promise<{ area: Uint8Array; cipher: SectorCipher }> {
  const iterations = options.iterations ?? 600_000
  if (!Number.isInteger(iterations) || iterations < 1 || iterations > mostIterations) {
    throw new RangeError(`iterations must be an integer from 1 to ${mostIterations}, not ${iterations}`)
  }
  const key = randomBytes(64)
  const slotLength = roundUp(key.length * stripes, 4096)
  const slots: LuksKeySlot[] = Array.from({ length: keySlotCount }, (_, i) => ({
    active: i === 0,
    iterations: i === 0 ? iterations : 0,
    salt: i === 0 ? randomBytes(32) : new Uint8Array(32),
    keyOffset: 4096 + i * slotLength,
    stripes,
  }))
  const digestSalt = randomBytes(32)
  const digestIterations = Math.max(1000, Math.floor(iterations / 8))
  const header: LuksHeader = {
    cipherName: 'aes',
    cipherMode: 'xts-plain64',
    hash: 'sha256',
    payloadOffset: 4096 + keySlotCount * slotLength,
    keyBytes: key.length,
    digest: await derive(key, digestSalt, digestIterations, digestLength, 'sha256'),
    digestSalt,
    digestIterations,
    uuid: randomUUID(),
    slots,
  }
  const area = new Uint8Array(header.payloadOffset)
  area.set(encodeLuksHeader(header))
  const slot = slots[0]!
  const material = split(key, slot.stripes, header.hash)
  const padded = new Uint8Array(roundUp(material.length, sectorSize))
  padded.set(material)
  const slotKey = await derive(bytesOf(passphrase), slot.salt, slot.iterations, key.length, header.hash)
  aesSectorCipher(header.cipherMode, slotKey).encrypt(padded, 0)
  area.set(padded, slot.keyOffset)
  return { area, cipher: aesSectorCipher(header.cipherMode, key) }
}

/** The master key, if the passphrase opens this slot. */
async function unlock(header: LuksHeader, slot: LuksKeySlot, area: Uint8Array, passphrase: Uint8Array): Promise<Uint8Array | undefined> {
  const slotKey = await derive(passphrase, slot.salt, slot.iterations, header.keyBytes, header.hash)
  const length = header.keyBytes * slot.stripes
  const material = new Uint8Array(roundUp(length, sectorSize))
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

function digestSize(hash: string): number {
  const known = digestSizes.get(hash)
  if (known !== undefined) return known
  const size = createHash(hash).digest().length
  digestSizes.set(hash, size)
  return size
}

function checkHash(hash: string): void {
  if (!/^[a-z0-9]+$/.test(hash) || !getHashes().includes(hash)) {
    throw new UnsupportedError(`encryption: hash ${JSON.stringify(hash)} is not supported by this Node`, [hash])
  }
}

/** Before anything is derived: a wrong passphrase tries every slot. */
function checkIterations(header: LuksHeader): void {
  const size = digestSize(header.hash)
  const hashes = header.slots
    .filter(({ active }) => active)
    .reduce((sum, { iterations }) => sum + iterations * Math.ceil(header.keyBytes / size) + header.digestIterations * Math.ceil(digestLength / size), 0)
  if (hashes > mostHashes) {
    throw new UnsupportedError(`LUKS header: trying its key slots takes ${hashes} hashes, at most ${mostHashes} are made`, ['LUKS'])
  }
}

function bytesOf(passphrase: string | Uint8Array): Uint8Array {
  return typeof passphrase === 'string' ? new TextEncoder().encode(passphrase) : passphrase
}

function roundUp(value: number, multiple: number): number {
  return Math.ceil(value / multiple) * multiple
}
