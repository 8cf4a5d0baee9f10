/** Opening the saved VM that a name means, for those who start it again: whatever holds an image, with its key. */
import { Qcow2Error } from '../../core/errors.ts'
import type { BlockDevice } from '../../block/device.ts'
import type { Reference } from '../../qcow2/references.ts'
import { temporaryFile } from '../../snapshot/host-spool.ts'
import { openSaved } from '../../snapshot/open-saved.ts'
import type { PageSource } from '../../snapshot/page-source.ts'
import { faultRead } from '../../snapshot/revert.ts'
import type { Context, OptionDefinitions } from '../command.ts'
import { ExitError } from '../errors.ts'
import { resolveBacking, splitAddress, splitSnapshot } from './names.ts'
import { Opener } from './open.ts'
import { openerFor } from './options.ts'
import { couldNotOpen } from './reasons.ts'
import { secretOf } from './secrets.ts'
import { parseName, type ImageSpec } from './spec.ts'

/** A saved VM, and the local file it is in, if it is in one. */
export interface OpenedSavedVm {
  readonly saved: PageSource
  readonly path: string | undefined
}

/**
 * Opens `FILE` or `IMAGE@SNAPSHOT`, by path, address or options as every image. A QEMU may have the file open: it may be the
 * disk of the VM that is to be reverted.
 */
export async function openSavedVm<O extends OptionDefinitions>(context: Context<O>, name: string): Promise<OpenedSavedVm> {
  const { signal } = context
  const opener = new Opener({ ...openerFor(context).settings, forceShare: true })
  try {
    const { spec, host, snapshot } = await openBytes(opener, name)
    const references = async ({ kind, name: below, format }: Reference): Promise<boolean | BlockDevice> =>
      kind === 'backing file' && (await opener.spec(parseName(resolveBacking(spec.place, below), format), { readOnly: true })).device
    const passphrase = spec.keySecret === undefined ? undefined : secretOf(opener.settings.secrets, spec.keySecret)
    const saved = await openSaved(host, { snapshot, references, passphrase, syncLimit: faultRead, spool: temporaryFile, signal })
    return { saved, path: spec.place.kind === 'file' ? spec.place.path : undefined }
  } catch (error) {
    signal.throwIfAborted()
    if (error instanceof ExitError) throw error
    // which saved VMs there are is all there is to say
    if (Qcow2Error.is(error, 'ERR_NOT_FOUND') && error.cause === undefined) throw new ExitError(1, `${name}: ${error.message}`, { cause: error })
    throw couldNotOpen(name, error)
  }
}

interface OpenedBytes {
  readonly spec: ImageSpec
  readonly host: BlockDevice
  readonly snapshot?: string
}

/** What is there by the whole name is meant before what is by a part of it. */
async function openBytes(opener: Opener, name: string): Promise<OpenedBytes> {
  const open = async (file: string): Promise<OpenedBytes> => {
    const spec = parseName(file, undefined)
    return { spec, host: await opener.bytes(spec.place, { readOnly: true, syncLimit: faultRead }) }
  }
  const local = splitSnapshot(name)
  if (local !== undefined) return { ...(await open(local.file)), snapshot: local.snapshot }
  const remote = splitAddress(name)
  return open(name).catch(async (error: unknown) => {
    if (remote === undefined || opener.settings.signal.aborted) throw error
    const found = await open(remote.file).catch(() => undefined)
    if (found === undefined) throw error
    return { ...found, snapshot: remote.snapshot }
  })
}
