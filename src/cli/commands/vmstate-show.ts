import type { RamBlock } from '../../migration/records.ts'
import type { VmState } from '../../migration/vm-state.ts'
import { command } from '../command.ts'
import { ExitError } from '../errors.ts'
import { forceShareOption, objectOption, outputOption } from '../image/options.ts'
import { openVmState } from '../image/vm-state.ts'
import { prettyJson } from '../print/shapes.ts'
import { formatSize } from '../size.ts'

export const vmstateShow = command({
  name: 'show',
  summary: 'Show the machine, the memory and the devices of a saved VM',
  options: {
    device: { short: 'd', value: 'NAME', help: 'show the fields of this device instead' },
    instance: { value: 'NUMBER', help: 'with --device: which of several; default 0' },
    xml: { help: "print libvirt's definition of the domain, of a save image of libvirt" },
    ...outputOption,
    ...forceShareOption,
    ...objectOption,
  },
  arguments: [{ name: 'VM', help: 'IMAGE@SNAPSHOT, a RAM image, or a stream file' }],
  examples: [
    { line: 'qcow2 vmstate show vm.qcow2@running', shows: 'what is saved' },
    { line: 'qcow2 vmstate show vm.qcow2@running --device cpu --output=json', shows: 'the registers of the CPU' },
    { line: 'qcow2 vmstate show domain.save --xml', shows: "what libvirt's domain was" },
  ],
  async run(context) {
    const { options, args, print, signal } = context
    const { vm, name, close } = await openVmState(context, args[0]!)
    try {
      if (options.device !== undefined) {
        const device = vm.device(options.device, Number(options.instance ?? 0))
        await print(prettyJson(await vm.decodeDevice(device, { signal })))
        return 0
      }
      if (options.xml) {
        if (vm.libvirt === undefined) throw new ExitError(1, `${name} is not a save image of libvirt: it has no domain XML`)
        await print(vm.libvirt.domainXml.trimEnd())
        return 0
      }
      const summary = summarise(name, vm)
      if (options.output === 'json') await print(prettyJson(summary))
      else for (const line of summaryLines(summary)) await print(line)
      return 0
    } finally {
      await close()
    }
  },
})

interface BlockSummary {
  readonly name: string
  readonly length: number
  readonly dataPages: number
  readonly zeroPages: number
  readonly absentPages: number
}

interface Summary {
  readonly name: string
  readonly machine: string | undefined
  readonly uuid: string | undefined
  readonly capabilities: readonly string[]
  readonly streamLength: number
  readonly pageSize: number
  readonly ram: readonly BlockSummary[]
  readonly devices: readonly { name: string; instance: number; version: number; length: number }[]
  /** Bytes of device state that no VM description explains. */
  readonly unexplained: number
  /** Why the stream is cut short, if it is. */
  readonly cut: string | undefined
}

function summarise(name: string, vm: VmState): Summary {
  return {
    name,
    machine: vm.machine,
    uuid: vm.uuid === undefined ? undefined : uuidText(vm.uuid),
    capabilities: vm.capabilities,
    streamLength: vm.streamLength,
    pageSize: vm.ram.pageSize,
    ram: vm.ram.blocks.map((block) => summariseBlock(vm, block)),
    devices: vm.devices.map(({ name, instanceId, versionId, length }) => ({ name, instance: instanceId, version: versionId, length })),
    cut: vm.cut,
    unexplained: vm.tailOffset === undefined ? 0 : vm.streamOffset + vm.streamLength - vm.tailOffset,
  }
}

function summariseBlock(vm: VmState, block: RamBlock): BlockSummary {
  const counts = { data: 0, zero: 0, absent: 0 }
  for (const { start, length, zero, present } of vm.ram.extents(block, 0, block.length)) {
    counts[!present ? 'absent' : zero ? 'zero' : 'data'] += Math.ceil((start + length) / vm.ram.pageSize) - Math.ceil(start / vm.ram.pageSize)
  }
  return { name: block.name, length: block.length, dataPages: counts.data, zeroPages: counts.zero, absentPages: counts.absent }
}

function summaryLines(summary: Summary): string[] {
  const { name, machine, uuid, capabilities, streamLength, pageSize, ram, devices, unexplained, cut } = summary
  const lines = [`VM state: ${name}`, `machine: ${machine ?? 'not recorded'}`]
  if (uuid !== undefined) lines.push(`uuid: ${uuid}`)
  if (capabilities.length > 0) lines.push(`capabilities: ${capabilities.join(', ')}`)
  lines.push(`stream: ${formatSize(streamLength)} (${streamLength} bytes)`)
  lines.push(`memory: ${formatSize(ram.reduce((sum, block) => sum + block.length, 0))} in ${ram.length} RAM blocks, pages of ${pageSize} bytes`)
  lines.push(row('RAM BLOCK', 'SIZE', 'DATA', 'ZERO', 'ABSENT'))
  for (const block of ram) {
    lines.push(row(block.name, formatSize(block.length), String(block.dataPages), String(block.zeroPages), String(block.absentPages)))
  }
  lines.push(`devices: ${devices.length}`)
  for (const device of devices) {
    lines.push(`    ${device.name}${device.instance === 0 ? '' : ` (${device.instance})`}, version ${device.version}, ${device.length} bytes`)
  }
  if (unexplained > 0) lines.push(`device state without a description: ${unexplained} bytes${cut === undefined ? '' : '; the stream may be cut short'}`)
  if (cut !== undefined) lines.push(`cut short: ${cut}`)
  return lines
}

function row(name: string, ...numbers: string[]): string {
  return `${name.padEnd(28)}${numbers.map((text) => text.padStart(10)).join(' ')}`
}

function uuidText(bytes: Uint8Array): string {
  const hex = Buffer.from(bytes).toString('hex')
  return hex.replace(/^(.{8})(.{4})(.{4})(.{4})(.{12})$/, '$1-$2-$3-$4-$5')
}
