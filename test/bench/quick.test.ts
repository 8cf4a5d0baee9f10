/** Every scenario runs in quick mode and its report is complete. Function only: no figure is judged here but virtual time. */
import { readdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { describe, expect, test } from 'vitest'
import { loadScenarios, runScenario, store } from '../../bench/run.ts'
import { textReport } from '../../bench/report.ts'
import { tempFolder } from '../support/temp.ts'

const scenarios = await loadScenarios()

describe.each(scenarios)('$name', (scenario) => {
  test('runs in quick mode; table, JSON, drawings and page are complete', { timeout: 180_000 }, async () => {
    const folder = tempFolder()
    const out = tempFolder()
    const report = await runScenario(scenario, { quick: true, rounds: 1, seed: 1, folder })
    expect(readdirSync(folder), 'the scenario removes what it makes').toEqual([])
    store(out, [report])
    const stored = JSON.parse(readFileSync(join(out, `${scenario.name}.json`), 'utf8')) as typeof report
    expect(stored.machine.versions['node']).toBe(process.versions.node)
    for (const group of stored.groups) {
      for (const variant of group.variants) {
        expect(variant.runs).toHaveLength(1)
        expect(variant.runs[0]!.seconds).toBeGreaterThan(0)
      }
      for (const ratio of group.ratios) expect(ratio.perRound).toHaveLength(1)
    }
    const text = textReport(report)
    const page = readFileSync(join(out, 'report.html'), 'utf8')
    for (const group of report.groups) for (const variant of group.variants) expect(text).toContain(variant.title)
    for (const figure of report.figures) {
      expect(readFileSync(join(out, `${figure.name}.svg`), 'utf8')).toContain('<svg xmlns="http://www.w3.org/2000/svg"')
      expect(page).toContain(figure.svg.trim())
    }
    expect(page.replaceAll('http://www.w3.org/2000/svg', ''), 'the page needs nothing from elsewhere').not.toMatch(/https?:|src=|@import|url\((?!#)/)
  })
})
