/**
 * Brings the tiny guest into every run state in which a VM stands still, by the devices that cause it: the monitor writes to
 * their ports, so the guest needs no code for it.
 */
import { connect } from 'node:net'
import { join } from 'node:path'
import { expect } from 'vitest'
import { Guest, type GuestOptions } from './guest.ts'
import type { Qemu } from './qemu.ts'
import { tempFolder } from './temp.ts'

/** A state that can be brought about without KVM (`internal-error` cannot). */
export type StandingState = 'paused' | 'prelaunch' | 'guest-panicked' | 'watchdog' | 'shutdown' | 'suspended' | 'debug' | 'io-error'

interface Way {
  readonly args?: (folder: string, qemu: Qemu) => string[] | Promise<string[]>
  enter(guest: Guest, folder: string): Promise<unknown>
  /** How the guest goes on: what a user would do. */
  leave(guest: Guest): Promise<unknown>
}

const cont = (guest: Guest): Promise<unknown> => guest.qmp.execute('cont')

const ways: Readonly<Record<StandingState, Way>> = {
  'paused': { enter: (guest) => guest.qmp.execute('stop'), leave: cont },
  'prelaunch': { args: () => ['-S'], enter: () => Promise.resolve(), leave: cont },
  'guest-panicked': { args: () => ['-device', 'pvpanic', '-action', 'panic=pause'], enter: (guest) => ports(guest, 'b 0x505 1'), leave: cont },
  'watchdog': { args: () => ['-device', 'ib700', '-action', 'watchdog=pause'], enter: (guest) => ports(guest, 'b 0x443 0xf'), leave: cont },
  'shutdown': {
    args: () => ['-no-reboot', '-no-shutdown'],
    enter: (guest) => guest.qmp.execute('system_reset'),
    // a VM that has shut down runs again after a reset only, which -no-reboot would turn into the same again
    leave: () => Promise.resolve(),
  },
  'suspended': {
    // ACPI of the PIIX4: the base of its registers, their enable bit, then S3 into PM1a control
    enter: (guest) => ports(guest, 'w 0xcf8 0x80000b40', 'w 0xcfc 0x601', 'w 0xcf8 0x80000b80', 'b 0xcfc 1', 'h 0x604 0x2400'),
    leave: (guest) => guest.qmp.execute('system_wakeup'),
  },
  'debug': {
    args: (folder) => ['-gdb', `unix:${join(folder, 'gdb')},server=on,wait=off`],
    enter: async (guest, folder) => {
      const debuggerOf = connect(join(folder, 'gdb'))
      debuggerOf.on('error', () => undefined)
      debuggerOf.on('data', () => debuggerOf.write('+'))
      // a single step, until QEMU has heard of it
      for (let tries = 0; tries < 50 && (await stateOf(guest)) !== 'debug'; tries++) {
        debuggerOf.write('+$s#73')
        await new Promise((resolve) => setTimeout(resolve, 300))
      }
    },
    leave: cont,
  },
  'io-error': {
    args: async (folder, qemu) => {
      const file = join(folder, 'failing.qcow2')
      await qemu.imgOk('create', '-f', 'qcow2', file, '1M')
      const fault = 'file.driver=blkdebug,file.inject-error.0.event=write_aio,file.inject-error.0.errno=28,file.inject-error.0.once=on'
      return [
        ...['-blockdev', `driver=qcow2,node-name=failing,${fault},file.image.driver=file,file.image.filename=${file}`],
        ...['-device', 'ide-hd,drive=failing,id=failing,bus=ide.0,werror=stop'],
      ]
    },
    // the IDE controller's ports are switched on; one sector is written, word by word
    enter: (guest) =>
      ports(guest, 'w 0xcf8 0x80000904', 'h 0xcfc 5', 'b 0x1f6 0xe0', 'b 0x1f2 1', 'b 0x1f3 0', 'b 0x1f4 0', 'b 0x1f5 0', 'b 0x1f7 0x30',
        ...Array.from({ length: 256 }, () => 'h 0x1f0 0x1234')),
    leave: cont,
  },
}

/** All of them. */
export const standingStates = Object.keys(ways) as StandingState[]

/** What brings a guest into states in which it stands still, and out of them. */
export interface WaysInto {
  /** Options of QEMU. */
  readonly args: readonly string[]
  readonly enter: (guest: Guest, state: StandingState) => Promise<void>
  /** Makes it go on, as a user would. */
  readonly leave: (guest: Guest, state: StandingState) => Promise<unknown>
}

/** The ways into each of `states`, for one QEMU. */
export async function waysInto(qemu: Qemu, states: readonly StandingState[]): Promise<WaysInto> {
  const folder = tempFolder()
  const args: string[] = []
  for (const state of states) args.push(...((await ways[state].args?.(folder, qemu)) ?? []))
  return {
    args,
    enter: async (guest, state) => {
      await ways[state].enter(guest, folder)
      await expect.poll(() => stateOf(guest), { timeout: 20_000, interval: 10 }).toBe(state)
    },
    leave: (guest, state) => ways[state].leave(guest),
  }
}

/** A guest that has run some rounds and now stands still. */
export async function guestIn(qemu: Qemu, state: StandingState, options: GuestOptions = {}): Promise<{ guest: Guest; leave: () => Promise<unknown> }> {
  const { args, enter, leave } = await waysInto(qemu, [state])
  const guest = await Guest.boot(qemu, { ...options, args: [...args, ...(options.args ?? [])] })
  if (state !== 'prelaunch') await guest.run(2)
  await enter(guest, state)
  return { guest, leave: () => leave(guest, state) }
}

/** The run state. */
export async function stateOf(guest: Guest): Promise<string> {
  return (await guest.qmp.execute('query-status')).status
}

async function ports(guest: Guest, ...writes: string[]): Promise<void> {
  for (const write of writes) await guest.qmp.execute('human-monitor-command', { 'command-line': `o /${write}` })
}
