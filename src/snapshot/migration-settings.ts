/** Migration capabilities and parameters of a QEMU, set for one task and put back behind it. */
import type { Qmp } from '../qmp/client.ts'
import type { MigrationCapability } from '../qmp/commands.ts'

/** What a task needs. */
export interface MigrationSettings {
  /** Capability name to state; those QEMU does not know are left out if they are to be off. */
  readonly capabilities: Readonly<Record<string, boolean>>
  readonly parameters?: Readonly<Record<string, number | string>> | undefined
}

/** Capabilities that QEMU refuses together with `background-snapshot`. */
export const notWithBackgroundSnapshot: readonly string[] = [
  'postcopy-ram',
  'multifd',
  'xbzrle',
  'return-path',
  'dirty-bitmaps',
  'validate-uuid',
  'pause-before-switchover',
  'auto-converge',
  'release-ram',
  'late-block-activate',
  'compress',
  'zero-copy-send',
  'x-colo',
  'rdma-pin-all',
  'postcopy-preempt',
  'postcopy-blocktime',
  'mapped-ram',
  'switchover-ack',
  'dirty-limit',
]

/**
 * Runs `task` under the settings and restores what was there before, whatever the task does. An error of the task comes
 * before one of restoring: a QEMU that has gone fails both.
 * @throws QmpError (`ERR_QMP`) if QEMU refuses a setting; nothing is changed then.
 */
export async function withMigrationSettings<T>(qmp: Qmp, settings: MigrationSettings, task: () => Promise<T>): Promise<T> {
  const before = await qmp.execute('query-migrate-capabilities')
  const changes = before.filter(({ capability, state }) => (settings.capabilities[capability] ?? state) !== state)
  const wanted = changes.map(({ capability, state }) => ({ capability, state: !state }))
  const missing = Object.entries(settings.capabilities)
    .filter(([name, state]) => state && !before.some(({ capability }) => capability === name))
    .map(([capability, state]) => ({ capability, state }))
  await setCapabilities(qmp, [...wanted, ...missing])
  return finallyRestore(() => withParameters(qmp, settings.parameters, task), () => setCapabilities(qmp, changes))
}

async function withParameters<T>(
  qmp: Qmp,
  parameters: MigrationSettings['parameters'],
  task: () => Promise<T>,
): Promise<T> {
  if (parameters === undefined) return task()
  const before = await qmp.execute('query-migrate-parameters')
  const restore = Object.fromEntries(Object.keys(parameters).map((name) => [name, before[name]]))
  await qmp.execute('migrate-set-parameters', parameters)
  return finallyRestore(task, () => qmp.execute('migrate-set-parameters', restore))
}

async function finallyRestore<T>(task: () => Promise<T>, restore: () => Promise<unknown>): Promise<T> {
  let result: T
  try {
    result = await task()
  } catch (error) {
    await restore().catch(() => undefined)
    throw error
  }
  await restore()
  return result
}

/** Off before on: what is switched on may not go together with what is switched off. */
async function setCapabilities(qmp: Qmp, capabilities: readonly MigrationCapability[]): Promise<void> {
  for (const state of [false, true]) {
    const some = capabilities.filter((capability) => capability.state === state)
    if (some.length > 0) await qmp.execute('migrate-set-capabilities', { capabilities: some })
  }
}
