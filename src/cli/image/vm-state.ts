/** Finding the VM state a name means: a snapshot's, or a stream file itself. */
import { VmState } from '../../migration/vm-state.ts'
import { temporaryFile } from '../../snapshot/host-spool.ts'
import { RamImage } from '../../snapshot/ram-image.ts'
import type { Context, OptionDefinitions } from '../command.ts'
import { ExitError } from '../errors.ts'
import type { OpenedImage } from './opened.ts'
import type { OpenHow } from './open-settings.ts'
import { couldNotOpen } from './reasons.ts'
import { openerFor } from './options.ts'

/** An indexed VM state and what it stands on. */
export interface OpenedVmState {
  readonly name: string
  readonly vm: VmState
  readonly close: () => Promise<void>
}

/**
 * Opens and indexes the VM state of `IMAGE@SNAPSHOT`, of an image's only snapshot that has one, or of
 * a stream file (plain, mapped-ram, of libvirt, compressed).
 */
export async function openVmState<O extends OptionDefinitions>(context: Context<O>, name: string): Promise<OpenedVmState> {
  const opened = await openImageOrStream(context, name)
  try {
    const vm = await indexed(opened, context.signal)
    const close = async (): Promise<void> => {
      await vm.close()
      await opened.close()
    }
    return { name: opened.filename, vm, close }
  } catch (error) {
    await opened.close()
    if (error instanceof ExitError || context.signal.aborted) throw error
    throw couldNotOpen(name, error)
  }
}

/** The VM state: of a RAM image with its pages, which are the disk of the snapshot. */
async function indexed({ snapshot, host, filename }: OpenedImage, signal: AbortSignal): Promise<VmState> {
  if (snapshot === undefined) return VmState.index(host, { keepOpen: true, spool: temporaryFile, signal })
  if (snapshot.vmState.size === 0) throw new ExitError(1, `${filename} has no VM state`)
  const ram = await RamImage.at(snapshot, { signal })
  return ram === undefined ? VmState.index(snapshot.vmState, { keepOpen: true, signal }) : ram.vmState({ signal })
}

/** The image of a name with its backing file only where pages are in it: VM state is in the image itself. */
async function openAlone(open: (how: OpenHow) => Promise<OpenedImage>): Promise<OpenedImage> {
  const alone = await open({ readOnly: true, withoutBacking: true })
  const { image, snapshot } = alone
  if (image?.engine.content.backingFile === undefined || snapshot === undefined || !(await RamImage.isAt(snapshot))) return alone
  await alone.close()
  return open({ readOnly: true })
}

/** An image at a snapshot with VM state, or a file taken as it is. */
async function openImageOrStream<O extends OptionDefinitions>(context: Context<O>, name: string): Promise<OpenedImage> {
  const opener = openerFor(context)
  const opened = await openAlone((how) => opener.name(name, how))
  if (opened.image === undefined || opened.snapshot !== undefined) return opened
  const saved = [...opened.image.snapshots].filter(({ vmStateSize }) => vmStateSize > 0)
  await opened.close()
  if (saved.length === 1) {
    // opened by its id, which no other snapshot has, and shown by its name
    const only = await openAlone((how) => opener.snapshot(name, saved[0]!.id, how))
    return { ...only, filename: `${opened.filename}@${saved[0]!.name}` }
  }
  const names = saved.map((snapshot) => `${name}@${snapshot.name}`).join(', ')
  throw new ExitError(1, saved.length === 0 ? `${name} has no snapshot with VM state` : `name one of ${names}`)
}
