/** `vmstate` on real saved VMs: inside images, as streams, of libvirt's kind. */
import { existsSync, readFileSync, statSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { gunzipSync, gzipSync } from 'node:zlib'
import { describe, expect, test } from 'vitest'
import { plainStream } from '../../src/migration/convert.ts'
import { VmState } from '../../src/migration/vm-state.ts'
import { locateVmDescription } from '../../src/migration/vm-description.ts'
import { MemoryDevice } from '../../src/block/memory.ts'
import { capture as storeStream } from '../../src/snapshot/capture.ts'
import { RamImageWriter } from '../../src/snapshot/ram-image-writer.ts'
import { libvirtImage } from '../migration/libvirt.ts'
import { checkGuestMemory } from '../support/guest.ts'
import { tempFolder } from '../support/temp.ts'
import { run } from './run.ts'

const captures = join(import.meta.dirname, '../fixtures/captures')
const capture = (name: string): Buffer => gunzipSync(readFileSync(join(captures, `${name}.gz`)))

function file(name: string, bytes: Uint8Array): string {
  const path = join(tempFolder(), name)
  writeFileSync(path, bytes)
  return path
}

const savedImage = (): string => file('vm.qcow2', capture('qemu100-savevm.qcow2'))
const state = capture('qemu100-savevm.vmstate')

interface Shown {
  machine: string
  pageSize: number
  ram: { name: string; length: number; dataPages: number }[]
  devices: { name: string }[]
}

describe('vmstate ls', () => {
  test('lists the snapshots that hold a VM', async () => {
    const image = savedImage()
    await run(['snapshot', '-c', 'disk only', image])
    const { stdout, code } = await run(['vmstate', 'ls', '--output=json', image])
    expect(code).toBe(0)
    expect(JSON.parse(stdout)).toMatchObject([{ id: '1', name: 'snap1', 'vm-state-size': state.length }])
    expect((await run(['vmstate', 'ls', image])).stdout).toMatch(/^Snapshot list:\nID .*\n1 +snap1 .*\n$/)
  })

  test('says that a stream file has no list', async () => {
    const stream = file('vm.mig', state)
    expect(await run(['vmstate', 'ls', stream])).toMatchObject({ code: 1, stdout: '', stderr: `qcow2: ${stream} is no qcow2 image; 'vmstate show' looks into a stream file\n` })
  })
})

describe('vmstate show', () => {
  test.each([
    ['IMAGE@NAME', (): string => `${savedImage()}@snap1`],
    ['IMAGE@ID', (): string => `${savedImage()}@1`],
    ['IMAGE with one saved VM', savedImage],
    ['a stream', (): string => file('vm.mig', state)],
    ['a compressed stream', (): string => file('vm.mig.gz', gzipSync(state))],
  ])('%s', async (_name, make) => {
    const { code, stdout } = await run(['vmstate', 'show', '--output=json', make()])
    expect(code).toBe(0)
    const shown = JSON.parse(stdout) as Shown
    expect(shown).toMatchObject({ machine: expect.stringMatching(/^pc-/) as string, pageSize: 4096 })
    expect(shown.ram.find(({ name }) => name === 'pc.ram')).toMatchObject({ length: 4 << 20 })
    expect(shown.devices.map(({ name }) => name)).toContain('cpu')
  })

  test('for people', async () => {
    const image = savedImage()
    const { stdout } = await run(['vmstate', 'show', image])
    expect(stdout).toContain(`VM state: ${image}@snap1\n`)
    expect(stdout).toMatch(/^machine: pc-/m)
    expect(stdout).toMatch(/^pc\.ram +4 MiB +\d+ +\d+ +\d+$/m)
  })

  test('a stream cut in the middle of the memory is refused where it ends, a byte of a sector or not', async () => {
    const stream = file('vm.mig', state.subarray(0, 100_001))
    expect(await run(['vmstate', 'show', stream])).toMatchObject({ code: 1, stdout: '', stderr: expect.stringMatching(/the stream ends here.*\(offset 100001\)/) as string })
  })

  test('a stream cut behind the memory is shown as long as it is, and what cannot be explained is said', async () => {
    const length = state.length - 1001
    const stream = file('vm.mig', state.subarray(0, length))
    const { code, stdout } = await run(['vmstate', 'show', stream])
    expect(code).toBe(0)
    expect(stdout).toContain(`(${length} bytes)\n`)
    expect(stdout).toMatch(/^device state without a description: \d+ bytes; the stream may be cut short$/m)
    expect((await run(['vmstate', 'show', file('whole.mig', state)])).stdout).not.toContain('without a description')
  })

  test('the fields of one device', async () => {
    const { stdout } = await run(['vmstate', 'show', '--device', 'cpu', savedImage()])
    expect(JSON.parse(stdout)).toHaveProperty(['env.regs'])
  })

  test.each([
    ['vmstate show /nonexistent', "Could not open '/nonexistent': No such file or directory"],
    ['vmstate shwo x', "Command not found: vmstate shwo; did you mean 'show'?"],
    ['vmstate', 'a command is missing'],
  ])('%s fails', async (line, message) => {
    const { code, stderr } = await run(line)
    expect(code).toBe(1)
    expect(stderr).toContain(message)
  })

  test('an image without VM state, and a file that is none, say so on one line', async () => {
    const image = join(tempFolder(), 'x')
    await run(['create', '-q', '-f', 'qcow2', image, '1M'])
    expect(await run(['vmstate', 'show', image])).toMatchObject({ code: 1, stderr: `qcow2: ${image} has no snapshot with VM state\n` })
    const { code, stderr } = await run(['vmstate', 'show', file('junk', Buffer.alloc(5000, 7))])
    expect(code).toBe(1)
    expect(stderr).toMatch(/^qcow2: Could not open .*\n$/)
  })
})

describe('vmstate extract', () => {
  test('writes memory as the guest had it, to a file and to stdout', async () => {
    const image = savedImage()
    const output = join(tempFolder(), 'ram')
    expect(await run(['vmstate', 'extract', image, 'pc.ram', output])).toMatchObject({ code: 0, stderr: '' })
    const ram = readFileSync(output)
    expect(await checkGuestMemory((offset, length) => ram.subarray(offset, offset + length))).toMatchObject({ consistent: true })
    const piped = await run(['vmstate', 'extract', image, 'pc.ram', '-', '--offset', '0x8000', '--length', '64k'])
    expect(Buffer.compare(piped.bytes, ram.subarray(0x8000, 0x8000 + 65536))).toBe(0)
  })

  test('writes a device as it is in the stream', async () => {
    const image = savedImage()
    await using vm = await VmState.index(new MemoryDevice(state))
    const device = vm.device('cpu')
    const { bytes } = await run(['vmstate', 'extract', '--device', image, 'cpu', '-'])
    expect(Buffer.compare(bytes, state.subarray(device.offset, device.offset + device.length))).toBe(0)
  })

  test('refuses what is not there', async () => {
    const image = savedImage()
    expect((await run(['vmstate', 'extract', image, 'pc.rom9', '-'])).stderr).toContain("no RAM block 'pc.rom9'")
    expect((await run(['vmstate', 'extract', image, 'pc.ram', '-', '--offset', '1G'])).stderr).toContain('reach past its end')
  })
})

describe('vmstate export', () => {
  test('stored: byte for byte', async () => {
    const output = join(tempFolder(), 'stream')
    expect(await run(['vmstate', 'export', savedImage(), output])).toMatchObject({ code: 0 })
    expect(Buffer.compare(readFileSync(output), state)).toBe(0)
  })

  test.each(['qemu100-mappedram.mig', 'qemu100-xbzrle.mig', 'qemu72-compress.mig'])('plain: %s becomes a stream with the same memory', async (name) => {
    const source = file('source', capture(name))
    const output = join(tempFolder(), 'plain')
    expect(await run(['vmstate', 'export', '--form=plain', source, output])).toMatchObject({ code: 0, stderr: '' })
    const { code, stdout } = await run(['vmstate', 'diff', source, output])
    expect(stdout).toBe('The VMs are equal.\n')
    expect(code).toBe(0)
  })
})

describe('vmstate export by address', () => {
  const source = (): string => file('vm.mig', capture('qemu100-bgsnap.mig'))

  test.each(['elf', 'lime', 'raw'])('%s: to a file of its own, and the same to stdout', async (form) => {
    const output = join(tempFolder(), 'memory')
    // without the firmware below 4 GiB, which would make raw memory long
    const map = form === 'raw' ? ['--map', 'pc.ram:0-1M@0,pc.ram:1M-@3M'] : []
    expect(await run(['vmstate', 'export', `--form=${form}`, ...map, source(), output])).toMatchObject({ code: 0, stderr: '' })
    const bytes = readFileSync(output)
    expect(statSync(output).mode & 0o777).toBe(0o600)
    expect(bytes.subarray(0, 4).toString('latin1')).toBe({ elf: '\u007fELF', lime: 'EMiL', raw: bytes.subarray(0, 4).toString('latin1') }[form])
    expect(Buffer.compare((await run(['vmstate', 'export', `--form=${form}`, ...map, source(), '-'])).bytes, bytes)).toBe(0)
    if (form !== 'raw') return
    const { bytes: ram } = await run(['vmstate', 'extract', source(), 'pc.ram', '-'])
    expect(bytes).toHaveLength(6 << 20)
    expect(Buffer.compare(bytes.subarray(3 << 20), ram.subarray(1 << 20))).toBe(0)
    expect(Buffer.compare(bytes.subarray(0, 1 << 20), ram.subarray(0, 1 << 20))).toBe(0)
  })

  test.each([
    ['pc.ram', 'no range'],
    ['pc.ram:0-1M', 'no range'],
    ['nothing@0', "no RAM block 'nothing'"],
    ['pc.ram:2M-1M@0', 'the block has 4194304 bytes'],
    ['pc.ram:0-5M@0', 'the block has 4194304 bytes'],
    ['pc.ram:x-5M@0', 'not a size'],
    ['pc.ram@0,pc.rom@1M', "'pc.ram' and 'pc.rom' overlap at address 0x100000"],
  ])('--map %s is refused', async (map, message) => {
    const { code, stderr } = await run(['vmstate', 'export', '--form=elf', '--map', map, source(), join(tempFolder(), 'core')])
    expect(code).not.toBe(0)
    expect(stderr).toContain(message)
  })

  test('--map goes with addresses only', async () => {
    expect((await run(['vmstate', 'export', '--map', 'pc.ram@0', source(), '-'])).stderr).toContain('--map goes with --form=elf, raw, lime')
  })
})

test("vmstate show --xml: libvirt's definition of the domain", async () => {
  const source = file('domain.save', libvirtImage(gzipSync(state), 1))
  expect(await run(['vmstate', 'show', '--xml', source])).toMatchObject({ code: 0, stdout: '<domain/>\n' })
  expect((await run(['vmstate', 'show', '--xml', file('vm.mig', state)])).stderr).toContain('is not a save image of libvirt')
  const other = await run(['vmstate', 'show', file('xz.save', libvirtImage(state, 3))])
  expect(other.stderr).toMatch(/decompress it first: tail -c \+177 FILE \| xz -d > STREAM/)
})

describe('a stream that is cut short', () => {
  const whole = capture('qemu100-bgsnap.mig')
  const description = locateVmDescription(whole)!.eof
  const cuts: [string, number][] = [['in its devices', description - 1000], ['before its EOF byte', description], ['in the head of its description', description + 3], ['in its description', description + 100], ['by one byte', whole.length - 1]]

  test.each(cuts)('%s: exported on demand only', async (_, length) => {
    const source = file('cut.mig', whole.subarray(0, length))
    for (const form of ['stored', 'plain', 'without-ram', 'elf']) {
      const output = join(tempFolder(), 'out')
      const { code, stderr } = await run(['vmstate', 'export', `--form=${form}`, source, output])
      expect([code, existsSync(output)]).toEqual([1, false])
      expect(stderr).toMatch(/cut\.mig is cut short: .*; --cut takes what there is/)
    }
    expect((await run(['vmstate', 'show', source])).stdout).toContain('cut short: ')
    const output = join(tempFolder(), 'out')
    expect(await run(['vmstate', 'export', '--cut', source, output])).toMatchObject({ code: 0 })
    expect(Buffer.compare(readFileSync(output), whole.subarray(0, length))).toBe(0)
    await using vm = await VmState.index(new MemoryDevice(Uint8Array.from(whole.subarray(0, length))))
    await expect(plainStream(vm).next()).rejects.toMatchObject({ code: 'ERR_STREAM' })
  })

  test('one without a description that ends as it should is whole, with padding too', async () => {
    for (const padding of [0, 5000]) {
      const source = file('bare.mig', Buffer.concat([whole.subarray(0, description + 1), Buffer.alloc(padding)]))
      expect(await run(['vmstate', 'export', '--form=plain', source, join(tempFolder(), 'out')])).toMatchObject({ code: 0, stderr: '' })
    }
  })
})

describe('a RAM image', () => {
  /** The VM of `state`, and one over it as an incremental save makes it. */
  async function ramImages(): Promise<{ base: string; top: string }> {
    const folder = tempFolder()
    const base = join(folder, 'base.qcow2')
    const top = join(folder, 'top.qcow2')
    await storeStream(state, RamImageWriter.to(base))
    await storeStream(state, RamImageWriter.to(top, { backing: { file: 'base.qcow2', format: 'qcow2' } }))
    return { base, top }
  }

  test('is shown, extracted, compared and exported like its stream', async () => {
    const stream = file('vm.mig', state)
    const { base, top } = await ramImages()
    for (const image of [base, top, `${base}@ram`]) {
      const shown = JSON.parse((await run(['vmstate', 'show', '--output=json', image])).stdout) as Shown
      const plain = JSON.parse((await run(['vmstate', 'show', '--output=json', stream])).stdout) as Shown
      expect(shown).toMatchObject({ machine: plain.machine, devices: plain.devices })
      expect(await run(['vmstate', 'diff', image, stream])).toMatchObject({ code: 0, stdout: 'The VMs are equal.\n' })
      const ram = await run(['vmstate', 'extract', image, 'pc.ram', '-'])
      expect(Buffer.compare(ram.bytes, (await run(['vmstate', 'extract', stream, 'pc.ram', '-'])).bytes)).toBe(0)
      const output = join(tempFolder(), 'exported')
      expect(await run(['vmstate', 'export', image, output])).toMatchObject({ code: 0, stderr: '' })
      expect(await run(['vmstate', 'diff', output, stream])).toMatchObject({ code: 0 })
    }
  })
})

describe('vmstate diff', () => {
  test('tells pages and fields, exit code 1', async () => {
    const changed = Buffer.from(state)
    await using vm = await VmState.index(new MemoryDevice(Buffer.from(state)))
    const device = vm.device('i8259')
    changed[device.offset]! ^= 1
    const { code, stdout } = await run(['vmstate', 'diff', '--output=json', file('a', state), file('b', changed)])
    expect(code).toBe(1)
    const { ram, devices } = JSON.parse(stdout) as { ram: unknown[]; devices: { device: string }[] }
    expect(ram).toEqual([])
    expect(devices.map(({ device }) => device)).toEqual(['i8259 (0)'])
  })

  test('what cannot be compared is exit code 2', async () => {
    expect(await run(['vmstate', 'diff', '/nonexistent', '/nonexistent'])).toMatchObject({ code: 2 })
  })
})
