/** Sizes as people write and read them. Owns the suffixes; 1 KiB is 1024 bytes throughout. */
import { UsageError } from './errors.ts'

const suffixes = 'BKMGTPE'

/**
 * Bytes of `10G`, `1.5M`, `512`, `64k`, `0x200`: a number with an optional suffix of
 * `b K M G T P E`, powers of 1024. Without a suffix `unit` bytes each.
 * @returns `undefined` for what is no size
 */
export function parseSize(text: string, unit = 1): number | undefined {
  const match = /^(0x[\da-f]+|\d+(?:\.\d*)?)([bkmgtpe]?)$/i.exec(text.trim())
  if (match === null) return undefined
  const [, digits = '', suffix = ''] = match
  const hexadecimal = /^0x/i.test(digits)
  const factor = suffix === '' ? unit : 1024 ** suffixes.indexOf(suffix.toUpperCase())
  // bytes cannot be cut
  if (factor === 1 && digits.includes('.') && Number(digits) % 1 !== 0) return undefined
  const bytes = hexadecimal ? Number(digits) * factor : Math.trunc(Number(digits) * factor)
  return Number.isSafeInteger(bytes) ? bytes : undefined
}

/**
 * As {@link parseSize}, for an option or argument called `what`.
 * @throws UsageError
 */
export function requireSize(text: string, what: string): number {
  const bytes = parseSize(text)
  if (bytes === undefined) throw new UsageError(`Invalid ${what} specified: '${text}'. Sizes are numbers with an optional suffix of b, K, M, G, T, P or E`)
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
