/** Writes docs/cli.md anew: `npx tsx src/cli/write-reference.ts`. */
import { writeFileSync } from 'node:fs'
import { loadCommands } from './commands.ts'
import { reference } from './reference.ts'

writeFileSync('docs/cli.md', reference(await loadCommands()))
