/**
 * A stream without its pages: header, configuration, the list of RAM blocks, device sections, VM
 * description. It is again a well-formed stream. Owns which records stay; where pages and rest are
 * kept is the caller's business.
 */
import type { ConfigurationRecord, ConfigurationSubsection, MigrationRecord, RamBlock } from './records.ts'
import type { WritableRecord } from './writer.ts'

/** Takes the records of a stream in order and gives those that remain when its pages are kept elsewhere. */
export class StreamRest {
  #pagesSeen = false
  #dropping = false

  /**
   * True once the place was reached where the pages belong: before the first PART of RAM, or whatever
   * comes first of its END, a device section behind it and EOF.
   */
  get pagesSeen(): boolean {
    return this.#pagesSeen
  }

  /** The record as it remains, without what is special to mapped-ram; undefined if it goes. */
  accept(record: MigrationRecord): WritableRecord | undefined {
    this.#watch(record)
    switch (record.kind) {
      case 'ram-pages':
        return undefined
      case 'section':
        this.#dropping = record.type === 'part' && record.idstr === 'ram'
        return this.#dropping ? undefined : record
      case 'ram-mark':
        return this.#dropping || record.mark !== 'eos' ? undefined : record
      case 'footer':
        return this.#dropping ? undefined : record
      case 'ram-block':
        return { kind: 'ram-block', block: withoutMapping(record.block) }
      case 'configuration':
        return { ...record, subsections: withoutMappedRam(record) }
      case 'bytes':
        return record.of === 'trailing' || record.of.startsWith('mapped-ram') ? undefined : record
      default:
        return record
    }
  }

  #watch(record: MigrationRecord): void {
    const ram = record.kind === 'section' && record.idstr === 'ram' && record.type !== 'start'
    const tail = record.kind === 'bytes' && record.of === 'tail'
    if (ram || tail || record.kind === 'eof') this.#pagesSeen = true
  }
}

/** A block as a plain stream lists it. */
export function withoutMapping(block: RamBlock): RamBlock {
  const { mapped: _, ...plain } = block
  return plain
}

/** The configuration's subsections without the capability `mapped-ram`; a list of none is left out. */
export function withoutMappedRam(configuration: Pick<ConfigurationRecord, 'subsections'>): ConfigurationSubsection[] {
  const subsections: ConfigurationSubsection[] = []
  for (const part of configuration.subsections) {
    if (part.name !== 'configuration/capabilities' || !part.capabilities.includes('mapped-ram')) {
      subsections.push(part)
      continue
    }
    const capabilities = part.capabilities.filter((name) => name !== 'mapped-ram')
    if (capabilities.length > 0) subsections.push({ ...part, capabilities })
  }
  return subsections
}
