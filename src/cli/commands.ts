/** Every command, in the order help lists them. */
import type { CommandDefinition } from './command.ts'
import { amendCommand } from './commands/amend.ts'
import { bitmapCommand } from './commands/bitmap.ts'
import { captureCommand } from './commands/capture.ts'
import { checkCommand } from './commands/check.ts'
import { commitCommand } from './commands/commit.ts'
import { compactCommand } from './commands/compact.ts'
import { compareCommand } from './commands/compare.ts'
import { completionCommand } from './commands/completion.ts'
import { convertCommand } from './commands/convert.ts'
import { createCommand } from './commands/create.ts'
import { doctorCommand } from './commands/doctor.ts'
import { infoCommand } from './commands/info.ts'
import { mapCommand } from './commands/map.ts'
import { measureCommand } from './commands/measure.ts'
import { rebaseCommand } from './commands/rebase.ts'
import { resizeCommand } from './commands/resize.ts'
import { revertCommand } from './commands/revert.ts'
import { saveCommand } from './commands/save.ts'
import { serveCommand } from './commands/serve.ts'
import { snapshotCommand } from './commands/snapshot.ts'
import { traceCommand } from './commands/trace.ts'
import { vmstateCommand } from './commands/vmstate.ts'

export const commands: readonly CommandDefinition[] = [
  infoCommand,
  mapCommand,
  checkCommand,
  compareCommand,
  measureCommand,
  createCommand,
  convertCommand,
  resizeCommand,
  snapshotCommand,
  bitmapCommand,
  commitCommand,
  rebaseCommand,
  amendCommand,
  compactCommand,
  vmstateCommand,
  saveCommand,
  revertCommand,
  captureCommand,
  doctorCommand,
  serveCommand,
  traceCommand(() => commands),
  completionCommand(() => commands),
]
