import { Qcow2Error } from '../../core/errors.ts'
import type { ImageInfo } from '../../qcow2/info.ts'
import type { SnapshotInfo } from '../../qcow2/snapshot-info.ts'
import type { Snapshots } from '../../qcow2/snapshots.ts'
import { command } from '../command.ts'
import { ExitError, UsageError } from '../errors.ts'
import { forceShareOption, formatOption, imageOptsOption, objectOption, openArgument, outputOption, quietOption } from '../image/options.ts'
import { prettyJson, type SnapshotEntry } from '../print/shapes.ts'
import { snapshotTable } from '../print/snapshots.ts'
import { nameFor } from '../terminal.ts'

const actions = ['list', 'create', 'apply', 'delete', 'rename'] as const
type Action = (typeof actions)[number]

export const snapshotCommand = command({
  name: 'snapshot',
  summary: 'List, take, apply or delete the snapshots inside an image',
  description: ['Without an action the snapshots are listed. Do not change the snapshots of an image that a VM is using.'],
  options: {
    list: { short: 'l', help: 'list the snapshots (default)' },
    create: { short: 'c', value: 'SNAPSHOT', help: 'take a snapshot of the disk' },
    apply: { short: 'a', value: 'SNAPSHOT', help: 'make the disk what it was at the snapshot (by id or name)' },
    delete: { short: 'd', value: 'SNAPSHOT', help: 'delete the snapshot (by name)' },
    rename: { value: 'SNAPSHOT=NAME', help: 'give a snapshot (by id or name) another name' },
    ...formatOption,
    ...imageOptsOption,
    ...outputOption,
    ...forceShareOption,
    ...objectOption,
    ...quietOption,
  },
  arguments: [{ name: 'FILENAME', help: 'the image' }],
  examples: [
    { line: 'qcow2 snapshot -c before-update disk.qcow2', shows: 'take a snapshot' },
    { line: 'qcow2 snapshot disk.qcow2', shows: 'list them' },
    { line: 'qcow2 snapshot -a before-update disk.qcow2', shows: 'go back' },
  ],
  async run(context) {
    const { options, order, print } = context
    const asked = actions.filter((action) => order.some(({ option }) => option === action))
    if (asked.length > 1) throw new UsageError("Cannot mix '-l', '-a', '-c', '-d'")
    const action = asked[0] ?? 'list'
    const opened = await openArgument(context, { readOnly: action === 'list', withoutBacking: true })
    try {
      const snapshots = opened.image?.snapshots
      if (action === 'list') {
        const entries = [...(snapshots ?? [])].map(snapshotEntry)
        if (options.output === 'json') await print(prettyJson(entries))
        else for (const line of snapshotTable(entries, nameFor(context.terminal.stdout))) await print(line)
        return 0
      }
      if (snapshots === undefined) throw new ExitError(1, `Could not ${action} snapshot: a ${opened.format} image has none`)
      await change(snapshots, action, options[action]!)
      return 0
    } finally {
      await opened.close()
    }
  },
})

async function change(snapshots: Snapshots, action: Exclude<Action, 'list'>, value: string): Promise<void> {
  try {
    switch (action) {
      case 'create':
        await snapshots.create({ name: value, icount: 0n }) // as qemu-img records it
        return
      case 'apply':
        await snapshots.apply(value)
        return
      case 'delete':
        await snapshots.delete(byName(snapshots, value))
        return
      case 'rename': {
        const equals = value.indexOf('=')
        if (equals < 0) throw new UsageError('--rename takes SNAPSHOT=NAME')
        await snapshots.rename(value.slice(0, equals), value.slice(equals + 1))
      }
    }
  } catch (error) {
    if (error instanceof UsageError) throw error
    throw new ExitError(1, `Could not ${action} snapshot '${value}': ${reason(action, error)}`, { cause: error })
  }
}

/** The id of the first snapshot of that name: a name may look like another's id. */
function byName(snapshots: Snapshots, name: string): string {
  for (const snapshot of snapshots) if (snapshot.name === name) return snapshot.id
  throw new Qcow2Error('ERR_NOT_FOUND', 'snapshot not found')
}

function reason(action: Action, error: unknown): string {
  if (action === 'apply' && Qcow2Error.is(error, 'ERR_NOT_FOUND')) return 'Failed to load snapshot: No such file or directory'
  return error instanceof Error ? error.message : String(error)
}

/** A snapshot in QEMU's fields. */
export function snapshotEntry(snapshot: SnapshotInfo): SnapshotEntry {
  const { id, name, date, dateNanoseconds, vmClock, vmStateSize, icount } = snapshot
  return {
    id,
    name,
    'vm-state-size': vmStateSize,
    'date-sec': Math.floor(date.getTime() / 1000),
    'date-nsec': dateNanoseconds,
    'vm-clock-sec': Number(vmClock / 1_000_000_000n),
    'vm-clock-nsec': Number(vmClock % 1_000_000_000n),
    ...(icount === undefined ? {} : { icount: Number(icount) }),
  }
}

/**
 * The snapshot with this id, else the first with this name.
 * @throws ExitError
 */
export function snapshotIn({ snapshots }: Pick<ImageInfo, 'snapshots'>, idOrName: string): SnapshotInfo {
  const found = snapshots.find(({ id }) => id === idOrName) ?? snapshots.find(({ name }) => name === idOrName)
  if (found !== undefined) return found
  const names = snapshots.map(({ name }) => name).join(', ')
  throw new ExitError(1, `the image has no snapshot ${JSON.stringify(idOrName)}; it has ${names === '' ? 'none' : names}`)
}
