/**
 * What `--output=json` prints, with QEMU's own field names (its QAPI schema: ImageInfo, ImageCheck,
 * MapEntry, BlockMeasureInfo). The human forms are printed from the same values. Sizes in bytes.
 */

/** A value as JSON has it. */
export type Json = string | number | boolean | null | readonly Json[] | { readonly [key: string]: Json | undefined }

/** An internal snapshot. */
export interface SnapshotEntry {
  readonly id: string
  readonly name: string
  readonly 'vm-state-size': number
  readonly 'date-sec': number
  readonly 'date-nsec': number
  readonly 'vm-clock-sec': number
  readonly 'vm-clock-nsec': number
  /** Absent where no instruction count was recorded. */
  readonly icount?: number
}

/** One image, or the file below it. */
export interface ImageEntry {
  readonly filename: string
  readonly format: string
  readonly 'virtual-size': number
  /** Bytes the file takes on its host. */
  readonly 'actual-size'?: number
  readonly 'cluster-size'?: number
  readonly 'dirty-flag': boolean
  readonly encrypted?: boolean
  readonly compressed?: boolean
  readonly 'backing-filename'?: string
  readonly 'full-backing-filename'?: string
  readonly 'backing-filename-format'?: string
  readonly snapshots?: readonly SnapshotEntry[]
  readonly 'format-specific'?: { readonly type: string; readonly data: { readonly [key: string]: Json | undefined } }
  readonly children?: readonly { readonly name: string; readonly info: ImageEntry }[]
}

/** One run of a map. */
export interface MapEntry {
  readonly start: number
  readonly length: number
  readonly depth: number
  readonly present: boolean
  readonly zero: boolean
  readonly data: boolean
  readonly compressed: boolean
  readonly offset?: number
}

/** The outcome of a check. Counts that are 0 may be absent. */
export interface CheckEntry {
  readonly filename: string
  readonly format: string
  readonly 'check-errors': number
  readonly 'image-end-offset'?: number
  readonly corruptions?: number
  readonly leaks?: number
  readonly 'corruptions-fixed'?: number
  readonly 'leaks-fixed'?: number
  readonly 'total-clusters'?: number
  readonly 'allocated-clusters'?: number
  readonly 'fragmented-clusters'?: number
  readonly 'compressed-clusters'?: number
}

/** The outcome of a measurement. */
export interface MeasureEntry {
  readonly required: number
  readonly 'fully-allocated': number
  readonly bitmaps?: number
}

/** Pretty JSON, four spaces. */
export function prettyJson(value: unknown): string {
  return JSON.stringify(value, null, 4)
}
