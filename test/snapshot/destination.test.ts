/** What a revert does with the QEMU it is given: sets it up and back, and says what became of it when it goes away. */
import { join } from 'node:path'
import { expect, test } from 'vitest'
import type { Qmp } from '../../src/qmp/client.ts'
import { QmpError } from '../../src/qmp/error.ts'
import { absoluteAddress, uriOf } from '../../src/snapshot/destination.ts'
import { revert, revertEagerly, type RevertOptions } from '../../src/snapshot/revert.ts'
import { Guest } from '../support/guest.ts'
import { describeWithQemu } from '../support/qemu.ts'
import { makeSave } from '../support/saves.ts'
import { tempFolder } from '../support/temp.ts'

test('addresses are the same for QEMU and for us', () => {
  expect(absoluteAddress('in')).toBe(join(process.cwd(), 'in'))
  expect(absoluteAddress({ port: 1 })).toEqual({ port: 1 })
  expect([uriOf('/a/in'), uriOf({ port: 4444 }), uriOf({ host: '::1', port: 1 }), uriOf({ host: 'host', port: 1 })]).toEqual([
    'unix:/a/in',
    'tcp:localhost:4444',
    'tcp:[::1]:1',
    'tcp:host:1',
  ])
})

const long = process.env['QCOW2_LONG'] === '1'

/** A monitor that refuses postcopy, as QEMU does where the host has no userfaultfd. */
function withoutPostcopy(qmp: Qmp): Qmp {
  const execute = (name: string, args?: Record<string, unknown>, options?: never): Promise<unknown> => {
    const on = JSON.stringify(args ?? {}).includes('{"capability":"postcopy-ram","state":true}')
    if (!on) return qmp.execute(name, args, options)
    const desc = 'Postcopy is not supported: userfaultfd not available: Operation not permitted'
    return Promise.reject(new QmpError(`migrate-set-capabilities: ${desc}`, { command: name, desc }))
  }
  return { execute: execute as Qmp['execute'], events: (...names) => qmp.events(...names) }
}

describeWithQemu('a destination', (qemu) => {
  const capabilitiesOn = async (guest: Guest): Promise<string[]> =>
    (await guest.qmp.execute('query-migrate-capabilities')).filter(({ state }) => state).map(({ capability }) => capability)
  const into = (guest: Guest, more: Partial<RevertOptions> = {}): RevertOptions => ({ qmp: guest.qmp, incoming: join(guest.folder, 'incoming'), ...more })

  test('whose capabilities somebody set for other reasons: they are off for the revert, and on again afterwards', async () => {
    const { file, memory } = await makeSave(qemu, 'RAM image')
    const harmless = ['xbzrle', 'release-ram', 'return-path', 'auto-converge', 'validate-uuid', 'zero-blocks', 'late-block-activate', 'pause-before-switchover']
    const sets = [['multifd'], ['postcopy-ram', 'postcopy-preempt'], ['mapped-ram'], ['x-ignore-shared', 'switchover-ack', ...harmless]]
    for (const set of sets) {
      for (const way of long || set.length > 2 ? [revert, revertEagerly] : [revert]) {
        const guest = await Guest.boot(qemu, { incoming: 'defer' })
        const known = (await guest.qmp.execute('query-migrate-capabilities')).map(({ capability }) => capability)
        const capabilities = set.filter((name) => known.includes(name)).map((capability) => ({ capability, state: true }))
        const refused = capabilities.length === 0 || (await guest.qmp.execute('migrate-set-capabilities', { capabilities }).then(() => false, () => true))
        if (!refused) {
          const before = await capabilitiesOn(guest)
          expect(await way(file, into(guest)), set.join()).toMatchObject({ state: 'running', warnings: [] })
          await guest.expectGoesOn(memory.tick)
          expect(await capabilitiesOn(guest)).toEqual(before)
        }
        await guest.kill()
      }
    }
  })

  test('whose host has no userfaultfd: what to do, or the fallback', async () => {
    const { file, memory } = await makeSave(qemu, 'RAM image')
    const guest = await Guest.boot(qemu, { incoming: 'defer' })
    const options = into(guest, { qmp: withoutPostcopy(guest.qmp) })
    await expect(revert(file, options)).rejects.toMatchObject({ code: 'ERR_QMP', message: expect.stringMatching(/userfaultfd.*doctor.*--eager/) as string })
    expect(await capabilitiesOn(guest)).toEqual([])
    const report = await revert(file, { ...options, fallback: 'eager' })
    expect(report).toMatchObject({ mode: 'eager', state: 'running', warnings: [expect.stringContaining('userfaultfd')] })
    await guest.expectGoesOn(memory.tick)
  })

  test('that ends because its devices are not those that were saved', async () => {
    const { file } = await makeSave(qemu, 'RAM image', { args: ['-device', 'virtio-rng-pci,addr=7'] })
    for (const way of [revert, revertEagerly]) {
      const guest = await Guest.boot(qemu, { incoming: 'defer' })
      await expect(way(file, into(guest))).rejects.toMatchObject({ code: 'ERR_STREAM', message: expect.stringMatching(/QEMU has ended; its standard error says why.*start another/) as string })
      expect(guest.stderr).toMatch(/virtio-rng|load of migration failed/)
      await guest.kill()
    }
  })

  test('that ends, without a monitor', async () => {
    const { file } = await makeSave(qemu, 'RAM image', { args: ['-device', 'virtio-rng-pci,addr=7'] })
    const incoming = join(tempFolder(), 'incoming')
    await Guest.boot(qemu, { incoming: `unix:${incoming}`, args: ['-global', 'migration.x-postcopy-ram=on'] })
    await expect(revert(file, { incoming })).rejects.toThrow(/if QEMU has ended, its standard error says why/)
  })

  test('that has its memory in a file on a disk takes no postcopy, but all at once', async () => {
    const { file, memory } = await makeSave(qemu, 'RAM image')
    const options = (folder: string): string[] => ['-object', `memory-backend-file,id=pc.ram,size=4M,share=on,mem-path=${join(folder, 'ram')}`, '-machine', 'memory-backend=pc.ram']
    const one = await Guest.boot(qemu, { incoming: 'defer', args: options(tempFolder()) })
    const refusal = await revert(file, into(one)).then(() => undefined, (error: unknown) => error as Error)
    if (refusal !== undefined) expect(refusal.message).toMatch(/--eager/) // a file in memory (tmpfs) takes postcopy
    await one.kill()
    const other = await Guest.boot(qemu, { incoming: 'defer', args: options(tempFolder()) })
    expect(await revertEagerly(file, into(other))).toMatchObject({ state: 'running' })
    await other.expectGoesOn(memory.tick)
  })

  test('that waits for nothing, or was used already', async () => {
    const { file } = await makeSave(qemu, 'RAM image')
    const guest = await Guest.boot(qemu)
    await expect(revert(file, into(guest))).rejects.toMatchObject({ code: 'ERR_QMP', message: expect.stringContaining('-incoming defer') as string })
    const used = await Guest.boot(qemu, { incoming: 'defer' })
    await revert(file, into(used))
    await expect(revert(file, into(used, { incoming: join(used.folder, 'again') }))).rejects.toMatchObject({ code: 'ERR_QMP' })
    expect(await used.qmp.execute('query-status')).toMatchObject({ running: true })
  })
})
