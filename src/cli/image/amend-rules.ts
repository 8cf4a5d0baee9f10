/** What `amend` may change of an image, and what it answers otherwise: in qemu-img's words, which scripts match. */
import { incompatible } from '../../qcow2/features.ts'
import type { ImageInfo } from '../../qcow2/info.ts'
import { ExitError } from '../errors.ts'
import { isAmendable, switchOf, versionOf, type CreateValues } from './create-options.ts'

/** @throws ExitError where the options contradict the format, each other or the image. */
export function refuseAmendment(values: CreateValues, image: ImageInfo): void {
  for (const name of values.keys()) {
    if (!isAmendable(name)) throw new ExitError(1, `Invalid parameter '${name}'\nThis option is only supported for image creation`)
  }
  const version = amendedVersion(values) ?? image.version
  const bits = Number(values.get('refcount_bits') ?? image.refcountBits)
  const raw = switchOf(values, 'data_file_raw')
  check([1, 2, 4, 8, 16, 32, 64].includes(bits), 'Refcount width must be a power of two and may not exceed 64 bits')
  check(image.externalData || values.get('data_file') === undefined, 'data-file can only be set for images that use an external data file')
  check(raw !== true || image.dataFileRaw, 'data-file-raw cannot be set on existing images')
  refuseOtherBacking(values, image)
  if (version === 3) return
  check(switchOf(values, 'lazy_refcounts') !== true, 'Lazy refcounts only supported with compatibility level 1.1 and above (use compat=1.1 or greater)')
  if (image.version === 2) {
    check(bits === 16, 'Refcount widths other than 16 bits require compatibility level 1.1 or above (use compat=1.1 or greater)')
  } else {
    check(bits === 16, 'compat=0.10 requires refcount_bits=16')
    refuseFeatures(image)
  }
}

/** The version asked for, if one is. @throws ExitError for one there is not. */
export function amendedVersion(values: CreateValues): 2 | 3 | undefined {
  const compat = values.get('compat')
  try {
    return compat === undefined ? undefined : versionOf(compat)
  } catch (cause) {
    throw new ExitError(1, `Unknown compatibility level ${compat}`, { cause })
  }
}

function refuseOtherBacking(values: CreateValues, image: ImageInfo): void {
  const [file, format] = [values.get('backing_file'), values.get('backing_fmt')]
  if (file === undefined && format === undefined) return
  check(file === image.backingFile && format === image.backingFormat, "Cannot amend the backing file\nYou can use 'qemu-img rebase' instead.")
}

/** What version 2 does not have. Snapshots are looked at later, as a new size of the disk decides about them; so are compressed clusters. */
function refuseFeatures(image: ImageInfo): void {
  check(!image.externalData, 'Cannot downgrade an image with a data file')
  check(!image.extendedL2, `Cannot downgrade an image with incompatible features 0x${incompatible.extendedL2.toString(16)} set`)
}

function check(condition: boolean, message: string): void {
  if (!condition) throw new ExitError(1, message)
}
