/**
 * Changing the key slots of a LUKS1 area: which bytes have to be written, and in which order, so that a crash at any
 * point leaves a passphrase that opens it. Writes nothing itself.
 */
import { randomBytes } from 'node:crypto'
import { FormatError, Qcow2Error } from '../../core/errors.ts'
import { materialLength, sealKey, unsealKey } from './key-material.ts'
import { encodeLuksHeader, keySlotCount, stripeCount, type LuksHeader, type LuksKeySlot } from './luks-header.ts'
import { iterationsOf, readLuksHeader, unlockLuks, type CreateLuksOptions } from './luks.ts'

/** Bytes for a LUKS area, each durable before the next is written. Offsets count from its start. */
export type LuksWrites = readonly { readonly offset: number; readonly bytes: Uint8Array }[]

/** A change of key slots. */
export interface SlotChange {
  /** The slots changed, 0 to 7. */
  readonly slots: readonly number[]
  readonly writes: LuksWrites
}

/** How a key slot is filled. */
export interface AddKeySlotOptions extends CreateLuksOptions {
  /** 0 to 7; default the first that is free. */
  readonly slot?: number | undefined
  /** Take `slot` though it is in use: its passphrase opens nothing any more. Default false. */
  readonly replace?: boolean | undefined
  readonly signal?: AbortSignal | undefined
}

/**
 * Puts the master key, which `passphrase` gives, into a key slot under another passphrase.
 * @throws Qcow2Error `ERR_NOT_FOUND` if the passphrase opens no slot, `ERR_EXISTS` for a slot in use, `ERR_NO_SPACE` if all are;
 * RangeError for a slot or iterations there cannot be; what `openLuks` throws.
 */
export async function addKeySlot(area: Uint8Array, passphrase: string | Uint8Array, added: string | Uint8Array, options: AddKeySlotOptions = {}): Promise<SlotChange> {
  const { slot, replace = false, signal } = options
  const iterations = iterationsOf(options)
  if (slot !== undefined) checkSlot(slot)
  const header = readLuksHeader(area)
  const free = header.slots.findIndex(({ active }) => !active)
  const chosen = slot ?? free
  if (chosen < 0) throw new Qcow2Error('ERR_NO_SPACE', `all ${keySlotCount} key slots are in use; erase one first`)
  const isUsed = header.slots[chosen]!.active
  if (isUsed && !replace) throw new Qcow2Error('ERR_EXISTS', `key slot ${chosen} is in use; erase it first`)
  const key = await unlockLuks(header, area, passphrase, signal)
  const fill = (before: LuksHeader, index: number): Promise<Filled> => fillSlot(before, area.length, index, { key, passphrase: added, iterations })
  if (!isUsed || free < 0) {
    const { writes } = await fill(header, chosen)
    return { slots: [chosen], writes }
  }
  // while the slot is rewritten a free one holds the key
  const kept = await fill(header, free)
  const replaced = await fill(kept.header, chosen)
  return { slots: [chosen], writes: [...kept.writes, ...replaced.writes, ...emptySlot(replaced.header, free).writes] }
}

/** Which slots to erase: one, all that a passphrase opens, or one if the passphrase opens it. */
export type ErasedKeySlots =
  | { readonly slot: number; readonly passphrase?: string | Uint8Array | undefined }
  | { readonly slot?: number | undefined; readonly passphrase: string | Uint8Array }

/** How key slots are erased. */
export interface EraseKeySlotsOptions {
  /** Erase though no slot is left then: nothing opens the image any more, and its data is lost. Default false. */
  readonly evenLast?: boolean | undefined
  readonly signal?: AbortSignal | undefined
}

/**
 * Erases a key slot, or all that a passphrase opens. The key material is gone before the slot is marked as free.
 * @throws Qcow2Error `ERR_NOT_FOUND` if there is nothing to erase, `ERR_BUSY` if no slot would be left; RangeError for a slot there
 * cannot be; what `openLuks` throws.
 */
export async function eraseKeySlots(area: Uint8Array, which: ErasedKeySlots, options: EraseKeySlotsOptions = {}): Promise<SlotChange> {
  const { slot: only, passphrase } = which
  if (only === undefined && passphrase === undefined) throw new TypeError('which key slots? Give a slot or a passphrase')
  if (only !== undefined) checkSlot(only)
  let header = readLuksHeader(area)
  const slots: number[] = []
  for (const [index, slot] of header.slots.entries()) {
    options.signal?.throwIfAborted()
    if (!slot.active || (only !== undefined && only !== index)) continue
    if (passphrase === undefined || (await unsealKey(header, slot, area, passphrase)) !== undefined) slots.push(index)
  }
  if (slots.length === 0) {
    const isUsed = only === undefined || header.slots[only]!.active
    throw new Qcow2Error('ERR_NOT_FOUND', isUsed ? `the passphrase opens ${only === undefined ? 'no key slot' : `a slot other than ${only}, or none`}` : `key slot ${only} is not in use`)
  }
  const isLast = header.slots.every(({ active }, index) => !active || slots.includes(index))
  if (isLast && options.evenLast !== true) throw new Qcow2Error('ERR_BUSY', 'no key slot would be left, and the data would be lost; add another passphrase first')
  const writes = []
  for (const index of slots) {
    const emptied = emptySlot(header, index)
    writes.push(...emptied.writes)
    header = emptied.header
  }
  return { slots, writes }
}

interface Filled {
  readonly header: LuksHeader
  readonly writes: LuksWrites
}

interface SlotContent {
  readonly key: Uint8Array
  readonly passphrase: string | Uint8Array
  readonly iterations: number
}

/** The material is durable before the header names it. */
async function fillSlot(header: LuksHeader, areaLength: number, index: number, { key, passphrase, iterations }: SlotContent): Promise<Filled> {
  const slot: LuksKeySlot = { ...header.slots[index]!, active: true, iterations, salt: randomBytes(32) }
  checkPlace(header, areaLength, index)
  const bytes = await sealKey(header, slot, key, passphrase)
  const changed = withSlot(header, index, slot)
  return { header: changed, writes: [{ offset: slot.keyOffset, bytes }, ...headerWrites(changed)] }
}

/** What was the material is noise before the header lets go of it. */
function emptySlot(header: LuksHeader, index: number): Filled {
  const slot = header.slots[index]!
  const changed = withSlot(header, index, { ...slot, active: false, iterations: 0, salt: new Uint8Array(32) })
  return { header: changed, writes: [{ offset: slot.keyOffset, bytes: randomBytes(materialLength(header.keyBytes, slot)) }, ...headerWrites(changed)] }
}

function withSlot(header: LuksHeader, index: number, slot: LuksKeySlot): LuksHeader {
  return { ...header, slots: header.slots.map((other, at) => (at === index ? slot : other)) }
}

/** The second sector first: the state of every slot but the last is in the first one, which makes the change. */
function headerWrites(header: LuksHeader): LuksWrites {
  const bytes = encodeLuksHeader(header)
  return [
    { offset: 512, bytes: bytes.subarray(512) },
    { offset: 0, bytes: bytes.subarray(0, 512) },
  ]
}

/** A free slot says where its material goes; nothing has looked at that yet. */
function checkPlace(header: LuksHeader, areaLength: number, index: number): void {
  const { keyOffset, stripes } = header.slots[index]!
  const end = keyOffset + materialLength(header.keyBytes, { stripes })
  const meets = header.slots.some((other, at) => at !== index && other.active && other.keyOffset < end && keyOffset < other.keyOffset + materialLength(header.keyBytes, other))
  if (stripes === stripeCount && keyOffset >= 1024 && end <= areaLength && !meets) return
  throw new FormatError(`places ${stripes} stripes at ${keyOffset}, where other data lies or the LUKS area of ${areaLength} bytes ends`, { structure: 'LUKS header', field: `key slot ${index}` })
}

function checkSlot(slot: number): void {
  if (!Number.isInteger(slot) || slot < 0 || slot >= keySlotCount) throw new RangeError(`a key slot is 0 to ${keySlotCount - 1}, not ${slot}`)
}
