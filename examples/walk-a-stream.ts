// Reads a migration stream as it comes in, page batches and all, without keeping it.
//   node walk-a-stream.js < STREAM
import { readMigration, ramFlag } from 'qcow2/migration'

let data = 0
let zero = 0
for await (const record of readMigration(process.stdin)) {
  if (record.kind === 'configuration') console.log('machine', record.machine)
  if (record.kind !== 'ram-pages') continue
  // one record holds many pages: flags, offsets and positions are typed arrays
  for (let n = 0; n < record.count; n++) {
    if ((record.flags[n]! & ramFlag.page) !== 0) data++
    else zero++
  }
}
console.log(`${data} pages with data, ${zero} others`)
