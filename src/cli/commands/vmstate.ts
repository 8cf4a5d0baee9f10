import { group } from '../command.ts'
import { vmstateDiff } from './vmstate-diff.ts'
import { vmstateExport } from './vmstate-export.ts'
import { vmstateExtract } from './vmstate-extract.ts'
import { vmstateLs } from './vmstate-ls.ts'
import { vmstateShow } from './vmstate-show.ts'

export const vmstateCommand = group({
  name: 'vmstate',
  summary: 'Look into saved VMs: their memory and their devices',
  description: [
    'A saved VM is named IMAGE@SNAPSHOT, or IMAGE where only one snapshot has VM state (a RAM image is one), or the name of a stream file: a migration stream as QEMU writes it, a mapped-ram file, a save image of libvirt, any of these compressed with gzip or zstd.',
  ],
  commands: [vmstateLs, vmstateShow, vmstateExtract, vmstateExport, vmstateDiff],
  examples: [],
})
