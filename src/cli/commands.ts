/** Every command, in the order help lists them. */
import type { CommandDefinition } from './command.ts'
import { checkCommand } from './commands/check.ts'
import { completionCommand } from './commands/completion.ts'
import { createCommand } from './commands/create.ts'
import { mapCommand } from './commands/map.ts'
import { snapshotCommand } from './commands/snapshot.ts'

export const commands: readonly CommandDefinition[] = [mapCommand, checkCommand, createCommand, snapshotCommand, completionCommand(() => commands)]
