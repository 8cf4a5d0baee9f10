/** The doctor: its judgements as functions, and what it says of this host. */
import { writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { expect, test } from 'vitest'
import { doctor, hasPtraceCapability, isLockedByQemu, kernel } from '../../src/snapshot/host-doctor.ts'
import { Guest } from '../support/guest.ts'
import { describeWithQemu } from '../support/qemu.ts'
import { tempFolder } from '../support/temp.ts'

test('kernels by release', () => {
  expect(kernel('linux', '6.1.0-18-amd64').status).toBe('yes')
  expect(kernel('linux', '5.19.0').status).toBe('yes')
  expect(kernel('linux', '5.10.0-28-amd64').status).toBe('limited')
  expect(kernel('linux', '5.4.0-150-generic').status).toBe('no')
  expect(kernel('darwin', '24.1.0').status).toBe('unknown')
})

test('CAP_SYS_PTRACE is bit 19 of the effective set', () => {
  expect(hasPtraceCapability('CapPrm:\tffff\nCapEff:\t000001ffffffffff\n')).toBe(true)
  expect(hasPtraceCapability('CapEff:\t0000000000080000\n')).toBe(true)
  expect(hasPtraceCapability('CapEff:\t0000000000000000\nCapBnd:\t000001ffffffffff\n')).toBe(false)
  expect(hasPtraceCapability('')).toBe(false)
})

test('locks of QEMU in the table of file locks', () => {
  const locks = [
    '1: POSIX  ADVISORY  WRITE 812 fe:00:4711 0 EOF',
    '2: OFDLCK ADVISORY  READ -1 fe:00:1234 100 101',
    '3: OFDLCK ADVISORY  READ -1 fe:00:9999 1000 1001',
  ].join('\n')
  expect(isLockedByQemu(locks, 1234)).toBe(true)
  expect(isLockedByQemu(locks, 4711)).toBe(false)
  expect(isLockedByQemu(locks, 9999)).toBe(false)
})

test('a missing emulator is a finding, not an exception', async () => {
  const report = await doctor({ qemu: '/nonexistent/qemu' })
  expect(report.findings.find(({ name }) => name === 'qemu')).toMatchObject({ status: 'no' })
  expect(report).toMatchObject({ backgroundSave: false, instantRevert: false })
})

describeWithQemu('doctor', (qemu) => {
  test('asks QEMU what it can do, and sees which images are open', async () => {
    const free = join(tempFolder(), 'free.qcow2')
    const held = join(tempFolder(), 'held.qcow2')
    for (const image of [free, held]) await qemu.imgOk('create', '-f', 'qcow2', image, '1M')
    await Guest.boot(qemu, { disks: [held] })
    const report = await doctor({ qemu: qemu.path('qemu-system-x86_64'), images: [free, held] })
    const found = (name: string): unknown[] => report.findings.filter((finding) => finding.name === name)
    expect(found('qemu')).toMatchObject([{ status: 'yes', detail: expect.stringContaining(qemu.version.split(' ')[0]!) as string }])
    expect(found('file locks')).toHaveLength(2)
    expect(found('file locks')[0]).toMatchObject({ detail: expect.stringContaining('is not open') as string })
    if (process.getuid?.() === 0) expect(report).toMatchObject({ backgroundSave: true, instantRevert: true })
    for (const finding of report.findings) expect(finding.status === 'no' && finding.advice === undefined).toBe(false)
  })

  test('a file that is no QEMU is a finding', async () => {
    const script = join(tempFolder(), 'not-qemu')
    writeFileSync(script, 'hello', { mode: 0o755 })
    const report = await doctor({ qemu: script })
    expect(report.findings.find(({ name }) => name === 'qemu')).toMatchObject({ status: 'no' })
  })
})
