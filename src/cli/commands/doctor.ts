import { doctor, type Finding } from '../../snapshot/host-doctor.ts'
import { command } from '../command.ts'
import { outputOption } from '../image/options.ts'
import { prettyJson } from '../print/shapes.ts'
import { paletteFor, visible, type Palette } from '../terminal.ts'

export const doctorCommand = command({
  name: 'doctor',
  summary: 'Show what this host and its QEMU can do for saving and reverting VMs',
  description: ['Nothing is changed. QEMU is started for a moment, without a guest.'],
  options: {
    qemu: { value: 'PROGRAM', file: true, help: 'the QEMU to ask; default qemu-system-x86_64' },
    ...outputOption,
  },
  arguments: [{ name: 'IMAGE', optional: true, many: true, help: 'images whose locks are to be looked up' }],
  exitCodes: { 1: 'saving in the background or reverting at once does not work here' },
  examples: [
    { line: 'qcow2 doctor', shows: 'look at this host' },
    { line: 'qcow2 doctor --qemu /opt/qemu/bin/qemu-system-x86_64 vm.qcow2', shows: 'another QEMU, and who uses an image' },
  ],
  async run({ options, args, print, signal, terminal }) {
    const report = await doctor({ qemu: options.qemu, images: args, signal })
    if (options.output === 'json') await print(prettyJson(report))
    else {
      const palette = paletteFor(terminal, terminal.stdout)
      const lines = report.findings.flatMap((finding) => findingLines(finding, palette))
      lines.push('', `saving while the guest runs on: ${verdict(report.backgroundSave, palette)}`, `reverting at once:              ${verdict(report.instantRevert, palette)}`)
      // coloured: not for print, which shows control characters
      await terminal.stdout.write(`${lines.join('\n')}\n`)
    }
    return report.backgroundSave && report.instantRevert ? 0 : 1
  },
})

function findingLines({ name, status, detail, advice }: Finding, palette: Palette): string[] {
  const paint = { yes: palette.green, limited: palette.yellow, no: palette.red, unknown: palette.dim }[status]
  const line = `${paint(status.padEnd(8))}${name.padEnd(21)}${visible(detail)}`
  return advice === undefined ? [line] : [line, `${' '.repeat(29)}${palette.dim(advice)}`]
}

function verdict(works: boolean, palette: Palette): string {
  return works ? palette.green('works') : palette.red('does not work')
}
