/** Every command, in the order help lists them. */
import type { CommandDefinition } from './command.ts'
import { completionCommand } from './commands/completion.ts'

export const commands: readonly CommandDefinition[] = [completionCommand(() => commands)]
