/**
 * The notes of an ELF core: what a debugger and `crash` want to know beside memory, as QEMU's own `dump-guest-memory`
 * writes them, from the device sections of the CPUs. Owns their order; the registers are the processors' business.
 *
 * ```
 * note: u32 length of name, u32 length of content, u32 type | name, NUL, to 4 bytes | content, to 4 bytes
 * NT_PRSTATUS ("CORE", 1) of each CPU, AArch64 with NT_PRFPREG ("CORE", 2) | x86: QEMU's CPU state ("QEMU", 0) of each
 * VMCOREINFO: as the guest's kernel has it in its memory, where the device `vmcoreinfo` tells
 * ```
 */
import { concat } from '../bytes/concat.ts'
import { viewOf } from '../bytes/view.ts'
import type { CallOptions } from '../block/device.ts'
import { Qcow2Error } from '../core/errors.ts'
import { armNotes, integerOf, riscvStatus } from './elf-registers.ts'
import { isLongMode, x86Notes } from './elf-x86.ts'
import type { PhysicalMapOptions } from './physical-ranges.ts'
import type { VmState } from './vm-state.ts'

/** `e_machine` of the processors whose cores are written. */
export const elfMachine = { x86: 3, x8664: 62, arm64: 183, riscv: 243 } as const

const noteType = { status: 1, floats: 2, qemu: 0 } as const
/** Bytes of a kernel's note at most. */
const vmcoreinfoLimit = 1 << 20

/** The notes of a VM, one after the other, and the processor: `machine`, or its 32-bit mode. */
export async function elfNotes(vm: VmState, machine: number, options: CallOptions & PhysicalMapOptions): Promise<{ notes: Uint8Array; machine: number }> {
  const status: Uint8Array[] = []
  const states: Uint8Array[] = []
  let mode = machine
  const cpus = vm.devices.filter(({ name, description }) => name === 'cpu' && description !== undefined)
  for (const [i, device] of cpus.sort((a, b) => a.instanceId - b.instanceId).entries()) {
    const fields = await vm.decodeDevice(device, options)
    const number = device.instanceId + 1
    if (machine === elfMachine.x8664) {
      if (i === 0 && 'env.hflags' in fields && !isLongMode(fields)) mode = elfMachine.x86
      const notes = x86Notes(fields, number, mode === elfMachine.x8664)
      if (notes === undefined) continue
      status.push(encodeNote('CORE', noteType.status, notes.status))
      states.push(encodeNote('QEMU', noteType.qemu, notes.state))
    } else if (machine === elfMachine.arm64) {
      const notes = armNotes(fields, number)
      if (notes !== undefined) status.push(encodeNote('CORE', noteType.status, notes.status), encodeNote('CORE', noteType.floats, notes.floats))
    } else {
      const registers = riscvStatus(fields, number)
      if (registers !== undefined) status.push(encodeNote('CORE', noteType.status, registers))
    }
  }
  const guest = await vmcoreinfo(vm, options)
  return { notes: concat([...status, ...states, ...(guest === undefined ? [] : [guest])]), machine: mode }
}

function encodeNote(name: string, type: number, content: Uint8Array): Uint8Array {
  const bytes = new Uint8Array(12 + toWords(name.length + 1) + toWords(content.length))
  const view = viewOf(bytes)
  view.setUint32(0, name.length + 1, true)
  view.setUint32(4, content.length, true)
  view.setUint32(8, type, true)
  bytes.set(new TextEncoder().encode(name), 12)
  bytes.set(content, 12 + toWords(name.length + 1))
  return bytes
}

function toWords(length: number): number {
  return Math.ceil(length / 4) * 4
}

/** The kernel's own note, if the guest has told QEMU where it is and it is one. */
async function vmcoreinfo(vm: VmState, options: CallOptions & PhysicalMapOptions): Promise<Uint8Array | undefined> {
  const device = vm.devices.find(({ name, description }) => name === 'vmcoreinfo' && description !== undefined)
  if (device === undefined) return undefined
  const fields = await vm.decodeDevice(device, options)
  const [format, length, address] = ['guest_format', 'size', 'paddr'].map((name) => Number(integerOf(fields[`vmcoreinfo.${name}`])))
  if (fields['has_vmcoreinfo'] !== true || format !== 1 || length! < 12 || length! > vmcoreinfoLimit || !Number.isSafeInteger(address)) return undefined
  const bytes = await vm.ram.readPhysical(address!, length!, options).catch((error: unknown) => {
    if (Qcow2Error.is(error, 'ERR_NOT_FOUND')) return undefined // a guest may tell anything
    throw error
  })
  if (bytes === undefined) return undefined
  const view = viewOf(bytes)
  const whole = 12 + toWords(view.getUint32(0, true)) + toWords(view.getUint32(4, true))
  return whole <= length! ? bytes.subarray(0, whole) : undefined
}
