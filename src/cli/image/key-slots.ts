/** Passphrases of an encrypted image, as `amend -o encrypt.*` changes them: the rules in qemu-img's words, which scripts match. */
import type { BlockDevice } from '../../block/device.ts'
import { IoError, Qcow2Error } from '../../core/errors.ts'
import type { ImageInfo } from '../../qcow2/info.ts'
import { addPassphrase, erasePassphrase } from '../../qcow2/key-slots.ts'
import { ExitError } from '../errors.ts'
import type { CreateValues } from './create-options.ts'
import { iterationsFor } from './new-image.ts'
import { secretOf, type Secrets } from './secrets.ts'

/** What is needed besides the options. */
export interface KeySlotContext {
  readonly secrets: Secrets | undefined
  /** The id of the secret that opens the image. */
  readonly keySecret: string | undefined
  /** Do what may lose data. */
  readonly force: boolean
  readonly signal: AbortSignal
}

/** Changes the key slots of an image. */
export type KeySlotChange = (host: BlockDevice) => Promise<unknown>

/**
 * The change that the options ask for, if any.
 * @throws ExitError where they contradict each other, the image, or name a secret there is not
 */
export function keySlotChange(values: CreateValues, image: ImageInfo, context: KeySlotContext): KeySlotChange | undefined {
  const [state, added, old, slotText, time] = ['state', 'new-secret', 'old-secret', 'keyslot', 'iter-time'].map((name) => values.get(`encrypt.${name}`))
  if ([state, added, old, slotText, time].every((value) => value === undefined)) return undefined
  check(image.encryption !== 'none', "Can't amend encryption options - encryption not present")
  check(image.encryption === 'luks', 'Only LUKS encryption options can be amended')
  check(state !== undefined, "Parameter 'state' is missing")
  check(state === 'active' || state === 'inactive', `Parameter 'state' does not accept value '${state}'`)
  if (context.keySecret === undefined) throw new ExitError(1, "Parameter 'encrypt.key-secret' is required for cipher")
  const passphrase = secretOf(context.secrets, context.keySecret)
  const slot = slotText === undefined ? undefined : Number(slotText)
  check(slot === undefined || (slot >= 0 && slot <= 7), `Invalid keyslot ${slotText} specified, must be between 0 and 7`)
  const { force, signal } = context
  if (state === 'active') {
    check(old === undefined, "'old-secret' must not be given when activating keyslots")
    if (added === undefined) throw new ExitError(1, "'new-secret' is required to activate a keyslot")
    const secret = secretOf(context.secrets, added)
    const iterations = time === undefined ? undefined : iterationsFor(Number(time))
    return (host) => addPassphrase(host, passphrase, secret, { slot, replace: force, iterations, signal }).catch(inWordsOf((error) => whyNotAdded(error, slot)))
  }
  check(added === undefined, "'new-secret' must not be given when erasing keyslots")
  check(time === undefined, "'iter-time' must not be given when erasing keyslots")
  const erased = old === undefined ? undefined : secretOf(context.secrets, old)
  const which = slot !== undefined ? { slot, passphrase: erased } : erased !== undefined ? { passphrase: erased } : undefined
  if (which === undefined) throw new ExitError(1, 'To erase keyslot(s), either explicit keyslot index or the password currently contained in them must be given')
  const isFree = slot !== undefined && image.luks?.slots[slot]?.active === false
  // by force, what is free already is no failure
  if (isFree && force && old === undefined) return () => Promise.resolve()
  return (host) => erasePassphrase(host, which, { evenLast: force, signal }).catch(inWordsOf((error) => whyNotErased(error, slot, isFree)))
}

function whyNotAdded(error: unknown, slot: number | undefined): string | undefined {
  if (Qcow2Error.is(error, 'ERR_EXISTS')) return `Refusing to overwrite active keyslot ${slot} - please erase it first`
  if (Qcow2Error.is(error, 'ERR_NO_SPACE') && !(error instanceof IoError)) return "Can't add a keyslot - all keyslots are in use"
  return Qcow2Error.is(error, 'ERR_NOT_FOUND') ? 'Invalid password, cannot unlock any keyslot' : undefined
}

function whyNotErased(error: unknown, slot: number | undefined, isFree: boolean): string | undefined {
  if (Qcow2Error.is(error, 'ERR_BUSY')) {
    const lost = 'erase all the data in the image irreversibly - refusing operation'
    return slot === undefined ? `All the active keyslots match the (old) password that was given and erasing them will ${lost}` : `Attempt to erase the only active keyslot ${slot} which will ${lost}`
  }
  if (!Qcow2Error.is(error, 'ERR_NOT_FOUND')) return undefined
  if (isFree) return `Given keyslot ${slot} is already erased (inactive)`
  return slot === undefined ? 'No keyslots match given (old) password for erase operation' : `Given keyslot ${slot} doesn't contain the given old password for erase operation`
}

/** Throws the error again, in the words there are for it. */
function inWordsOf(words: (error: unknown) => string | undefined): (error: unknown) => never {
  return (error) => {
    const known = words(error)
    throw known === undefined ? error : new ExitError(1, known, { cause: error })
  }
}

function check(condition: boolean, message: string): void {
  if (!condition) throw new ExitError(1, message)
}
