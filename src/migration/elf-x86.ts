/**
 * The notes of an x86 CPU in an ELF core, as QEMU's own `dump-guest-memory` writes them. Owns their layouts and where a
 * device section has the registers.
 *
 * ```
 * NT_PRSTATUS, long mode: u32 pid at 32, registers of 64 bits from 112 | else: u32 pid at 24, registers of 32 bits from 72
 * QEMU's CPU state: u32 version, u32 length | rax rbx rcx rdx rsi rdi rsp rbp r8 … r15 rip rflags
 *   | cs ds es fs gs ss ldt tr gdt idt: u32 selector, limit, flags, 0, u64 base | cr0 … cr4 | kernel gs base
 * ```
 */
import { viewOf } from '../bytes/view.ts'
import { integerOf, registerStatus, type CpuFields } from './elf-registers.ts'
import type { DeviceValue } from './device-fields.ts'

/** Order of the general registers in a stream. */
const streamOrder = ['rax', 'rcx', 'rdx', 'rbx', 'rsp', 'rbp', 'rsi', 'rdi', 'r8', 'r9', 'r10', 'r11', 'r12', 'r13', 'r14', 'r15']
/** Order of the segment registers in a stream. */
const segmentOrder = ['es', 'cs', 'ss', 'ds', 'fs', 'gs']
/** The bit of `hflags` that says long mode. */
const longMode = 1n << 14n

/** The CPU runs 64-bit code, or may. */
export function isLongMode(fields: CpuFields): boolean {
  return (integerOf(fields['env.hflags']) & longMode) !== 0n
}

/** NT_PRSTATUS and QEMU's CPU state; undefined if the section is not laid out as QEMU's CPUs are. */
export function x86Notes(fields: CpuFields, number: number, long: boolean): { status: Uint8Array; state: Uint8Array } | undefined {
  const cpu = x86Registers(fields)
  return cpu === undefined ? undefined : { status: long ? longStatus(cpu, number) : shortStatus(cpu, number), state: qemuState(cpu) }
}

interface Segment {
  readonly selector: number
  readonly limit: number
  readonly flags: number
  readonly base: bigint
}

interface X86Registers {
  readonly general: ReadonlyMap<string, bigint>
  readonly rip: bigint
  readonly flags: bigint
  readonly segments: ReadonlyMap<string, Segment>
  readonly control: readonly bigint[]
  readonly kernelGsBase: bigint
}

/** Undefined if the section is not laid out as QEMU's CPUs are. */
function x86Registers(fields: CpuFields): X86Registers | undefined {
  const general = fields['env.regs']
  const segments = fields['env.segs']
  if (!Array.isArray(general) || !Array.isArray(segments) || segments.length !== segmentOrder.length) return undefined
  const named = new Map(segmentOrder.map((name, i) => [name, segmentOf(segments[i])]))
  for (const name of ['ldt', 'tr', 'gdt', 'idt']) named.set(name, segmentOf(fields[`env.${name}`]))
  return {
    general: new Map(streamOrder.map((name, i) => [name, integerOf(general[i])])),
    rip: integerOf(fields['env.eip']),
    flags: integerOf(fields['env.eflags']),
    segments: named,
    control: [0, 1, 2, 3, 4].map((n) => integerOf(fields[`env.cr[${n}]`])),
    kernelGsBase: integerOf(fields['env.kernelgsbase']),
  }
}

function segmentOf(value: DeviceValue | undefined): Segment {
  const fields = typeof value === 'object' && value !== null && !Array.isArray(value) ? value : {}
  const small = (name: string): number => Number(BigInt.asUintN(32, integerOf(fields[name])))
  return { selector: small('selector'), limit: small('limit'), flags: small('flags'), base: integerOf(fields['base']) }
}

/** Registers in the order of Linux's `user_regs_struct`. */
function longStatus(cpu: X86Registers, number: number): Uint8Array {
  const general = (...names: string[]): bigint[] => names.map((name) => cpu.general.get(name) ?? 0n)
  const selector = (name: string): bigint => BigInt(cpu.segments.get(name)!.selector)
  const base = (name: string): bigint => cpu.segments.get(name)!.base
  return registerStatus([
    ...general('r15', 'r14', 'r13', 'r12', 'rbp', 'rbx', 'r11', 'r10', 'r9', 'r8', 'rax', 'rcx', 'rdx', 'rsi', 'rdi'),
    0n, // the number of a system call under way, which no CPU knows
    ...[cpu.rip, selector('cs'), cpu.flags, ...general('rsp'), selector('ss')],
    ...[base('fs'), base('gs'), selector('ds'), selector('es'), selector('fs'), selector('gs')],
  ], number, 336)
}

/** The same of a 32-bit kernel. */
function shortStatus(cpu: X86Registers, number: number): Uint8Array {
  const bytes = new Uint8Array(144)
  const view = viewOf(bytes)
  const general = (...names: string[]): number[] => names.map((name) => Number(BigInt.asUintN(32, cpu.general.get(name) ?? 0n)))
  const selector = (name: string): number => cpu.segments.get(name)!.selector
  const low = (value: bigint): number => Number(BigInt.asUintN(32, value))
  const registers = [
    ...general('rbx', 'rcx', 'rdx', 'rsi', 'rdi', 'rbp', 'rax'),
    ...[selector('ds'), selector('es'), selector('fs'), selector('gs'), 0],
    ...[low(cpu.rip), selector('cs'), low(cpu.flags), ...general('rsp'), selector('ss')],
  ]
  view.setUint32(24, number, true)
  registers.forEach((value, i) => view.setUint32(72 + 4 * i, value, true))
  return bytes
}

function qemuState(cpu: X86Registers): Uint8Array {
  const bytes = new Uint8Array(440)
  const view = viewOf(bytes)
  view.setUint32(0, 1, true)
  view.setUint32(4, bytes.length, true)
  const order = ['rax', 'rbx', 'rcx', 'rdx', 'rsi', 'rdi', 'rsp', 'rbp', ...streamOrder.slice(8)]
  const words = [...order.map((name) => cpu.general.get(name) ?? 0n), cpu.rip, cpu.flags]
  words.forEach((value, i) => view.setBigUint64(8 + 8 * i, value, true))
  ;['cs', 'ds', 'es', 'fs', 'gs', 'ss', 'ldt', 'tr', 'gdt', 'idt'].forEach((name, i) => {
    const { selector, limit, flags, base } = cpu.segments.get(name)!
    const at = 152 + 24 * i
    view.setUint32(at, selector, true)
    view.setUint32(at + 4, limit, true)
    view.setUint32(at + 8, flags, true)
    view.setBigUint64(at + 16, base, true)
  })
  ;[...cpu.control, cpu.kernelGsBase].forEach((value, i) => view.setBigUint64(392 + 8 * i, value, true))
  return bytes
}
