/** Charts: bars in proportion from zero, strokes where the requests were, nothing that breaks the XML. */
import fc from 'fast-check'
import { expect, test } from 'vitest'
import { barChart, depthChart, niceSteps, traceChart } from '../../bench/chart.ts'

const numbers = (svg: string, pattern: RegExp): number[] => [...svg.matchAll(pattern)].map((match) => Number(match[1]))

/** Every tag closed, none open at the end: enough of XML for what we write. */
function expectWellFormed(svg: string): void {
  const open: string[] = []
  for (const [, closing, name, selfClosing] of svg.matchAll(/<(\/?)([a-zA-Z]+)[^>]*?(\/?)>/g)) {
    if (selfClosing === '/') continue
    if (closing === '/') expect(open.pop()).toBe(name)
    else open.push(name!)
  }
  expect(open).toEqual([])
}

test('bars start at zero and keep their proportions', () => {
  const svg = barChart({
    title: 'a < b & "c"',
    axis: 'seconds',
    bars: [
      { label: 'one', value: 10, text: '10 s', tone: 'old', runs: [9, 11] },
      { label: 'two', value: 5, text: '5 s', tone: 'new' },
    ],
  })
  expectWellFormed(svg)
  const [first, second] = numbers(svg, /<rect class="\w+" x="0" y="[\d.]+" width="([\d.]+)"/g)
  expect(first! / second!).toBeCloseTo(2, 2)
  expect(svg).toContain('a &lt; b &amp; &quot;c&quot;')
  expect(svg).toContain('prefers-color-scheme:dark')
})

test('a request is a stroke from its first byte to its last', () => {
  const svg = traceChart({
    name: 't', title: 't', span: 10, reach: 1000,
    panels: [{ label: 'p', tone: 'new', ticks: [
      { operation: 'write', offset: 0, length: 500, start: 0, end: 5 },
      { operation: 'write', offset: 500, length: 500, start: 5, end: 10 },
      { operation: 'read', offset: 100, length: 512, start: 1, end: 1 },
    ] }],
  })
  expectWellFormed(svg)
  const strokes = [...svg.matchAll(/<line class="stroke new[^"]*" x1="([\d.]+)" y1="([\d.]+)" x2="([\d.]+)" y2="([\d.]+)"/g)].map((match) => match.slice(1).map(Number))
  expect(strokes).toHaveLength(2)
  expect(strokes[0]!.slice(2)).toEqual(strokes[1]!.slice(0, 2))
  expect(svg.match(/<circle class="read"/g)).toHaveLength(2)
})

test('depth is drawn as steps', () => {
  const svg = depthChart({ title: 'd', span: 10, panels: [{ label: 'p', tone: 'old', steps: [[0, 1], [4, 2], [8, 0]] }] })
  expectWellFormed(svg)
  expect(svg).toMatch(/<path class="area old" d="M[\d.]+ [\d.]+(H[\d.]+V[\d.]+){4}Z"/)
})

test('scale marks are round, ascending and within the axis', () => {
  fc.assert(
    fc.property(fc.double({ min: 1e-6, max: 1e12, noNaN: true }), fc.integer({ min: 1, max: 8 }), (end, count) => {
      const steps = niceSteps(end, count)
      expect(steps[0]).toBe(0)
      expect(steps.length).toBeLessThanOrEqual(count + 2)
      expect(steps.at(-1)).toBeLessThanOrEqual(end * 1.001)
    }),
  )
})
