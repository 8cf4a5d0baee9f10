/** Real guests boot from `serve`: SeaBIOS and a boot sector of our own read, check and write the disk over NBD. */
import { once } from 'node:events'
import { existsSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { expect, onTestFinished, test } from 'vitest'
import { describeWithQemu, type Qemu } from '../support/qemu.ts'
import { tempFolder } from '../support/temp.ts'
import { run } from './run.ts'

/** The disk that `counter.S` describes: itself, 16 sectors of its pattern, and a counter. */
function bootDisk(): Buffer {
  const disk = Buffer.alloc(1 << 20)
  readFileSync(join(import.meta.dirname, '../fixtures/guest/counter.bin')).copy(disk)
  for (let i = 0; i < 2048; i++) disk.writeUInt32LE(Math.imul(i, 0x9e3779b1) >>> 0, 512 + i * 4)
  return disk
}

async function image(folder: string, ...flags: string[]): Promise<string> {
  const [raw, path] = [join(folder, 'raw'), join(folder, 'disk.qcow2')]
  writeFileSync(raw, bootDisk())
  expect(await run(['convert', '-f', 'raw', '-O', 'qcow2', ...flags, raw, path])).toMatchObject({ code: 0, stderr: '' })
  return path
}

/** Serves `name` while a guest boots from it; what the guest said on its serial port. */
async function boot(qemu: Qemu, drive: string, ...serve: string[]): Promise<string> {
  const socket = join(tempFolder(), 'nbd')
  const interrupt = new AbortController()
  const served = run(['serve', '--socket', socket, ...serve], { signal: interrupt.signal })
  while (!existsSync(socket)) await new Promise((resolve) => setTimeout(resolve, 2))
  const machine = ['-M', 'pc', '-m', '16', '-nodefaults', '-vga', 'none', '-display', 'none', '-no-reboot', '-serial', 'stdio']
  const guest = qemu.system(...machine, '-drive', `file=nbd+unix:///?socket=${socket},format=raw,${drive}`)
  onTestFinished(() => void guest.kill('SIGKILL'))
  let said = ''
  guest.stdout.on('data', (data: Buffer) => (said += data.toString()))
  guest.stderr.on('data', (data: Buffer) => (said += data.toString()))
  await once(guest, 'close')
  interrupt.abort()
  expect(await served).toMatchObject({ code: 0, stderr: '' })
  return said
}

async function counterIn(name: string): Promise<number> {
  const { bytes } = await run(['convert', name, '-'])
  return Buffer.from(bytes).readUInt32LE(17 * 512)
}

describeWithQemu('a guest boots from serve', (qemu) => {
  test.each([
    ['virtio', []],
    ['ide', ['-c']],
    ['ide', ['-o', 'extended_l2=on']],
  ])('twice, over %s, from an image made with %j: the counter is 2 and the image sound', { timeout: 60_000 }, async (bus, flags) => {
    const path = await image(tempFolder(), ...flags)
    expect(await boot(qemu, `if=${bus}`, path)).toBe('C 00000001\n')
    expect(await boot(qemu, `if=${bus}`, path)).toBe('C 00000002\n')
    expect(await counterIn(path)).toBe(2)
    await qemu.imgOk('check', path)
  })

  test('from an internal snapshot: its disk, which refuses the write', { timeout: 60_000 }, async () => {
    const path = await image(tempFolder())
    expect(await boot(qemu, 'if=virtio', path)).toBe('C 00000001\n')
    expect((await run(['snapshot', '-c', 'once', path])).code).toBe(0)
    expect(await boot(qemu, 'if=virtio', path)).toBe('C 00000002\n')
    const before = readFileSync(path)
    // the guest counts in memory and cannot store it
    expect(await boot(qemu, 'if=virtio,readonly=on', `${path}@once`)).toBe('R 00000002\n')
    expect(readFileSync(path).equals(before)).toBe(true)
    expect([await counterIn(`${path}@once`), await counterIn(path)]).toEqual([1, 2])
    await qemu.imgOk('check', path)
  })
})
