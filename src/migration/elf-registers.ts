/**
 * The registers of Arm and RISC-V CPUs in an ELF core, and what all processors' notes have in common. Owns the order that
 * Linux gives registers in.
 */
import { viewOf } from '../bytes/view.ts'
import type { DeviceValue } from './device-fields.ts'

/** The decoded section of a CPU. */
export type CpuFields = Readonly<Record<string, DeviceValue>>

const registersAt = 112
/** Which bits of the old FPSCR are status, which are control. */
const [floatStatus, floatControl] = [0xf800_009fn, 0x07f7_9f00n]

/** A decoded integer; 0 for what is none. */
export function integerOf(value: DeviceValue | undefined): bigint {
  if (typeof value === 'number' && Number.isInteger(value)) return BigInt.asUintN(64, BigInt(value))
  return typeof value === 'string' && /^0x[0-9a-f]{1,16}$/.test(value) ? BigInt(value) : 0n
}

/** NT_PRSTATUS of a 64-bit processor: pid at 32, registers from 112 on. */
export function registerStatus(registers: readonly bigint[], number: number, length: number): Uint8Array {
  const bytes = new Uint8Array(length)
  const view = viewOf(bytes)
  view.setUint32(32, number, true)
  registers.forEach((value, i) => view.setBigUint64(registersAt + 8 * i, value, true))
  return bytes
}

/** AArch64: x0 to x30, sp, pc, pstate; and v0 to v31 with their status and control. Undefined for a CPU that has none. */
export function armNotes(fields: CpuFields, number: number): { status: Uint8Array; floats: Uint8Array } | undefined {
  const general = fields['env.xregs']
  if (!Array.isArray(general) || general.length !== 32) return undefined
  const status = registerStatus([...general.map(integerOf), integerOf(fields['env.pc']), integerOf(fields['cpsr'])], number, 392)
  status[384] = 1 // floating-point registers follow
  return { status, floats: armFloats(fields['cpu/vfp']) }
}

function armFloats(vfp: DeviceValue | undefined): Uint8Array {
  const bytes = new Uint8Array(528)
  const view = viewOf(bytes)
  if (typeof vfp !== 'object' || vfp === null || Array.isArray(vfp)) return bytes
  for (let n = 0; n < 32; n++) {
    const words = vfp[`env.vfp.zregs[${n}].d`]
    if (Array.isArray(words)) words.slice(0, 2).forEach((word, i) => view.setBigUint64(16 * n + 8 * i, integerOf(word), true))
  }
  const both = integerOf(vfp['fpscr'])
  view.setUint32(512, Number(both & floatStatus), true)
  view.setUint32(516, Number(both & floatControl), true)
  return bytes
}

/** RISC-V: pc, x1 to x31. */
export function riscvStatus(fields: CpuFields, number: number): Uint8Array | undefined {
  const general = fields['env.gpr']
  if (!Array.isArray(general) || general.length !== 32) return undefined
  return registerStatus([integerOf(fields['env.pc']), ...general.slice(1).map(integerOf)], number, 376)
}
