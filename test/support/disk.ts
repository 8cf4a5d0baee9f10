/** Disks to convert: runs that are zero, that compress well, and that do not compress. */

/** A run of a disk. */
export interface DiskPiece {
  readonly length: number
  readonly kind: 'zero' | 'text' | 'noise'
}

/** The runs one behind the other, then zeroes up to whole sectors. */
export function diskOf(pieces: readonly DiskPiece[]): Uint8Array {
  const disk = new Uint8Array(Math.ceil(pieces.reduce((sum, { length }) => sum + length, 0) / 512) * 512)
  let at = 0
  let state = 1
  for (const { length, kind } of pieces) {
    for (let i = 0; i < length; i++, at++) {
      if (kind === 'zero') continue
      state = (Math.imul(state, 1103515245) + 12345) >>> 0
      disk[at] = kind === 'text' ? 97 + ((at >> 7) % 26) : state >>> 24
    }
  }
  return disk
}
