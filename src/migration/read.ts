/** Reading a stream from any byte source: the parser with an asynchronous front. */
import type { CallOptions } from '../block/device.ts'
import { chunksOf, type ByteSource } from './byte-source.ts'
import type { ParserOptions } from './framing.ts'
import { MigrationParser } from './parser.ts'
import type { MigrationRecord } from './records.ts'

/** Options of {@link readMigration}. */
export interface ReadMigrationOptions extends ParserOptions, CallOptions {}

/**
 * The records of a migration stream, in order, in bounded memory. A record is valid until the next
 * is asked for.
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
    yield* parser.push(chunk)
  }
  parser.end()
}
