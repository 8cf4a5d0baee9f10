/** A guest of which half is empty: stored as RAM image, as internal snapshot, and by real QEMU's savevm. */
import { randomFillSync } from 'node:crypto'
import * as fs from 'node:fs'
import { join } from 'node:path'
import { MigrationParser, ramFlag } from '../../src/migration.ts'
import { capture, RamImageWriter, type NewRamImageOptions } from '../../src/snapshot.ts'
import { groupFigure } from '../figures.ts'
import { measure, type Variant } from '../harness.ts'
import { findQemus, qemuImg, type QemuInstallation } from '../qemu.ts'
import { settleDisk } from '../real-file.ts'
import type { Scenario, ScenarioContext, ScenarioResult } from '../scenario.ts'
import { capturedVmState, enlargedVmState } from '../vm-state.ts'
import { captureStream, machineOf, oursSaves, pieces, qemuSaves, type SaveSetup } from './savevm.ts'

const MiB = 1 << 20
/** Every so manieth page with content changes before the incremental save. */
const changedEvery = 10

async function run(context: ScenarioContext): Promise<ScenarioResult> {
  const megabytes = context.size ?? (context.quick ? 96 : 1024)
  const qemus = findQemus().slice(-1)
  const ram = join(context.folder, 'ram')
  const ramSize = (megabytes / 2) * MiB
  fs.writeFileSync(ram, randomFillSync(Buffer.allocUnsafe(ramSize)))
  const guest = { ram, ramSize, machine: machineOf(qemus), megabytes }
  const [qemu] = qemus
  const stream = qemu === undefined ? enlargedVmState(capturedVmState(), ramSize) : await captureStream(qemu, guest, context.folder)
  const sizes = new Map<string, number>()
  const group = await measure({
    id: 'ram-image-savevm',
    title: `A guest of ${megabytes} MiB, half of it not zero, stored`,
    note: 'Ours: from memory into a new image, durable. QEMU: HMP savevm of a stopped VM, whose stream the others store. Incremental: one page in ten has changed.',
    bytes: stream.length,
    variants: variants({ ...guest, context, qemus, stream }, sizes),
    ratios: qemu === undefined ? [] : ratios(qemu),
  }, context)
  const notes = [...sizes].map(([title, bytes]) => `On disk: ${title} ${(bytes / 1e6).toFixed(1)} MB (stream: ${(stream.length / 1e6).toFixed(1)} MB).`)
  if (qemu === undefined) notes.push('QEMU is not installed: there was nothing to compare with.')
  return { groups: [group], figures: [groupFigure(group)], notes }
}

function ratios({ version }: QemuInstallation): { fast: string; slow: string; goal?: number }[] {
  return [
    { fast: 'ours', slow: `qemu-${version}-writeback`, goal: 1 },
    { fast: 'ours-direct', slow: `qemu-${version}-writeback`, goal: 1 },
    { fast: 'ours-direct', slow: `qemu-${version}-none`, goal: 2 },
    { fast: 'incremental', slow: 'ours' },
  ]
}

function variants(setup: SaveSetup, sizes: Map<string, number>): Variant[] {
  const { context, qemus, stream } = setup
  const file = join(context.folder, 'ram.qcow2')
  const all = [
    imageVariant(setup, 'ours', 'RAM image, page cache', stream, { direct: false }),
    imageVariant(setup, 'ours-direct', 'RAM image, O_DIRECT', stream, { direct: true }),
    incremental(setup),
    { ...oursSaves(setup, file), id: 'snapshot', title: 'internal snapshot, O_DIRECT' },
    ...qemus.flatMap((qemu) => ['none', 'writeback'].map((cache) => qemuSaves(setup, qemu, file, cache))),
  ]
  return all.map((variant) => ({
    ...variant,
    async finish() {
      await variant.finish?.()
      sizes.set(variant.title, fs.statSync(file).blocks * 512)
    },
  }))
}

function imageVariant(setup: SaveSetup, id: string, title: string, stream: Uint8Array, options: NewRamImageOptions): Variant {
  const { context, qemus } = setup
  const file = join(context.folder, 'ram.qcow2')
  return {
    id,
    title,
    prepare() {
      fs.rmSync(file, { force: true })
      settleDisk(context.folder)
    },
    async run() {
      await capture(pieces(stream), RamImageWriter.to(file, options))
      return undefined
    },
    async finish() {
      for (const qemu of qemus) await qemuImg(qemu, 'check', '-q', file)
    },
  }
}

function incremental(setup: SaveSetup): Variant {
  const base = join(setup.context.folder, 'base.qcow2')
  const variant = imageVariant(setup, 'incremental', 'RAM image over an earlier one', changed(setup.stream), { backing: { file: base, format: 'qcow2' } })
  return {
    ...variant,
    async prepare() {
      if (!fs.existsSync(base)) await capture(pieces(setup.stream), RamImageWriter.to(base, { direct: false }))
      await variant.prepare?.()
    },
  }
}

/** The stream of the same guest a little later. */
function changed(stream: Uint8Array): Uint8Array {
  const later = new Uint8Array(stream)
  let page = 0
  for (const record of new MigrationParser().push(stream)) {
    if (record.kind !== 'ram-pages') continue
    for (let i = 0; i < record.count; i++) {
      if ((record.flags[i]! & ramFlag.page) === 0 || page++ % changedEvery !== 0) continue
      const at = record.bytesOffset + record.positions[i]!
      later[at] = later[at]! ^ 0xff
    }
  }
  return later
}

export const scenario: Scenario = {
  name: 'ram-image',
  title: 'A RAM image beside savevm',
  about:
    'A guest of 1 GiB, half random and half zero, which never runs, is saved by real QEMU’s savevm; the very stream that QEMU makes of it is stored by this library as a RAM image (guest memory as data of a qcow2 image), ' +
    'over an earlier RAM image, and as an internal snapshot. Every image is checked by qemu-img.',
  run,
}
