/** `npm run fuzz -- [target] [--seconds N] [--seed S]`: the fuzz for as long as wanted, with its counts. A run that hangs ends the process, and says what it was. */
import { parseArgs } from 'node:util'
import { Worker } from 'node:worker_threads'
import { fuzz } from './fuzz.ts'
import { targets } from './targets.ts'

const { values, positionals } = parseArgs({ allowPositionals: true, options: { seconds: { type: 'string', default: '60' }, seed: { type: 'string' } } })
const chosen = positionals.length === 0 ? targets : targets.filter(({ name }) => positionals.includes(name))
if (chosen.length === 0) throw new Error(`no such target; there are ${targets.map(({ name }) => `'${name}'`).join(', ')}`)
const seed = values.seed === undefined ? Date.now() % 2 ** 31 : Number(values.seed)
const each = (Number(values.seconds) * 1000) / chosen.length

// an operation that never lets the event loop turn is seen from another thread only
const hangAfter = 60_000
const watch = new Worker(
  `const { parentPort } = require('node:worker_threads')
  let at = performance.now(), what = ''
  parentPort.on('message', (message) => { at = performance.now(); what = message })
  setInterval(() => { if (performance.now() - at > ${hangAfter}) { require('node:fs').writeSync(2, 'hangs: ' + what + '\\n'); process.kill(process.pid, 'SIGKILL') } }, 1000)`,
  { eval: true },
)
watch.unref()

let violations = 0
console.log(`seed ${seed}, ${values.seconds} s for ${chosen.length} targets`)
for (const target of chosen) {
  const end = performance.now() + each
  const counts = await fuzz(target, {
    seed,
    done: () => performance.now() >= end,
    running: (run, operation) => watch.postMessage(`${target.name}, seed ${run}, ${operation}`),
    found: ({ seed: run, operation, error }) => {
      violations++
      console.log(`VIOLATION ${target.name}, seed ${run}, ${operation}: ${error instanceof Error ? error.stack : String(error)}`)
    },
  })
  console.log(`${target.name}: ${counts.runs} variants; operations: ${counts.result} with a result, ${counts.refused} refused, ${counts.aborted} aborted`)
}
console.log(`${violations} violations`)
process.exitCode = violations === 0 ? 0 : 1
