/** The captures of real streams under `test/fixtures/captures`, unpacked, with what each must give. */
import { createHash } from 'node:crypto'
import { readdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { gunzipSync } from 'node:zlib'

const folder = join(import.meta.dirname, '../fixtures/captures')

/** What `expected.json` says of one capture. */
export interface Expected {
  readonly sha256: string
  readonly raw_bytes: number
  readonly machine?: string
  readonly capabilities?: readonly string[]
  readonly blocks?: Readonly<Record<string, number>>
  readonly gpa?: Readonly<Record<string, number>>
  readonly counts?: Readonly<Record<'zero' | 'normal' | 'xbzrle' | 'compressed' | 'eos' | 'multifd_flush' | 'repeated', number>>
  readonly sections?: readonly (readonly [type: string, id: number, name: string, instance: number])[]
  readonly eof_offset?: number
  readonly vmdesc_length?: number
  readonly part_sections?: number
  readonly device_sections?: number
  readonly ram_sha256?: Readonly<Record<string, string>>
  readonly guest?: { readonly consistent: boolean; readonly tick: number; readonly npages: number } | null
}

export const expected = JSON.parse(readFileSync(join(folder, 'expected.json'), 'utf8')) as Record<string, Expected>

const cache = new Map<string, Uint8Array>()

/** The bytes of a capture. */
export function capture(name: string): Uint8Array {
  let bytes = cache.get(name)
  if (bytes === undefined) {
    bytes = new Uint8Array(gunzipSync(readFileSync(join(folder, `${name}.gz`))))
    cache.set(name, bytes)
  }
  return bytes
}

/** All captures, or those whose name matches. */
export function captureNames(matching = /./): string[] {
  return readdirSync(folder)
    .filter((file) => file.endsWith('.gz'))
    .map((file) => file.slice(0, -3))
    .filter((name) => matching.test(name))
}

/** Captures that are a whole stream with a VM description. */
export const wholeStreams: string[] = captureNames(/\.(mig|vmstate)$/)

export function sha256(bytes: Uint8Array): string {
  return createHash('sha256').update(bytes).digest('hex')
}

/** The guest program's own check of its memory; see the captures' README. */
export function guestProblems(ram: Uint8Array): string[] {
  const view = new DataView(ram.buffer, ram.byteOffset, ram.byteLength)
  const word = (address: number): number => view.getUint32(address, true)
  const total = word(0x100008)
  const pages = word(0x10000c)
  const problems: string[] = []
  let sum = 0
  for (let i = 0; i < pages; i++) {
    const page = 0x110000 + i * 4096
    const generation = word(page + 4)
    sum = (sum + generation) >>> 0
    const check = (Math.imul(generation, 0x9e3779b1) ^ i) >>> 0
    if (word(page) !== (i ^ 0x5a5a1234) >>> 0 || word(page + 8) !== check || word(page + 0xffc) !== check) problems.push(`page ${i}`)
  }
  if (pages === 0) problems.push('no pages')
  if (sum !== total) problems.push(`sum ${sum} is not ${total}`)
  return problems
}
