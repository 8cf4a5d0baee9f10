/** A file for what does not fit into memory, that nobody sees and that is gone when it is closed. */
import { open, unlink } from 'node:fs/promises'
import { randomUUID } from 'node:crypto'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { BlockDevice } from '../block/device.ts'
import { openFile } from '../block/file.ts'

/** An empty growable file without a name, in the system's folder for temporary files (`TMPDIR`). */
export async function temporaryFile(): Promise<BlockDevice> {
  const path = join(tmpdir(), `qcow2-${randomUUID()}`)
  const handle = await open(path, 'wx+', 0o600)
  await unlink(path)
  return openFile(handle)
}
