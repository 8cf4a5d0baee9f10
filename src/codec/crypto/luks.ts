/**
 * LUKS1 as QEMU uses it inside qcow2 (crypt_method 2): unlocking with a passphrase, and making a new
 * header. Key slots are changed in `luks-slots.ts`; what is in them is `key-material.ts`, the sector transform
 * `sector-cipher.ts`, the layout `luks-header.ts`.
 */
import { getHashes, randomBytes, randomUUID } from 'node:crypto'
import { Qcow2Error, UnsupportedError } from '../../core/errors.ts'
import { derive, digestLength, digestSize, sealKey, unsealKey } from './key-material.ts'
import { decodeLuksHeader, encodeLuksHeader, keySlotCount, stripeCount, type LuksHeader, type LuksKeySlot } from './luks-header.ts'
import { aesSectorCipher, type SectorCipher } from './sector-cipher.ts'

/**
 * Hashes that trying all key slots may take: a minute or more, which no one sets on purpose and a hostile image
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
  /** Aborting rejects at once; a derivation that has begun ends in the background. */
  readonly signal?: AbortSignal | undefined
}

/**
 * Finds the key slot that the passphrase opens.
 * @param area The LUKS header and key material, as they lie in the file.
 * @throws Qcow2Error `ERR_NOT_FOUND` if no slot opens; UnsupportedError for ciphers other than AES, and for a header
 * whose iterations would take minutes.
 */
export async function openLuks(area: Uint8Array, passphrase: string | Uint8Array, options: OpenLuksOptions = {}): Promise<SectorCipher> {
  const header = readLuksHeader(area, options.offset)
  return aesSectorCipher(header.cipherMode, await unlockLuks(header, area, passphrase, options.signal))
}

/** The header of a LUKS area whose key slots can be tried. @throws as {@link openLuks}, but for the passphrase. */
export function readLuksHeader(area: Uint8Array, offset?: number): LuksHeader {
  const header = decodeLuksHeader(area, offset)
  if (header.cipherName !== 'aes') {
    throw new UnsupportedError(`encryption: cipher ${header.cipherName} is not supported, only aes is`, [header.cipherName])
  }
  checkHash(header.hash)
  checkIterations(header)
  return header
}

/** The master key. @throws Qcow2Error `ERR_NOT_FOUND` if no slot opens. */
export async function unlockLuks(header: LuksHeader, area: Uint8Array, passphrase: string | Uint8Array, signal?: AbortSignal): Promise<Uint8Array> {
  for (const slot of header.slots) {
    if (!slot.active) continue
    signal?.throwIfAborted()
    const key = await orAborted(unsealKey(header, slot, area, passphrase), signal)
    if (key !== undefined) return key
  }
  throw new Qcow2Error('ERR_NOT_FOUND', 'encryption: the passphrase opens no key slot of the LUKS header')
}

/** What a new LUKS header can be told. */
export interface CreateLuksOptions {
  /** PBKDF2 iterations of the key slot; more make guessing dearer and opening slower. Default 600,000. */
  readonly iterations?: number | undefined
}

/** @throws RangeError for iterations that opening would refuse */
export function iterationsOf({ iterations = 600_000 }: CreateLuksOptions): number {
  if (!Number.isInteger(iterations) || iterations < 1 || iterations > mostIterations) {
    throw new RangeError(`iterations must be an integer from 1 to ${mostIterations}, not ${iterations}`)
  }
  return iterations
}

/**
 * A new LUKS area as QEMU makes them: aes-256, xts-plain64, sha256, slot 0 of 8 in use.
 * @returns The bytes of the area, to be stored at the encryption header's offset, and its cipher.
 */
export async function createLuks(
  passphrase: string | Uint8Array,
  options: CreateLuksOptions = {},
): Promise<{ area: Uint8Array; cipher: SectorCipher }> {
  const iterations = iterationsOf(options)
  const key = randomBytes(64)
  const slotLength = roundUp(key.length * stripeCount, 4096)
  const slots: LuksKeySlot[] = Array.from({ length: keySlotCount }, (_, i) => ({
    active: i === 0,
    iterations: i === 0 ? iterations : 0,
    salt: i === 0 ? randomBytes(32) : new Uint8Array(32),
    keyOffset: 4096 + i * slotLength,
    stripes: stripeCount,
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
  area.set(await sealKey(header, slot, key, passphrase), slot.keyOffset)
  return { area, cipher: aesSectorCipher(header.cipherMode, key) }
}

/** What `task` gives, or the reason of an abort if that comes first. */
async function orAborted<T>(task: Promise<T>, signal: AbortSignal | undefined): Promise<T> {
  if (signal === undefined) return task
  const done = new AbortController()
  const aborted = new Promise<never>((_, reject) => {
    signal.addEventListener('abort', () => reject(signal.reason as Error), { once: true, signal: done.signal })
  })
  try {
    return await Promise.race([task, aborted])
  } finally {
    done.abort()
    task.catch(() => undefined)
  }
}

/** Of these a digest has a fixed length, as PBKDF2 and the stripes need it. */
const luksHashes = ['md5', 'ripemd160', 'sha1', 'sha224', 'sha256', 'sha384', 'sha512', 'sm3']

function checkHash(hash: string): void {
  if (!luksHashes.includes(hash) || !getHashes().includes(hash)) {
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

function roundUp(value: number, multiple: number): number {
  return Math.ceil(value / multiple) * multiple
}
