/** Reading a stream from any byte source: the parser with an asynchronous front. */
import type { CallOptions } from '../block/device.ts'
import { chunksOf, type ByteSource } from './byte-source.ts'
import type { ParserOptions } from './framing.ts'
import { MigrationParser } from './parser.ts'
import { retainPages, type MigrationRecord } from './records.ts'

/** Options of {@link readMigration}. */
export interface ReadMigrationOptions extends ParserOptions, CallOptions {}

/**
 * The records of a migration stream, in order, in bounded memory. Records and their bytes belong to the caller, where the
 * chunks of `source` do; {@link MigrationParser} gives them without a copy.
 *
 * @param source Node stream, web stream, (async) iterable of chunks, bytes, or `BlockDevice`.
 * @throws FormatError (`ERR_STREAM`) where the stream is malformed or cut short, `UnsupportedError`
 * for what cannot be read; the source's own errors pass through.
 */
export async function* readMigration(
  source: ByteSource,
  options: ReadMigrationOptions = {},
): AsyncGenerator<MigrationRecord, void, undefined> {
  const parser = new MigrationParser(options)
  for await (const chunk of chunksOf(source, options)) {
    for (const record of parser.push(chunk)) yield owned(record, chunk)
  }
  parser.end()
}

/** The record without what the parser uses again: its arrays, and the buffer for what a chunk's edge has cut. */
function owned(record: MigrationRecord, chunk: Uint8Array): MigrationRecord {
  if (record.kind === 'bytes') return record.bytes.buffer === chunk.buffer ? record : { ...record, bytes: record.bytes.slice() }
  if (record.kind !== 'ram-pages') return record
  if (record.bytes.buffer !== chunk.buffer) return retainPages(record)
  const { count, flags, pageOffsets, positions, lengths } = record
  return {
    ...record,
    flags: flags.slice(0, count),
    pageOffsets: pageOffsets.slice(0, count),
    positions: positions.slice(0, count),
    lengths: lengths.slice(0, count),
  }
}
