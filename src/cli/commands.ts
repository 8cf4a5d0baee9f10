/** Every command, in the order help lists them. Each is loaded when it is asked for: a run reads and compiles only what it needs. */
import type { CommandDefinition } from './command.ts'

const loaders: Readonly<Record<string, () => Promise<CommandDefinition>>> = {
  info: async () => (await import('./commands/info.ts')).infoCommand,
  inspect: async () => (await import('./commands/inspect.ts')).inspectCommand,
  map: async () => (await import('./commands/map.ts')).mapCommand,
  check: async () => (await import('./commands/check.ts')).checkCommand,
  compare: async () => (await import('./commands/compare.ts')).compareCommand,
  measure: async () => (await import('./commands/measure.ts')).measureCommand,
  create: async () => (await import('./commands/create.ts')).createCommand,
  convert: async () => (await import('./commands/convert.ts')).convertCommand,
  dd: async () => (await import('./commands/dd.ts')).ddCommand,
  bench: async () => (await import('./commands/bench.ts')).benchCommand,
  resize: async () => (await import('./commands/resize.ts')).resizeCommand,
  snapshot: async () => (await import('./commands/snapshot.ts')).snapshotCommand,
  bitmap: async () => (await import('./commands/bitmap.ts')).bitmapCommand,
  commit: async () => (await import('./commands/commit.ts')).commitCommand,
  rebase: async () => (await import('./commands/rebase.ts')).rebaseCommand,
  amend: async () => (await import('./commands/amend.ts')).amendCommand,
  compact: async () => (await import('./commands/compact.ts')).compactCommand,
  vmstate: async () => (await import('./commands/vmstate.ts')).vmstateCommand,
  save: async () => (await import('./commands/save.ts')).saveCommand,
  revert: async () => (await import('./commands/revert.ts')).revertCommand,
  capture: async () => (await import('./commands/capture.ts')).captureCommand,
  doctor: async () => (await import('./commands/doctor.ts')).doctorCommand,
  serve: async () => (await import('./commands/serve.ts')).serveCommand,
  trace: async () => (await import('./commands/trace.ts')).traceCommand({ names: commandNames, load: loadCommand }),
  completion: async () => (await import('./commands/completion.ts')).completionCommand(loadCommands),
}

/** What {@link loadCommand} knows. */
export const commandNames: readonly string[] = Object.keys(loaders)

/** One command; undefined if there is none of that name. */
export async function loadCommand(name: string): Promise<CommandDefinition | undefined> {
  return Object.hasOwn(loaders, name) ? loaders[name]!() : undefined
}

/** All of them: for help, completions and the reference. */
export function loadCommands(): Promise<CommandDefinition[]> {
  return Promise.all(Object.values(loaders).map((load) => load()))
}
