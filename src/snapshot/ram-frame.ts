/** The START and END of the `ram` section of a saved VM, as bytes. */
import { encodeRecord, type WritableRecord } from '../migration/writer.ts'
import type { PageSource } from './page-source.ts'

/**
 * START with the list of RAM blocks, or END. `hostPageSizes` names blocks whose pages at a postcopy
 * destination are larger than the target's: the list then tells their sizes.
 */
export function ramSection(
  source: PageSource,
  type: 'start' | 'end',
  hostPageSizes: Readonly<Record<string, number>> = {},
): Uint8Array[] {
  const { ramSectionId: id, footers, blocks, pageSize } = source
  const entries = blocks.map(({ name, length }, index): WritableRecord => {
    const hostPageSize = hostPageSizes[name] ?? pageSize
    return { kind: 'ram-block', block: { index, name, length, ...(hostPageSize !== pageSize && { hostPageSize }) } }
  })
  const total = blocks.reduce((sum, { length }) => sum + length, 0)
  const records: WritableRecord[] = [
    { kind: 'section', type, id, idstr: 'ram', instanceId: 0, versionId: 4 },
    ...(type === 'start' ? [{ kind: 'ram-size', total } as const, ...entries] : []),
    { kind: 'ram-mark', mark: 'eos' },
    ...(footers ? [{ kind: 'footer', id } as const] : []),
  ]
  return records.map((record) => encodeRecord(record))
}
