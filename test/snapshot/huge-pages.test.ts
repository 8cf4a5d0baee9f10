/** Guests whose memory is made of huge pages of 2 MiB: a fault brings 512 pages at once, all or none. */
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { expect, test } from 'vitest'
import { openSaved } from '../../src/snapshot/open-saved.ts'
import { recover, revert } from '../../src/snapshot/revert.ts'
import { Guest, mainMemory, type GuestOptions } from '../support/guest.ts'
import { describeWithQemu } from '../support/qemu.ts'
import { makeSave } from '../support/saves.ts'
import { SlowSource } from '../support/slow-source.ts'

const memory = 16
const ordinary: GuestOptions = { memory }
const huge: GuestOptions = {
  memory,
  machine: `pc,memory-backend=${mainMemory}`,
  args: ['-object', `memory-backend-memfd,id=${mainMemory},size=${memory}M,hugetlb=on,hugetlbsize=2M`],
}

/** Root gives them: `sysctl vm.nr_hugepages=32`. */
function freeHugePages(): number {
  const text = process.platform === 'linux' ? readFileSync('/proc/meminfo', 'utf8') : ''
  const number = (name: string): number => Number(new RegExp(`^${name}: *(\\d+)`, 'm').exec(text)?.[1] ?? 0)
  return number('Hugepagesize') === 2048 ? number('HugePages_Free') : 0
}

const enough = freeHugePages() >= 16
if (!enough) console.warn('\n*** NO HUGE PAGES: "huge pages" was not run. As root: sysctl vm.nr_hugepages=32 ***\n')

describeWithQemu('huge pages', (qemu) => {
  test.skipIf(!enough)('a guest saved from ordinary memory goes on in huge pages, also after the connection was lost', async () => {
    const { file, memory: saved } = await makeSave(qemu, 'RAM image', ordinary)
    const guest = await Guest.boot(qemu, { ...huge, incoming: 'defer' })
    await using source = await openSaved(file)
    const abort = new AbortController()
    const cut = revert(new SlowSource(source, 6 << 20).source, {
      qmp: guest.qmp,
      incoming: join(guest.folder, 'incoming'),
      signal: abort.signal,
      onProgress: ({ phase }) => {
        if (phase !== 'running') return
        const running = async (): Promise<boolean> => (await guest.qmp.execute('query-status')).running
        void expect.poll(running, { interval: 1, timeout: 10_000 }).toBe(true).then(() => abort.abort(new Error('cut')))
      },
    })
    await expect(cut).rejects.toThrow('cut')
    await recover(file, { qmp: guest.qmp, incoming: join(guest.folder, 'again'), hostPageSizes: { [mainMemory]: 2 << 20 } })
    await guest.expectGoesOn(saved.tick)
    expect(await guest.qmp.execute('query-migrate')).toMatchObject({ status: 'completed' })
  })

  test.skipIf(!enough)('a guest saved from huge pages goes on in huge pages and in ordinary memory', async () => {
    const { file, memory: saved } = await makeSave(qemu, 'stream file', huge)
    for (const options of [huge, ordinary]) {
      const guest = await Guest.boot(qemu, { ...options, incoming: 'defer' })
      await revert(file, { qmp: guest.qmp, incoming: join(guest.folder, 'incoming') })
      await guest.expectGoesOn(saved.tick)
      await guest.kill()
    }
  })
})
