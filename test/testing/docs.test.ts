/** The examples of docs/property-tests.md run as they stand there. */
import { readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { pathToFileURL } from 'node:url'
import fc from 'fast-check'
import { afterEach, expect, test } from 'vitest'
import { tempFolder } from '../support/temp.ts'

const root = join(import.meta.dirname, '../..')
const examples = [...readFileSync(join(root, 'docs/property-tests.md'), 'utf8').matchAll(/```ts\n(.*?)```/gs)].map((match) => match[1]!)

/** A converter in the place of the reader's own tool. */
const myTool = `
import { Qcow2Image } from 'qcow2'
import { writeFile } from 'node:fs/promises'
export async function toRaw(path, raw) {
  const image = await Qcow2Image.open(path, { readOnly: true })
  await writeFile(raw, await image.read(0, image.size))
  await image.close()
}`

/** Names of packages as the files of this repository. */
function resolved(code: string): string {
  const door = (name: string): string => pathToFileURL(join(root, 'src', name)).href
  return code
    .replaceAll("from 'qcow2/testing'", `from '${door('testing.ts')}'`)
    .replaceAll("from 'qcow2'", `from '${door('index.ts')}'`)
    .replaceAll("from 'fast-check'", `from '${import.meta.resolve('fast-check')}'`)
    .replaceAll("from './my-tool.js'", "from './my-tool.ts'")
}

afterEach(() => fc.resetConfigureGlobal())

test('there are two examples, the first of twenty lines', () => {
  expect(examples.length).toBe(2)
  const lines = examples[0]!.split('\n').filter((line) => line.trim() !== '')
  expect(lines.length).toBeLessThanOrEqual(20)
})

test.each(examples.map((code, index) => ({ number: index + 1, code })))('example $number runs', async ({ code }) => {
  fc.configureGlobal({ numRuns: process.env['QCOW2_LONG'] === '1' ? 1000 : 25 })
  const folder = tempFolder()
  writeFileSync(join(folder, 'my-tool.ts'), resolved(myTool))
  writeFileSync(join(folder, 'example.ts'), resolved(code))
  await import(pathToFileURL(join(folder, 'example.ts')).href)
})

test('a tool that loses a byte is caught by the first example', async () => {
  const folder = tempFolder()
  const careless = myTool.replace('image.read(0, image.size)', 'image.read(0, image.size).then((bytes) => { if (bytes.length > 4096) bytes[4096] = 0; return bytes })')
  writeFileSync(join(folder, 'my-tool.ts'), resolved(careless))
  writeFileSync(join(folder, 'example.ts'), resolved(examples[0]!))
  await expect(import(pathToFileURL(join(folder, 'example.ts')).href)).rejects.toThrow(/Counterexample/)
})
