import { command } from '../command.ts'
import { ExitError } from '../errors.ts'
import { openerFor, forceShareOption, objectOption, outputOption } from '../image/options.ts'
import { prettyJson } from '../print/shapes.ts'
import { snapshotTable } from '../print/snapshots.ts'
import { nameFor } from '../terminal.ts'
import { snapshotEntry } from './snapshot.ts'

export const vmstateLs = command({
  name: 'ls',
  summary: 'List the snapshots that hold a running VM',
  options: { ...outputOption, ...forceShareOption, ...objectOption },
  arguments: [{ name: 'IMAGE', help: 'a qcow2 image' }],
  examples: [{ line: 'qcow2 vmstate ls vm.qcow2', shows: 'which snapshots can be resumed' }],
  async run(context) {
    const { options, args, print } = context
    const opened = await openerFor(context).name(args[0]!, { readOnly: true, withoutBacking: true })
    try {
      if (opened.image === undefined) throw new ExitError(1, `${args[0]!} is no qcow2 image; 'vmstate show' looks into a stream file`)
      const saved = [...opened.image.snapshots].filter(({ vmStateSize }) => vmStateSize > 0).map(snapshotEntry)
      if (options.output === 'json') await print(prettyJson(saved))
      else for (const line of snapshotTable(saved, nameFor(context.terminal.stdout))) await print(line)
      return 0
    } finally {
      await opened.close()
    }
  },
})
