/** Sizes as people write and read them. Owns the suffixes; 1 KiB is 1024 bytes throughout. */
import { UsageError } from './errors.ts'

const suffixes = 'BKMGTPE'

/**
 * Bytes of `10G`, `1.5M`, `512`, `64k`, `0x200`: a number with an optional suffix of
 * `b K M G T P E`, powers of 1024; hexadecimal numbers take none.
 * @returns `undefined` for what is no size below 2^53
 */
export function parseSize(text: string): number | undefined {
  const hexadecimal = /^\s*\+?(0x[\da-f]+)$/i.exec(text)
  if (hexadecimal !== null) return safe(Number(hexadecimal[1]))
  const match = /^\s*\+?(\d+(?:\.\d*)?|\.\d+)([bkmgtpe]?)$/i.exec(text)
  if (match === null) return undefined
  const [, digits = '', suffix = ''] = match
  const factor = suffix === '' ? 1 : 1024 ** suffixes.indexOf(suffix.toUpperCase())
  // bytes cannot be cut
  if (factor === 1 && Number(digits) % 1 !== 0) return undefined
  return safe(Math.trunc(Number(digits) * factor))
}

function safe(bytes: number): number | undefined {
  return Number.isSafeInteger(bytes) ? bytes : undefined
}

/** Past what QEMU takes. */
const tooManyBytes = 1n << 63n

/**
 * The size of an image to be made, as an argument, in bytes. It may be 2^53 and more: then no image can have it, but
 * it is a size.
 * @throws UsageError
 */
export function newImageSize(text: string): string {
  const match = /^\+?(\d+)([bkmgtpe]?)$/i.exec(text.trim())
  if (parseSize(text) !== undefined || match === null) return String(imageSize(text))
  const [, digits = '', suffix = ''] = match
  const bytes = BigInt(digits) << BigInt(suffix === '' ? 0 : 10 * suffixes.indexOf(suffix.toUpperCase()))
  if (bytes >= tooManyBytes) throw new UsageError(`Invalid image size specified. Must be between 0 and ${tooManyBytes - 1n}.`)
  return String(bytes)
}

/**
 * The size of an image, as an argument.
 * @throws UsageError
 */
export function imageSize(text: string): number {
  const bytes = parseSize(text)
  if (bytes !== undefined) return bytes
  if (/^-?\d+[bkmgtpe]?$/i.test(text.trim())) throw new UsageError('Invalid image size specified. Must be between 0 and 9007199254740991.')
  throw new UsageError(`Invalid image size specified: '${text}'.`)
}

/**
 * The size that an option called `name` has.
 * @throws UsageError
 */
export function optionSize(name: string, text: string): number {
  const bytes = parseSize(text)
  if (bytes === undefined) throw new UsageError(`Parameter '${name}' expects a non-negative number below 2^53; suffixes k, M, G, T, P or E are powers of 1024`)
  return bytes
}

/** `192 KiB`, `1.5 GiB`, `37.4 KiB`: three significant digits, as qemu-img prints. */
export function formatSize(bytes: number): string {
  let unit = 0
  let value = bytes
  // the step to the next unit is taken where three digits no longer say it: at 1000, not 1024
  while (value >= 1000 && unit < suffixes.length - 1) {
    value /= 1024
    unit++
  }
  return `${threeDigits(value)} ${unit === 0 ? 'B' : `${suffixes[unit]!}iB`}`
}

/** C's `%0.3g` for numbers below 1000: halves go to the even digit, and what rounds up to 1000 no longer fits. */
function threeDigits(value: number): string {
  if (value === 0) return '0'
  const scale = 10 ** (2 - Math.floor(Math.log10(value)))
  const below = Math.floor(value * scale)
  const half = value * scale - below === 0.5
  const rounded = half ? (below + (below % 2)) / scale : Number(value.toPrecision(3))
  return rounded === 1000 ? '1e+03' : String(rounded)
}
