import { command, type CommandDefinition } from '../command.ts'
import { UsageError } from '../errors.ts'
import { completion, shells } from '../completion.ts'
import { didYouMean } from '../nearest.ts'

/** `completion`, for the commands that `all` gives (itself among them). */
export function completionCommand(all: () => Promise<readonly CommandDefinition[]>): CommandDefinition {
  return command({
    name: 'completion',
    summary: 'Print a shell completion script',
    options: {},
    arguments: [{ name: 'SHELL', word: true, help: `one of ${shells.join(', ')}` }],
    examples: [{ line: 'source <(qcow2 completion bash)', shows: 'complete in this shell' }],
    async run({ args, terminal }) {
      const shell = shells.find((name) => name === args[0])
      if (shell === undefined) throw new UsageError(`no completions for '${args[0]!}'${didYouMean(args[0]!, shells)}`)
      await terminal.stdout.write(completion(shell, await all()))
      return 0
    },
  })
}
