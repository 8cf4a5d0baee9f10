/**
 * The sections of a stream: which ids were introduced, and what heads and footers say about them. Owns the rule that
 * footers come behind every section or behind none; knows nothing of bodies.
 *
 * ```
 * START 01 | FULL 04   be32 id, u8 length, idstr, be32 instance id, be32 version id
 * PART 02 | END 03     be32 id
 * footer 7e            be32 id
 * ```
 */
import { UnsupportedError } from '../core/errors.ts'
import { hex, limits, sectionByte, streamError } from './format.ts'
import type { ParserInput } from './input.ts'
import type { FooterRecord, SectionRecord, SectionType } from './records.ts'

/** What the head of a section says. */
export type SectionHead = Pick<SectionRecord, 'id' | 'idstr' | 'instanceId' | 'versionId'>

/** The iterated sections whose contents are known, and the version of each. */
const knownVersions: ReadonlyMap<string, number> = new Map([['ram', 4], ['dirty-bitmap', 1]])

/** Reads the head of a START or FULL section, at whose first byte the input stands. */
export function readHead(input: ParserInput, type: SectionType): SectionRecord {
  const offset = input.offset
  input.u8()
  const id = input.u32()
  const idstr = input.counted('section header', 'idstr')
  const instanceId = input.u32()
  const versionId = input.u32()
  return { kind: 'section', type, offset, length: input.offset - offset, id, idstr, instanceId, versionId }
}

/** A section in the words of an error. */
export function named({ id, idstr }: SectionHead): string {
  return `section '${idstr}' (id ${id})`
}

/** The sections that a stream introduced so far. */
export class Sections {
  readonly #known = new Map<number, SectionHead>()
  #footers: boolean | undefined

  /** Takes over sections that another connection introduced. */
  adopt(sections: readonly Pick<SectionHead, 'id' | 'idstr'>[]): void {
    for (const { id, idstr } of sections) this.#known.set(id, { id, idstr, instanceId: 0, versionId: knownVersions.get(idstr) ?? 1 })
  }

  has(id: number): boolean {
    return this.#known.has(id)
  }

  /** Id of the first section of that name. */
  idOf(idstr: string): number | undefined {
    for (const section of this.#known.values()) if (section.idstr === idstr) return section.id
    return undefined
  }

  /** A START introduces its section. */
  introduce({ id, idstr, instanceId, versionId, offset }: SectionRecord): void {
    if (this.#known.has(id)) throw streamError('section header', 'section id', `section id ${id} is used twice`, offset + 1)
    if (this.#known.size >= limits.sections) throw streamError('section header', 'section id', `more than ${limits.sections} sections`, offset)
    const known = knownVersions.get(idstr)
    if (known === undefined) {
      throw new UnsupportedError(`section '${idstr}' (id ${id}) at offset ${offset} has no length, and its contents are not known`, [idstr])
    }
    if (versionId !== known) throw streamError(`section '${idstr}'`, 'version id', `version is ${versionId}, expected ${known}`, offset)
    this.#known.set(id, { id, idstr, instanceId, versionId })
  }

  /** Reads the head of a PART or END of a section that was introduced. */
  readAgain(input: ParserInput, type: SectionType): SectionRecord {
    const offset = input.offset
    input.u8()
    const id = input.u32()
    const section = this.#known.get(id)
    if (section === undefined) {
      throw streamError('section header', 'section id', `${type.toUpperCase()} of section id ${id}, which no START introduced`, offset + 1)
    }
    return { kind: 'section', type, offset, length: 5, ...section }
  }

  /** Reads the footer of a section; undefined in a stream without footers. */
  readFooter(input: ParserInput, section: SectionHead): FooterRecord | undefined {
    const offset = input.offset
    input.require(1)
    const byte = input.bytes[input.at]!
    if (byte !== sectionByte.footer) {
      if (this.#footers === true) throw streamError(named(section), 'footer', `footer expected, found ${hex(byte)}`, offset)
      this.#footers = false
      return undefined
    }
    input.u8()
    const found = input.u32()
    if (this.#footers === false || found !== section.id) {
      throw streamError(named(section), 'footer', `footer has section id ${found}, expected ${section.id}`, offset + 1)
    }
    this.#footers = true
    return { kind: 'footer', offset, length: 5, id: section.id }
  }
}
