/** Writes docs/results.md anew from the stored results: `npx tsx bench/write-results.ts`. */
import { writeFileSync } from 'node:fs'
import { resultsPage } from './markdown.ts'
import { storedResults } from './stored.ts'

writeFileSync('docs/results.md', resultsPage(storedResults('docs/results')))
