/**
 * Migration capabilities and parameters of a QEMU, set for one task and put back afterwards. Owns which of them a task of this
 * library runs with: those it names, and no other. A capability may leave memory out of the stream (`x-ignore-shared`), move it
 * elsewhere (`multifd`, `mapped-ram`, `rdma-pin-all`) or add what no page is (`block`, `colo`), and every QEMU brings new ones.
 */
import type { Qmp } from '../qmp/client.ts'
import type { MigrationCapability } from '../qmp/commands.ts'

/** What a task needs. */
export interface MigrationSettings {
  /** Capabilities that are on; all others that QEMU knows are off. */
  readonly on: readonly string[]
  /** Capabilities that stay as they are. */
  readonly untouched?: readonly string[] | undefined
  /** Parameters and their values; those that QEMU does not know, or that have the value already, are left out. */
  readonly parameters?: Readonly<Record<string, number | string>> | undefined
}

/** No limit on the bandwidth, in bytes a second. */
const unlimited = 2 ** 40

/** How the memory of a VM is sent for a save: one plain connection, with all of memory. */
export function settingsOf(mode: 'background' | 'stop' | 'precopy', more: readonly string[] = []): MigrationSettings {
  return {
    on: ['events', ...(mode === 'background' ? ['background-snapshot'] : []), ...more],
    parameters: { 'max-bandwidth': unlimited, 'tls-creds': '', 'mode': 'normal' },
  }
}

/**
 * How a QEMU has to wait for a saved VM: the same, so that what it expects is what is sent. What concerns only itself
 * (`late-block-activate`: disks are opened when it is told to `cont`) stays.
 */
export function destinationSettings(on: readonly string[], untouched: readonly string[] = []): MigrationSettings {
  return { on: ['events', ...on], untouched: ['late-block-activate', ...untouched], parameters: { 'tls-creds': '' } }
}

/**
 * Runs `task` under the settings and restores what was there before, whatever the task does. An error of the task comes
 * before one of restoring: a QEMU that has gone fails both.
 * @throws QmpError (`ERR_QMP`) if QEMU refuses a setting; nothing is changed then.
 */
export async function withMigrationSettings<T>(qmp: Qmp, settings: MigrationSettings, task: () => Promise<T>): Promise<T> {
  const restore = await changeMigrationSettings(qmp, settings)
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

/**
 * Makes the settings, and gives what sets back what was there before.
 * @throws QmpError (`ERR_QMP`) if QEMU refuses a setting; nothing is changed then.
 */
export async function changeMigrationSettings(qmp: Qmp, settings: MigrationSettings): Promise<() => Promise<void>> {
  const { on, untouched = [] } = settings
  const before = await qmp.execute('query-migrate-capabilities')
  const changes = before.filter(({ capability, state }) => !untouched.includes(capability) && on.includes(capability) !== state)
  const wanted = changes.map(({ capability, state }) => ({ capability, state: !state }))
  // QEMU says itself that it does not know one
  const missing = on.filter((name) => !before.some(({ capability }) => capability === name)).map((capability) => ({ capability, state: true }))
  let restoreParameters = (): Promise<unknown> => Promise.resolve()
  try {
    await setCapabilities(qmp, [...wanted, ...missing])
    restoreParameters = await changeParameters(qmp, settings.parameters ?? {})
  } catch (error) {
    await setCapabilities(qmp, changes).catch(() => undefined)
    throw error
  }
  return async () => {
    await restoreParameters().finally(() => setCapabilities(qmp, changes))
  }
}

async function changeParameters(qmp: Qmp, parameters: NonNullable<MigrationSettings['parameters']>): Promise<() => Promise<unknown>> {
  const before = await qmp.execute('query-migrate-parameters')
  const changes = Object.entries(parameters).filter(([name, value]) => name in before && before[name] !== value)
  if (changes.length === 0) return () => Promise.resolve()
  await qmp.execute('migrate-set-parameters', Object.fromEntries(changes))
  return () => qmp.execute('migrate-set-parameters', Object.fromEntries(changes.map(([name]) => [name, before[name]])))
}

/** Off before on: what is switched on may not go together with what is switched off. */
async function setCapabilities(qmp: Qmp, capabilities: readonly MigrationCapability[]): Promise<void> {
  for (const state of [false, true]) {
    const some = capabilities.filter((capability) => capability.state === state)
    if (some.length > 0) await qmp.execute('migrate-set-capabilities', { capabilities: some })
  }
}
