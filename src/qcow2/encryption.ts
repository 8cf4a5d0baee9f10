/**
 * Encrypted images: from a passphrase to the cipher that the engine passes guest data through, and
 * making a new image encrypted. The ciphers themselves are `codec/crypto`.
 */
import { legacyAesCipher } from '../codec/crypto/legacy-aes.ts'
import { createLuks, openLuks } from '../codec/crypto/luks.ts'
import type { SectorCipher } from '../codec/crypto/sector-cipher.ts'
import type { DataCipher, Engine } from './engine.ts'
import { encodeEncryptionPointer, extensionType, withExtension } from './extensions.ts'
import type { HeaderCluster } from './header.ts'
import type { HostFile } from './host-file.ts'
import { readLuksArea } from './info.ts'
import { settle } from './shutdown.ts'

/** Encryption of a new image. */
export interface EncryptionOptions {
  /** `luks` (LUKS1, aes-256-xts), or `aes`, the legacy method QEMU warns of: weak, and no wrong key is noticed. */
  readonly format: 'luks' | 'aes'
  /** A string is taken as UTF-8. Legacy AES uses its first 16 bytes. */
  readonly passphrase: string | Uint8Array
  /** PBKDF2 iterations of the LUKS key slot; default 600,000. */
  readonly iterations?: number | undefined
}

const sectorSize = 512

/**
 * The cipher of an image.
 * @throws Qcow2Error `ERR_NOT_FOUND` if the passphrase opens no LUKS key slot; a wrong key of legacy AES
 * cannot be noticed.
 */
export async function openDataCipher(
  passphrase: string | Uint8Array,
  content: HeaderCluster,
  file: HostFile,
  signal: AbortSignal | undefined,
): Promise<DataCipher> {
  if (content.header.cryptMethod === 'aes') return guestSectors(legacyAesCipher(passphrase))
  const [area, offset] = await readLuksArea(file, content)
  return hostSectors(await openLuks(area, passphrase, { offset, signal }))
}

/** Legacy AES counts sectors from the start of the guest's disk. */
function guestSectors(cipher: SectorCipher): DataCipher {
  return {
    encrypt: (guest, _host, bytes) => cipher.encrypt(bytes, guest / sectorSize),
    decrypt: (guest, _host, bytes) => cipher.decrypt(bytes, guest / sectorSize),
  }
}

/** LUKS counts sectors from the start of the image file. */
function hostSectors(cipher: SectorCipher): DataCipher {
  return {
    encrypt: (_guest, host, bytes) => cipher.encrypt(bytes, host / sectorSize),
    decrypt: (_guest, host, bytes) => cipher.decrypt(bytes, host / sectorSize),
  }
}

/**
 * Makes an image that holds no data yet encrypted. The LUKS header is durable, and counted, before the
 * image's header refers to it; a crash before that leaves an image that is not encrypted and has leaks.
 * @returns The cipher of the image.
 */
export async function encryptEmptyImage(engine: Engine, options: EncryptionOptions): Promise<DataCipher> {
  if (options.format === 'aes') {
    await engine.writeHeader({ cryptMethod: 'aes' })
    return guestSectors(legacyAesCipher(options.passphrase))
  }
  const { area, cipher } = await createLuks(options.passphrase, { iterations: options.iterations })
  const clusters = Math.ceil(area.length / engine.geometry.clusterSize)
  const { offset } = await engine.allocator.allocateContiguous(clusters)
  const bytes = engine.host.allocate(clusters * engine.geometry.clusterSize)
  bytes.set(area)
  await engine.host.write(offset, bytes)
  await settle(engine)
  const pointer = encodeEncryptionPointer({ offset, length: area.length })
  const extensions = withExtension(engine.content.extensions, extensionType.encryptionHeader, pointer)
  await engine.writeHeader({ cryptMethod: 'luks' }, { extensions })
  return hostSectors(cipher)
}
