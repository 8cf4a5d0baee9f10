/** Every command, in the order help lists them. */
import type { CommandDefinition } from './command.ts'
import { checkCommand } from './commands/check.ts'
import { completionCommand } from './commands/completion.ts'
import { createCommand } from './commands/create.ts'
import { doctorCommand } from './commands/doctor.ts'
import { mapCommand } from './commands/map.ts'
import { resizeCommand } from './commands/resize.ts'
import { serveCommand } from './commands/serve.ts'
import { snapshotCommand } from './commands/snapshot.ts'
import { vmstateCommand } from './commands/vmstate.ts'

export const commands: readonly CommandDefinition[] = [
  mapCommand,
  checkCommand,
  createCommand,
  resizeCommand,
  snapshotCommand,
  vmstateCommand,
  doctorCommand,
  serveCommand,
  completionCommand(() => commands),
]
