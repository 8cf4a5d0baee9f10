/** Save images of a real libvirt: what they hold, and their guest going on in QEMU. */
import { readFileSync, writeFileSync } from 'node:fs'
import { join, resolve } from 'node:path'
import { gunzipSync } from 'node:zlib'
import { describe, expect, test } from 'vitest'
import { VmState } from '../../src/migration/vm-state.ts'
import { revert, revertEagerly } from '../../src/snapshot/revert.ts'
import { checkGuestMemory, Guest, mainMemory } from '../support/guest.ts'
import { describeWithQemu } from '../support/qemu.ts'
import { tempFolder } from '../support/temp.ts'

const fixtures = resolve(import.meta.dirname, '../fixtures/libvirt')
const formats = ['raw', 'gzip'] as const

/** The save image as libvirt left it. */
function saveImage(format: (typeof formats)[number]): string {
  if (format === 'gzip') return join(fixtures, 'gzip.save')
  const path = join(tempFolder(), 'raw.save')
  writeFileSync(path, gunzipSync(readFileSync(join(fixtures, 'raw.save.gz'))))
  return path
}

/** The devices that libvirt gave the domain. */
const domain = {
  machine: 'pc-i440fx-7.2,usb=off',
  args: ['-no-acpi', '-cpu', 'qemu64', '-device', 'piix3-usb-uhci,id=usb,bus=pci.0,addr=0x1.0x2'],
}

async function guestMemory(path: string): Promise<Awaited<ReturnType<typeof checkGuestMemory>>> {
  await using vm = await VmState.index(path)
  return await checkGuestMemory((offset, length) => vm.ram.read(mainMemory, offset, length))
}

describe.each(formats)('%s', (format) => {
  test('header, machine and every page', async () => {
    const path = saveImage(format)
    await using vm = await VmState.index(path)
    expect(vm.libvirt).toMatchObject({ version: 2, wasRunning: true, format })
    expect(vm.libvirt?.domainXml).toMatch(/^<domain type='qemu'>\n {2}<name>tiny<\/name>[^]*<\/domain>\n$/)
    expect(vm.libvirt?.cookieXml).toMatch(/^<cookie>[^]*<\/cookie>\n$/)
    expect(vm.machine).toBe('pc-i440fx-7.2')
    expect(vm.devices.map(({ name }) => name)).toContain('0000:00:01.2/uhci')
    expect(vm.ram.blocks.map(({ name, length }) => [name, length])).toEqual([['pc.ram', 4 << 20], ['pc.rom', 1 << 17], ['pc.bios', 1 << 16]])
    expect(await guestMemory(path)).toMatchObject({ consistent: true, problems: [] })
  })
})

describeWithQemu('its guest goes on', (qemu) => {
  test.each(formats)('%s, by postcopy and by ordinary migration', async (format) => {
    const path = saveImage(format)
    const { tick } = await guestMemory(path)
    for (const start of [revert, revertEagerly]) {
      const args = qemu.major < 9 ? domain.args : domain.args.slice(1)
      const machine = qemu.major < 9 ? domain.machine : `${domain.machine},acpi=off`
      const guest = await Guest.boot(qemu, { incoming: 'defer', machine, args })
      await start(path, { qmp: guest.qmp, incoming: join(guest.folder, 'incoming') })
      // libvirt stops a guest before it saves it
      if (start === revertEagerly) await guest.qmp.execute('cont')
      await guest.expectGoesOn(tick)
      await guest.kill()
    }
  })
})
