/** JSON that would build much more than it has bytes is refused before it is built. */
import { expect, test } from 'vitest'
import { parseJson } from '../../src/core/json.ts'
import { parseVmDescription } from '../../src/migration/vm-description.ts'
import { withinBounds } from './cost.ts'

test.each(['{"a": "[[,{\\"", "b": [1, 2, {"c": null}]}', '"[\\\\"', '[]', '7'])('%s is read as ever', (text) => {
  expect(parseJson(text)).toEqual(JSON.parse(text))
})

test('strings that do not end, and what is no JSON', () => {
  for (const text of ['"', '"\\', '[', ']', '{"a"}', '']) expect(() => parseJson(text)).toThrow(SyntaxError)
})

test.each([['levels', '['.repeat(5_000_000)], ['lists', `[${'[],'.repeat(5_000_000)}0]`]])('5 million %s in a VM description', async (_what, text) => {
  const json = Buffer.from(`{"devices":${text}`)
  expect(await withinBounds(() => Promise.resolve().then(() => parseVmDescription(json)))).toBe('refused')
  expect(() => parseVmDescription(json)).toThrow(/more than \d+ (levels|values)/)
})
