/**
 * Saves and reverts in a loop: each state is reverted by processes that are killed, and over connections that are cut,
 * at random points, until one gets through; the guest is checked and saved again. `QCOW2_ROUNDS` sets how often.
 */
import { createHash } from 'node:crypto'
import { createReadStream, rmSync } from 'node:fs'
import { join } from 'node:path'
import { pipeline } from 'node:stream/promises'
import { expect, test } from 'vitest'
import { recover } from '../../src/snapshot/revert.ts'
import { save } from '../../src/snapshot/save-files.ts'
import { Guest, type GuestOptions } from '../support/guest.ts'
import { describeWithLinux, expectLinuxGoesOn } from '../support/linux.ts'
import { describeWithQemu, type Qemu } from '../support/qemu.ts'
import type { RevertOrder } from '../support/revert-child.ts'
import { RevertProcess } from '../support/revert-process.ts'
import { memoryOf } from '../support/saves.ts'
import { tempFolder } from '../support/temp.ts'

const long = process.env['QCOW2_LONG'] === '1'
const roundsOf = (usual: number): number => Number(process.env['QCOW2_ROUNDS'] ?? usual)
const upTo = (most: number): number => Math.floor(most * Math.random() ** 3)

/** A saved state and the rounds of the guest between which it was saved. */
interface State {
  readonly file: string
  readonly first: number
  readonly last: number
}

class Loop {
  readonly #qemu: Qemu
  readonly #options: GuestOptions
  readonly #folder = tempFolder()
  /** What happened how often. */
  readonly tally: Record<string, number> = {}
  /** How long one revert takes, and how much it sends: deaths are within. */
  readonly #milliseconds: number
  readonly #bytes: number

  constructor(qemu: Qemu, options: GuestOptions, milliseconds: number, bytes: number) {
    this.#qemu = qemu
    this.#options = options
    this.#milliseconds = milliseconds
    this.#bytes = bytes
  }

  async run(rounds: number, goesOn: (guest: Guest, state: State) => Promise<void>): Promise<void> {
    const first = await Guest.boot(this.#qemu, this.#options)
    await first.run(2, 60_000)
    let state = await this.#save(first, 0)
    for (let round = 1; round <= rounds; round++) {
      const before = await hash(state.file)
      const guest = await this.#revert(state.file)
      await goesOn(guest, state)
      expect(await hash(state.file)).toBe(before)
      const next = await this.#save(guest, round)
      rmSync(state.file)
      state = next
    }
    console.log(`${rounds} rounds, QEMU ${this.#qemu.version}: ${JSON.stringify(this.tally)}`)
  }

  async #save(guest: Guest, round: number): Promise<State> {
    const file = join(this.#folder, `${round}.qcow2`)
    const first = guest.ticks.at(-1)!
    await save(guest.qmp, { memory: file })
    const last = guest.ticks.at(-1)!
    await guest.kill()
    return { file, first, last }
  }

  /** Until a revert has got through; three reverts and recoveries are killed or cut at most. */
  async #revert(file: string): Promise<Guest> {
    let guest = await this.#destination()
    let recovering = false
    for (let attempt = 0; ; attempt++) {
      const incoming = join(guest.folder, `incoming-${attempt}`)
      const outcome = await this.#attempt({ file, recover: recovering, incoming, monitor: this.#monitor }, attempt < 3)
      if (outcome === 'done') return guest
      const state = outcome === unanswered ? 'locked' : await fate(guest)
      this.#count(`${outcome}, then ${state}`)
      if (state === 'completed') return guest
      if (state === 'locked') {
        await recover(file, { qmp: guest.qmp, incoming: join(guest.folder, 'unlocked') })
        this.#count('recovered by the monitor from before')
        return guest
      }
      recovering = state === 'paused'
      if (recovering) continue
      await guest.kill()
      guest = await this.#destination()
    }
  }

  get #monitor(): string {
    return join(this.#folder, 'monitor')
  }

  async #destination(): Promise<Guest> {
    // the process that reverts has a monitor of its own
    const args = ['-chardev', `socket,id=second,path=${this.#monitor},server=on,wait=off`, '-mon', 'chardev=second,mode=control']
    return Guest.boot(this.#qemu, { ...this.#options, incoming: 'defer', args })
  }

  /** What became of it, in words that are counted; a failure that is not reported as it should be fails the test. */
  async #attempt(order: RevertOrder, mayDie: boolean): Promise<string> {
    const cut = mayDie && Math.random() < 0.4
    const kill = mayDie && !cut
    const process = await RevertProcess.start({ ...order, ...(cut && { cut: upTo(this.#bytes) }), ...(kill && { bytes: upTo(this.#bytes) }) })
    if (kill) await process.killAfter(upTo(this.#milliseconds))
    const outcome = await process.outcome()
    if (outcome === 'done') {
      this.#count('done')
      return 'done'
    }
    if (outcome === 'killed' && kill) return 'killed'
    if (outcome !== 'killed' && order.recover && outcome.phase === 'before' && /no answer to/.test(outcome.why)) return unanswered
    if (outcome === 'killed' || !cut) throw new Error(`an undisturbed revert failed: ${JSON.stringify(outcome)}`)
    expect(outcome).toMatchObject({ code: 'ERR_STREAM', why: expect.stringMatching(/^revert failed while \w+: /) as string })
    return `cut while ${outcome.phase}`
  }

  #count(what: string): void {
    this.tally[what] = (this.tally[what] ?? 0) + 1
  }
}

/** What a process says that wants to recover and gets no answer on its new monitor connection. */
const unanswered = 'no answer on a new monitor'

/**
 * What QEMU does after its source has died. `locked`: the paused processor holds QEMU's main lock, and only out-of-band
 * commands on a connection from before are answered.
 */
async function fate(guest: Guest): Promise<'gone' | 'paused' | 'completed' | 'waiting' | 'locked'> {
  for (let tries = 0; tries < 100 && guest.running; tries++) {
    const { status } = await guest.qmp.execute('query-migrate', undefined, { timeout: 5_000 }).catch((error: unknown) => ({
      status: /no answer to/.test(String(error)) ? 'locked' : 'gone',
    }))
    if (status === 'postcopy-paused') return 'paused'
    if (status === 'completed' || status === 'locked') return status
    await new Promise((wake) => setTimeout(wake, 20))
  }
  return guest.running ? 'waiting' : 'gone'
}

async function hash(file: string): Promise<string> {
  const sum = createHash('sha256')
  await pipeline(createReadStream(file), sum)
  return sum.digest('hex')
}

describeWithQemu('loop', (qemu) => {
  test.runIf(long)('200 saves and reverts of the tiny guest', async () => {
    await new Loop(qemu, {}, 60, 5 << 20).run(roundsOf(200), async (guest, { file }) => {
      await guest.expectGoesOn((await memoryOf(file)).tick)
    })
  })
})

describeWithLinux('loop', (qemu, linux) => {
  test.runIf(long)('50 saves and reverts of a Linux guest', async () => {
    await new Loop(qemu, linux, 2000, 200 << 20).run(roundsOf(50), (guest, { first, last }) => expectLinuxGoesOn(guest, first, last))
  })
})
