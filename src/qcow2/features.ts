/**
 * The three feature words of a version 3 header (spec "Header", bytes 72 to 95) and the table that
 * names their bits. Knows the meaning of no bit beyond its name and whether this library handles it.
 *
 *   incompatible  0 dirty  1 corrupt  2 external data file  3 compression type  4 extended L2
 *   compatible    0 lazy refcounts
 *   autoclear     0 bitmaps  1 raw external data
 */
import { UnsupportedError, type UnknownFeature } from '../core/errors.ts'

/** Bits of the incompatible feature word. */
export const incompatible = {
  dirty: 1n,
  corrupt: 2n,
  dataFile: 4n,
  compressionType: 8n,
  extendedL2: 16n,
} as const

/** Bits of the compatible feature word. */
export const compatible = { lazyRefcounts: 1n } as const

/** Bits of the autoclear feature word. */
export const autoclear = { bitmaps: 1n, rawDataFile: 2n } as const

const knownIncompatible = 0b11111n
const knownAutoclear = 0b11n

/** Which of the feature words a name belongs to; its number is the type byte of the name table. */
export type FeatureWord = 'incompatible' | 'compatible' | 'autoclear'

/** One entry of the feature name table. */
export interface FeatureName {
  readonly word: FeatureWord
  readonly bit: number
  readonly name: string
}

const words: readonly FeatureWord[] = ['incompatible', 'compatible', 'autoclear']
const entrySize = 48

/** The names this library writes; QEMU writes the same. */
export const featureNames: readonly FeatureName[] = [
  { word: 'incompatible', bit: 0, name: 'dirty bit' },
  { word: 'incompatible', bit: 1, name: 'corrupt bit' },
  { word: 'incompatible', bit: 2, name: 'external data file' },
  { word: 'incompatible', bit: 3, name: 'compression type' },
  { word: 'incompatible', bit: 4, name: 'extended L2 entries' },
  { word: 'compatible', bit: 0, name: 'lazy refcounts' },
  { word: 'autoclear', bit: 0, name: 'bitmaps' },
  { word: 'autoclear', bit: 1, name: 'raw external data' },
]

/**
 * Decodes a feature name table: 48-byte entries of type (u8), bit (u8) and a name padded with zeroes.
 * Entries of unknown type are skipped; the last one may be shorter.
 */
export function decodeFeatureNames(data: Uint8Array): FeatureName[] {
  const names: FeatureName[] = []
  for (let at = 0; at + 2 < data.length; at += entrySize) {
    const word = words[data[at]!]
    if (word === undefined) continue
    const text = data.subarray(at + 2, at + entrySize)
    const end = text.indexOf(0)
    names.push({ word, bit: data[at + 1]!, name: new TextDecoder().decode(end < 0 ? text : text.subarray(0, end)) })
  }
  return names
}

/** Encodes a feature name table. Names longer than 46 bytes are cut. */
export function encodeFeatureNames(names: readonly FeatureName[]): Uint8Array {
  const data = new Uint8Array(names.length * entrySize)
  names.forEach(({ word, bit, name }, index) => {
    data[index * entrySize] = words.indexOf(word)
    data[index * entrySize + 1] = bit
    data.set(new TextEncoder().encode(name).subarray(0, entrySize - 2), index * entrySize + 2)
  })
  return data
}

/**
 * Refuses an image with incompatible features this library does not know.
 * @throws UnsupportedError with `unknownFeatures`.
 */
export function refuseUnknownFeatures(word: bigint, names: readonly FeatureName[]): void {
  const unknown = word & ~knownIncompatible
  if (unknown === 0n) return
  const unknownFeatures: UnknownFeature[] = []
  for (let bit = 0; bit < 64; bit++) {
    if (((unknown >> BigInt(bit)) & 1n) === 0n) continue
    const { name = '' } = names.find((entry) => entry.word === 'incompatible' && entry.bit === bit) ?? {}
    unknownFeatures.push(name === '' ? { bit } : { bit, name })
  }
  const features = unknownFeatures.map(({ bit, name }) => name ?? `incompatible feature bit ${bit}`)
  throw new UnsupportedError(`header: unsupported incompatible features: ${features.join(', ')} (offset 72)`, features, { unknownFeatures })
}

/** The autoclear word a writer leaves: unknown bits cleared, as the specification demands. */
export function keptAutoclear(word: bigint): bigint {
  return word & knownAutoclear
}
