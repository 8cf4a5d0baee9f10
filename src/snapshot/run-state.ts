/**
 * The run state of a VM, as `query-status` calls it, and what it means for a save. Owns which VMs can be saved, and which stand
 * still: everything else goes by that, and no state is taken for `paused` that is not.
 */
import { Qcow2Error } from '../core/errors.ts'
import type { Qmp } from '../qmp/client.ts'
import type { RunStatus } from '../qmp/commands.ts'

/** States in which there is no VM to save, or not here, and what to do. */
const refused: Readonly<Record<string, string>> = {
  'inmigrate': 'it waits for the memory of another VM (-incoming); save it when that has arrived',
  'postmigrate': 'a migration has handed it over; if no other QEMU runs it, `cont` takes it back, then it can be saved',
  'finish-migrate': 'a migration is handing it over; wait until that has ended',
  'save-vm': 'it is being saved; wait until that has ended',
  'restore-vm': 'it is being loaded; wait until that has ended',
  'colo': 'it is the copy of a VM that runs elsewhere (COLO)',
  'preconfig': 'it is not set up yet; `x-exit-preconfig` ends that',
}

/**
 * The run state of a VM that can be saved.
 * @throws Qcow2Error `ERR_BUSY` in a state in which there is nothing to save, with what to do
 */
export async function savableState(qmp: Qmp): Promise<RunStatus> {
  const state = await qmp.execute('query-status')
  const why = refused[state.status]
  if (why === undefined) return state
  throw new Qcow2Error('ERR_BUSY', `the VM cannot be saved now: its state is ${state.status}: ${why}`)
}

/**
 * Stops a running guest. False if it stopped by itself meanwhile, in another state than `paused` (`io-error`, `shutdown`,
 * `guest-panicked`, …).
 */
export async function stopGuest(qmp: Qmp): Promise<boolean> {
  await qmp.execute('stop')
  return (await qmp.execute('query-status')).status === 'paused'
}
