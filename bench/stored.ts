/** Results that were kept, as `npm run bench` writes them: one JSON file a scenario. */
import { readdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import type { Report } from './scenario.ts'

/** All of a folder, by name. */
export function storedResults(folder: string): Report[] {
  const files = readdirSync(folder).filter((name) => name.endsWith('.json')).sort()
  return files.map((name) => JSON.parse(readFileSync(join(folder, name), 'utf8')) as Report)
}
