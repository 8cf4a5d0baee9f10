import { checkImage } from '../../qcow2/check.ts'
import type { CheckReport } from '../../qcow2/check-report.ts'
import { readImageInfo } from '../../qcow2/info.ts'
import { repairImage } from '../../qcow2/repair.ts'
import { Qcow2Error } from '../../core/errors.ts'
import { command, type Context } from '../command.ts'
import { ExitError } from '../errors.ts'
import { bitmapsWarning } from '../image/bitmap-warning.ts'
import { forceShareOption, formatOption, imageOptsOption, isDirect, objectOption, outputOption, quietOption, fileArgument } from '../image/options.ts'
import { couldNotOpen } from '../image/reasons.ts'
import { checkText, repairText } from '../print/check.ts'
import { findingLines, unreadableSnapshots } from '../print/findings.ts'
import { prettyJson, type CheckEntry } from '../print/shapes.ts'
import { say } from '../terminal.ts'
import { snapshotIn } from './snapshot.ts'

export const checkCommand = command({
  name: 'check',
  summary: 'Check an image for leaks and corruption, and repair it',
  description: [
    'Every reference is counted and compared with the stored refcounts. Do not check an image that a VM is writing.',
    'Each thing that is wrong is told on stderr, beginning with the cluster it is about. Of IMAGE@SNAPSHOT the whole image is checked: clusters are shared.',
  ],
  options: {
    repair: { short: 'r', value: 'WHAT', choices: ['leaks', 'all'], help: "'leaks' frees what nothing refers to; 'all' also repairs corruptions" },
    ...formatOption,
    ...imageOptsOption,
    ...outputOption,
    cache: { short: 'T', value: 'MODE', help: "'none' goes past the page cache" },
    ...forceShareOption,
    ...objectOption,
    ...quietOption,
  },
  arguments: [{ name: 'FILENAME', help: 'the image' }],
  exitCodes: { 2: 'the image is corrupt', 3: 'clusters are leaked, nothing worse', 63: 'the format has no check' },
  examples: [
    { line: 'qcow2 check disk.qcow2', shows: 'look' },
    { line: 'qcow2 check -r leaks disk.qcow2', shows: 'free leaked clusters' },
    { line: 'qcow2 check --output=json disk.qcow2', shows: 'for programs' },
  ],
  async run(context) {
    const { options, print, signal } = context
    const repair = options.repair as 'leaks' | 'all' | undefined
    const { spec, file, snapshot } = await fileArgument(context, { readOnly: repair === undefined, direct: isDirect(options.cache) })
    const { host, format, filename } = file
    try {
      if (format !== 'qcow2') throw new ExitError(63, 'This image format does not support checks')
      if (repair !== undefined) context.leaves(`${filename} may be partly repaired; run check -r ${repair} again`)
      const facts = await readImageInfo(host).catch(() => undefined)
      if (snapshot !== undefined && facts !== undefined) snapshotIn(facts, snapshot)
      if (facts?.bitmapsInvalid === true) context.warn(bitmapsWarning(filename))
      const report = await (repair === undefined ? checkImage(host, { signal }) : repairImage(host, { repair, signal })).catch((error: unknown) => {
        throw isNoImage(error) ? couldNotOpen(spec.given ?? filename, error) : error
      })
      const clusterSize = 2 ** (await host.read(23, 1))[0]!
      if (context.terminal.program === 'qemu-img') await refuseSnapshots(report, context)
      for (const line of findingLines(report, clusterSize)) await say(context.terminal, line)
      const result = checkEntry(filename, report)
      if (options.output === 'json') await print(prettyJson(result))
      else if (!options.quiet) for (const line of [...repairText(result), ...checkText(result)]) await print(line)
      return exitCode(report)
    } finally {
      await host.close()
    }
  },
})

/** The header or the snapshot table cannot be understood: there is nothing to check. */
function isNoImage(error: unknown): boolean {
  return Qcow2Error.is(error, 'ERR_FORMAT') || Qcow2Error.is(error, 'ERR_UNSUPPORTED')
}

/** A table beyond its limits is where qemu-img ends, unless it may cut it. */
async function refuseSnapshots({ findings }: CheckReport, { terminal }: Pick<Context, 'terminal'>): Promise<void> {
  const unreadable = unreadableSnapshots(findings)
  if (unreadable === undefined) return
  await say(terminal, `qemu-img: ERROR ${unreadable.inCheck}\n${unreadable.advice}`)
  throw new ExitError(1, 'Check failed: File too large')
}

function checkEntry(filename: string, report: CheckReport): CheckEntry {
  const counts = {
    'image-end-offset': report.imageEndOffset,
    'total-clusters': report.totalClusters,
    corruptions: report.corruptions,
    leaks: report.leaks,
    'corruptions-fixed': report.corruptionsFixed,
    'leaks-fixed': report.leaksFixed,
    'allocated-clusters': report.allocatedClusters,
    'fragmented-clusters': report.fragmentedClusters,
    'compressed-clusters': report.compressedClusters,
  }
  const present = Object.entries(counts).filter(([, count]) => count > 0)
  return { filename, format: 'qcow2', 'check-errors': report.checkErrors, ...Object.fromEntries(present) }
}

function exitCode(report: CheckReport): number {
  if (report.checkErrors > 0) return 1
  if (report.corruptions > 0 || report.overlaps > 0) return 2
  return report.leaks > 0 ? 3 : 0
}
