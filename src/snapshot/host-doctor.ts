/**
 * The doctor: what this host and its QEMU can do for saving and reverting running VMs, and what to
 * change where they cannot. It reads `/proc` and `/dev`, and asks QEMU itself (a machine without a
 * guest, for a moment). It changes nothing.
 */
import { spawn } from 'node:child_process'
import { constants } from 'node:fs'
import { access, readFile, stat } from 'node:fs/promises'
import { release } from 'node:os'
import { Duplex } from 'node:stream'
import { QmpClient } from '../qmp/client.ts'

/** One thing looked at. */
export interface Finding {
  readonly name: 'platform' | 'kernel' | 'userfaultfd' | 'kvm' | 'file locks' | 'qemu' | 'background snapshot' | 'postcopy'
  /** `no`: what needs it will not work; `limited`: it works with the restriction in `detail`. */
  readonly status: 'yes' | 'limited' | 'no' | 'unknown'
  readonly detail: string
  /** What to change, where something can be. */
  readonly advice?: string
}

/** What {@link doctor} found. */
export interface DoctorReport {
  readonly findings: readonly Finding[]
  /** A running guest can be saved while it runs on. */
  readonly backgroundSave: boolean
  /** A guest can be started before its memory is loaded. */
  readonly instantRevert: boolean
}

/** Options of {@link doctor}. */
export interface DoctorOptions {
  /** The QEMU system emulator to ask; default `qemu-system-x86_64` on the PATH. */
  readonly qemu?: string | undefined
  /** Images to look up in the kernel's table of file locks. */
  readonly images?: readonly string[] | undefined
  readonly signal?: AbortSignal | undefined
}

/**
 * Examines the host. Never throws for what it finds missing: that is a finding.
 */
export async function doctor(options: DoctorOptions = {}): Promise<DoctorReport> {
  options.signal?.throwIfAborted()
  const findings = [
    platform(),
    kernel(process.platform, release()),
    await userfaultfd(),
    await kvm(),
    ...(await Promise.all((options.images ?? []).map(fileLocks))),
    ...(await qemu(options.qemu ?? 'qemu-system-x86_64', options.signal)),
  ]
  const able = (name: Finding['name']): boolean => {
    const status = findings.find((finding) => finding.name === name)?.status
    return status === 'yes' || status === 'limited'
  }
  return { findings, backgroundSave: able('background snapshot'), instantRevert: able('postcopy') }
}

function platform(): Finding {
  if (process.platform === 'linux') return { name: 'platform', status: 'yes', detail: `Linux on ${process.arch}` }
  return {
    name: 'platform',
    status: 'no',
    detail: `${process.platform} has no userfaultfd`,
    advice: 'run QEMU on Linux for background saves and instant reverts; reading and writing images works here',
  }
}

/** Judges a kernel release such as `6.1.0-18-amd64`. */
export function kernel(system: string, version: string): Finding {
  const [major = 0, minor = 0] = version.split('.').map((part) => Number.parseInt(part, 10))
  const atLeast = (needMajor: number, needMinor: number): boolean =>
    major > needMajor || (major === needMajor && minor >= needMinor)
  if (system !== 'linux') return { name: 'kernel', status: 'unknown', detail: version }
  if (atLeast(5, 19)) return { name: 'kernel', status: 'yes', detail: `Linux ${version}` }
  if (atLeast(5, 7)) {
    return {
      name: 'kernel',
      status: 'limited',
      detail: `Linux ${version} write-protects anonymous memory only`,
      advice: 'guests with shared memory (memfd, hugetlbfs) need Linux 5.19 or newer to be saved in the background',
    }
  }
  return {
    name: 'kernel',
    status: 'no',
    detail: `Linux ${version} has no write protection by userfaultfd`,
    advice: 'background saves need Linux 5.7 or newer',
  }
}

async function userfaultfd(): Promise<Finding> {
  const sysctl = (await text('/proc/sys/vm/unprivileged_userfaultfd'))?.trim()
  const device = await usable('/dev/userfaultfd')
  const capable = hasPtraceCapability((await text('/proc/self/status')) ?? '')
  if (sysctl === undefined && !device) {
    return {
      name: 'userfaultfd',
      status: 'no',
      detail: 'the kernel was built without userfaultfd',
      advice: 'use a kernel with CONFIG_USERFAULTFD',
    }
  }
  if (capable) return { name: 'userfaultfd', status: 'yes', detail: 'this user (not the one QEMU may run as) may handle all faults (CAP_SYS_PTRACE)' }
  if (sysctl === '1') {
    return { name: 'userfaultfd', status: 'yes', detail: 'open to every user (vm.unprivileged_userfaultfd = 1)' }
  }
  const advice = 'run QEMU as root, set `sysctl vm.unprivileged_userfaultfd=1`, or (QEMU 8.0 and newer) give its user access to /dev/userfaultfd'
  if (device) {
    return { name: 'userfaultfd', status: 'limited', detail: 'by /dev/userfaultfd, which QEMU uses since 8.0', advice }
  }
  return { name: 'userfaultfd', status: 'no', detail: 'this user (not the one QEMU may run as) may not handle faults of the kernel', advice }
}

/** `status`: the text of `/proc/self/status`. CAP_SYS_PTRACE is capability 19. */
export function hasPtraceCapability(status: string): boolean {
  const effective = /^CapEff:\s*([0-9a-f]+)$/m.exec(status)?.[1]
  return effective !== undefined && (BigInt(`0x${effective}`) >> 19n) % 2n === 1n
}

async function kvm(): Promise<Finding> {
  if (await usable('/dev/kvm')) return { name: 'kvm', status: 'yes', detail: '/dev/kvm can be opened by this user' }
  const present = (await stat('/dev/kvm').catch(() => undefined)) !== undefined
  return present
    ? { name: 'kvm', status: 'no', detail: '/dev/kvm is closed to this user', advice: 'add the user to the group that owns /dev/kvm' }
    : { name: 'kvm', status: 'no', detail: 'there is no /dev/kvm; guests run by translation (TCG), which is slow', advice: 'enable virtualization in the firmware, or nested virtualization on the outer host' }
}

/**
 * QEMU locks an image it has open by open-file-description locks on bytes 100 to 203. Node cannot take
 * such locks itself; this says who does.
 */
async function fileLocks(image: string): Promise<Finding> {
  const locks = await text('/proc/locks')
  const file = await stat(image).catch(() => undefined)
  if (file === undefined) return { name: 'file locks', status: 'unknown', detail: `${image} does not exist` }
  if (locks === undefined) return { name: 'file locks', status: 'unknown', detail: '/proc/locks cannot be read' }
  if (!isLockedByQemu(locks, file.ino)) {
    return { name: 'file locks', status: 'yes', detail: `${image} is not open in a QEMU on this host` }
  }
  return {
    name: 'file locks',
    status: 'no',
    detail: `${image} is locked by a running QEMU`,
    advice: 'do not write this image while QEMU has it open; save to a separate RAM image instead',
  }
}

/** `locks`: the text of `/proc/locks`; `inode`: the image's. */
export function isLockedByQemu(locks: string, inode: number): boolean {
  return locks.split('\n').some((line) => {
    const match = /^\d+: OFDLCK\s+\S+\s+\S+\s+\S+\s+[0-9a-f]+:[0-9a-f]+:(\d+)\s+(\d+)\s+(\S+)/.exec(line)
    if (match === null || Number(match[1]) !== inode) return false
    const first = Number(match[2])
    return first >= 100 && first <= 203
  })
}

async function qemu(path: string, signal: AbortSignal | undefined): Promise<Finding[]> {
  const args = ['-machine', 'none', '-S', '-nodefaults', '-display', 'none', '-incoming', 'defer', '-qmp', 'stdio']
  const child = spawn(path, args, { stdio: ['pipe', 'pipe', 'ignore'] })
  const failed = new Promise<never>((_resolve, reject) => child.on('error', reject))
  failed.catch(() => undefined)
  try {
    const monitor = Duplex.from({ readable: child.stdout, writable: child.stdin })
    const connecting = QmpClient.connect(monitor, { timeout: 10_000, signal })
    connecting.catch(() => undefined)
    await using qmp = await Promise.race([connecting, failed])
    const { qemu: version, package: build } = qmp.greeting.version
    const name = `QEMU ${version.major}.${version.minor}.${version.micro} ${build}`.trim()
    return [
      { name: 'qemu', status: version.major >= 6 ? 'yes' : 'limited', detail: name },
      await capability(qmp, 'background snapshot', 'background-snapshot'),
      await capability(qmp, 'postcopy', 'postcopy-ram'),
    ]
  } catch (error) {
    signal?.throwIfAborted()
    const detail = `${path}: ${error instanceof Error ? error.message : String(error)}`
    return [{ name: 'qemu', status: 'no', detail, advice: 'install QEMU, or name the emulator to ask' }]
  } finally {
    child.kill('SIGKILL')
  }
}

/** Asks QEMU to switch the capability on; it tries what the kernel lets it do before it agrees. */
async function capability(
  qmp: QmpClient,
  name: 'background snapshot' | 'postcopy',
  capability: 'background-snapshot' | 'postcopy-ram',
): Promise<Finding> {
  try {
    await qmp.execute('migrate-set-capabilities', { capabilities: [{ capability, state: true }] })
    await qmp.execute('migrate-set-capabilities', { capabilities: [{ capability, state: false }] })
    return { name, status: 'yes', detail: `QEMU accepts the capability ${capability}` }
  } catch (error) {
    const detail = error instanceof Error ? error.message : String(error)
    return { name, status: 'no', detail, advice: 'see the findings on kernel and userfaultfd' }
  }
}

async function text(path: string): Promise<string | undefined> {
  return readFile(path, 'utf8').catch(() => undefined)
}

function usable(path: string): Promise<boolean> {
  return access(path, constants.R_OK | constants.W_OK).then(
    () => true,
    () => false,
  )
}
