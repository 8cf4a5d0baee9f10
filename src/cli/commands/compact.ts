import { compactImage } from '../../qcow2/compact.ts'
import { repairImage } from '../../qcow2/repair.ts'
import { command } from '../command.ts'
import { ExitError } from '../errors.ts'
import { formatOption, imageOptsOption, objectOption, openerFor, outputOption, quietOption, specOf } from '../image/options.ts'
import { reasonOf } from '../image/reasons.ts'
import { prettyJson } from '../print/shapes.ts'
import { formatSize } from '../size.ts'

export const compactCommand = command({
  name: 'compact',
  summary: 'Give the space back that an image no longer uses',
  description: [
    'Leaked clusters are freed, then the file is cut behind the last cluster in use. Free clusters in the middle stay; convert leaves them behind.',
  ],
  options: { ...formatOption, ...imageOptsOption, ...outputOption, ...objectOption, ...quietOption },
  arguments: [{ name: 'FILENAME', help: 'the image' }],
  examples: [{ line: 'qcow2 compact disk.qcow2', shows: 'after deleting a snapshot' }],
  async run(context) {
    const { options, print, signal } = context
    const file = await openerFor(context).file(specOf(context), { readOnly: false })
    try {
      if (file.format !== 'qcow2') throw new ExitError(1, 'This image format cannot be compacted')
      context.leaves(`${file.filename} is sound; compact it again for the rest`)
      const before = file.host.size
      const { leaksFixed } = await repairImage(file.host, { repair: 'leaks', signal })
      const freed = await compactImage(file.host, { signal })
      const result = { filename: file.filename, before, after: file.host.size, freed, 'leaks-fixed': leaksFixed }
      if (options.output === 'json') await print(prettyJson(result))
      else if (!options.quiet) await print(`${file.filename}: ${formatSize(freed)} given back, now ${formatSize(file.host.size)}`)
      return 0
    } catch (error) {
      if (error instanceof ExitError || signal.aborted) throw error
      throw new ExitError(1, reasonOf(error), { cause: error })
    } finally {
      await file.host.close()
    }
  },
})
