/**
 * The passphrases of an image encrypted with LUKS. Works on the file itself; the image must not be open. The data and
 * its key stay as they are.
 */
import type { CallOptions } from '../block/device.ts'
import { withSource, type Source } from '../block/source.ts'
import type { AddKeySlotOptions, ErasedKeySlots, EraseKeySlotsOptions, SlotChange } from '../codec/crypto/luks-slots.ts'
import { Qcow2Error } from '../core/errors.ts'
import { refuseUnknownOptions, type OptionNames } from '../core/options.ts'
import { CheckContext } from './check-context.ts'
import { CheckCollector } from './check-report.ts'
import { readLuksArea } from './info.ts'
import { hostFile } from './open.ts'

/** Options of {@link addPassphrase}. */
export interface AddPassphraseOptions extends AddKeySlotOptions, CallOptions {}

/** Options of {@link erasePassphrase}. */
export interface ErasePassphraseOptions extends EraseKeySlotsOptions, CallOptions {}

const addOptions: OptionNames<AddPassphraseOptions> = { slot: true, replace: true, iterations: true, signal: true }
const eraseOptions: OptionNames<ErasePassphraseOptions> = { evenLast: true, signal: true }

/** Node's ciphers take a few milliseconds to load: only who uses them waits. */
const loadSlots = (): Promise<typeof import('../codec/crypto/luks-slots.ts')> => import('../codec/crypto/luks-slots.ts')

/**
 * Lets another passphrase open an image encrypted with LUKS (LUKS1 specification 1.2.3, section 4.3); the key slot it took.
 * `passphrase` is one that opens it already; both are kept. The file is opened and closed again, a device given stays open.
 *
 * A crash at any point leaves an image that `passphrase` opens, or, with `replace`, that one of the two opens; where all eight
 * slots are in use and `passphrase` opens only the one replaced, perhaps just those of the other slots.
 * @throws Qcow2Error `ERR_NOT_FOUND` if `passphrase` opens no key slot, `ERR_EXISTS` for a slot in use, `ERR_NO_SPACE` if all eight are,
 * `ERR_UNSUPPORTED` for an image that is not encrypted with LUKS; RangeError for a slot or iterations there cannot be.
 */
export async function addPassphrase(source: Source, passphrase: string | Uint8Array, added: string | Uint8Array, options: AddPassphraseOptions = {}): Promise<number> {
  refuseUnknownOptions('addPassphrase', options, addOptions)
  const slots = await changeSlots(source, options, async (area) => (await loadSlots()).addKeySlot(area, passphrase, added, options))
  return slots[0]!
}

/**
 * Erases a key slot of an image encrypted with LUKS, or all slots that a passphrase opens; the slots erased. What is open
 * stays readable, and so does what someone copied before: whoever had the passphrase may have kept the key. The file is
 * opened and closed again, a device given stays open.
 * @throws Qcow2Error `ERR_NOT_FOUND` if there is nothing to erase, `ERR_BUSY` if no slot would be left and `evenLast` is not given,
 * `ERR_UNSUPPORTED` for an image that is not encrypted with LUKS; RangeError for a slot there cannot be.
 */
export async function erasePassphrase(source: Source, which: ErasedKeySlots, options: ErasePassphraseOptions = {}): Promise<readonly number[]> {
  refuseUnknownOptions('erasePassphrase', options, eraseOptions)
  return changeSlots(source, options, async (area) => (await loadSlots()).eraseKeySlots(area, which, options))
}

async function changeSlots(source: Source, { signal }: CallOptions, change: (area: Uint8Array) => Promise<SlotChange>): Promise<readonly number[]> {
  return withSource(source, { signal }, async (host) => {
    if (host.readOnly) throw new Qcow2Error('ERR_READ_ONLY', 'key slots: the device is open read-only; open it for writing')
    const { cluster0 } = await CheckContext.open(host, new CheckCollector(0), { signal })
    if (cluster0.header.cryptMethod !== 'luks') {
      throw new Qcow2Error('ERR_UNSUPPORTED', `key slots: the encryption of the image is ${cluster0.header.cryptMethod}; only luks has them`)
    }
    const file = hostFile(host)
    const [area, start] = await readLuksArea(file, cluster0)
    const { slots, writes } = await change(area)
    // begun, it is not stopped: what comes first is useless without what comes last
    signal?.throwIfAborted()
    for (const { offset, bytes } of writes) {
      await file.write(start + offset, bytes)
      await file.flush()
    }
    return slots
  })
}
