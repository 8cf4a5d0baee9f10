import { resolve } from 'node:path'
import { IoError } from '../../core/errors.ts'
import { commitImage } from '../../qcow2/commit.ts'
import { command } from '../command.ts'
import { ExitError } from '../errors.ts'
import { resolveBacking } from '../image/names.ts'
import { chainOf, type OpenedImage } from '../image/opened.ts'
import { formatOption, imageOptsOption, isDirect, objectOption, openArgument, openerFor, progressOption, quietOption } from '../image/options.ts'
import { reasonOf } from '../image/reasons.ts'
import { parsePlace } from '../image/spec.ts'

export const commitCommand = command({
  name: 'commit',
  summary: 'Write what an overlay holds into its backing file',
  description: [
    'Afterwards the overlay is empty and reads the same. If the backing file is shorter it grows.',
    'The backing file changes: other overlays on top of it become invalid.',
  ],
  options: {
    drop: { short: 'd', help: 'do not empty the overlay' },
    base: { short: 'b', value: 'BASE', file: true, help: 'write into this image further down the chain instead; implies -d' },
    cache: { short: 't', value: 'MODE', help: "'none' goes past the page cache" },
    rate: { short: 'r', value: 'RATE', help: 'accepted for compatibility; there is no limit' },
    ...formatOption,
    ...imageOptsOption,
    ...objectOption,
    ...progressOption,
    ...quietOption,
  },
  arguments: [{ name: 'FILENAME', help: 'the overlay' }],
  examples: [{ line: 'qcow2 commit overlay.qcow2', shows: 'make the changes permanent' }],
  async run(context) {
    const { options, print, signal } = context
    const how = { readOnly: false, direct: isDirect(options.cache) }
    const opened = await openArgument(context, how)
    try {
      const { image, backing } = opened
      if (image === undefined || backing === undefined) throw new ExitError(1, 'Image does not have a backing file')
      const depth = depthOf(opened, options.base)
      const below = chainOf(opened)[depth]!
      const target = await openerFor(context).spec({ ...below.spec, format: below.format }, how)
      try {
        context.leaves(`${below.filename} may hold a part of the changes; ${opened.filename} still has all of them: commit again`)
        const progress = context.progress()
        const onProgress = ({ done, total }: { done: number; total: number }): void => progress.update(done, total)
        await commitImage(image, target.device, { keep: options.drop || options.base !== undefined, depth, signal, onProgress }).catch((error: unknown) => {
          throw error instanceof IoError ? new ExitError(1, `Block job failed: ${reasonOf(error)}`, { cause: error }) : error
        })
        progress.finish()
      } finally {
        await target.close()
      }
    } finally {
      await opened.close()
    }
    if (!options.quiet) await print('Image committed.')
    return 0
  },
})

/** How many files down the chain `base` is. */
function depthOf(opened: OpenedImage, base: string | undefined): number {
  if (base === undefined) return 1
  const chain = chainOf(opened)
  const place = ({ place, filename }: Pick<OpenedImage, 'place' | 'filename'>): string => (place.kind === 'file' ? resolve(place.path) : filename)
  // a name means what it would mean in the image above
  const named = (above: OpenedImage): string => place({ place: parsePlace(resolveBacking(above.place, base)), filename: base })
  const depth = chain.findIndex((image, at) => at > 0 && ((image.place.kind !== 'file' && image.filename === base) || place(image) === named(chain[at - 1]!)))
  if (depth < 0) throw new ExitError(1, `Did not find '${base}' in the backing chain of '${opened.filename}'`)
  return depth
}

