/**
 * The layers of the library, enforced: imports go down, never up, sideways or in a circle, and
 * `node:` modules stay in the few files named here, so that a browser build stays one entry away.
 */
import { readdirSync, readFileSync } from 'node:fs'
import { dirname, join, relative, resolve } from 'node:path'
import ts from 'typescript'
import { expect, test } from 'vitest'

const source = resolve(import.meta.dirname, '../src')

/** Layer -> the layers it may import, besides itself. */
const layers: Record<string, readonly string[]> = {
  core: [],
  bytes: ['core'],
  codec: ['core', 'bytes'],
  block: ['core', 'bytes'],
  qmp: ['core', 'bytes'],
  luks: ['core', 'bytes', 'codec', 'block'],
  qcow2: ['core', 'bytes', 'codec', 'block'],
  migration: ['core', 'bytes', 'codec', 'block'],
  snapshot: ['core', 'bytes', 'block', 'qcow2', 'migration', 'qmp'],
  nbd: ['core', 'bytes', 'block'],
  testing: ['core', 'bytes', 'codec', 'block', 'qcow2', 'migration', 'qmp', 'snapshot'],
  cli: ['core', 'bytes', 'codec', 'block', 'luks', 'qcow2', 'migration', 'qmp', 'snapshot', 'nbd', 'testing'],
}

/** Files and folders that may import `node:` modules. */
const mayUseNode = [/^codec\//, /^block\/file[^/]*\.ts$/, /^block\/http\.ts$/, /^qmp\/socket\.ts$/, /^snapshot\/socket\.ts$/, /^snapshot\/host[^/]*\.ts$/, /^nbd\/socket\.ts$/, /^testing\/qemu-img\.ts$/, /^cli\//, /^cli\.ts$/]

interface Import {
  from: string
  to: string
}

const files = readdirSync(source, { recursive: true, encoding: 'utf8' })
  .filter((file) => file.endsWith('.ts'))
  .map((file) => file.replaceAll('\\', '/'))

const imports: Import[] = files.flatMap((from) => {
  const text = readFileSync(join(source, from), 'utf8')
  return ts.preProcessFile(text, true, true).importedFiles.map(({ fileName }) => ({
    from,
    to: fileName.startsWith('.') ? relative(source, resolve(source, dirname(from), fileName)).replaceAll('\\', '/') : fileName,
  }))
})

const layerOf = (file: string): string | undefined => (file.includes('/') ? file.slice(0, file.indexOf('/')) : undefined)
const isLocal = (entry: Import): boolean => entry.to.endsWith('.ts')

test('every file belongs to a known layer or is a door', () => {
  const unknown = files.filter((file) => layerOf(file) !== undefined && layers[layerOf(file) ?? ''] === undefined)
  expect(unknown).toEqual([])
})

test('imports go down the layers', () => {
  const wrong = imports.filter((entry) => {
    const from = layerOf(entry.from)
    if (!isLocal(entry) || from === undefined) return false
    const to = layerOf(entry.to)
    return to !== from && (to === undefined || !layers[from]?.includes(to))
  })
  expect(wrong).toEqual([])
})

test('every local import exists', () => {
  expect(imports.filter((entry) => isLocal(entry) && !files.includes(entry.to))).toEqual([])
})

test('no circle of imports', () => {
  const state = new Map<string, 'open' | 'done'>()
  const circles: string[] = []
  const visit = (file: string, path: readonly string[]): void => {
    if (state.get(file) === 'done') return
    if (state.get(file) === 'open') {
      circles.push([...path.slice(path.indexOf(file)), file].join(' -> '))
      return
    }
    state.set(file, 'open')
    for (const entry of imports) if (entry.from === file && isLocal(entry)) visit(entry.to, [...path, file])
    state.set(file, 'done')
  }
  for (const file of files) visit(file, [])
  expect(circles).toEqual([])
})

test('node: modules only where named', () => {
  const wrong = imports.filter((entry) => entry.to.startsWith('node:') && !mayUseNode.some((pattern) => pattern.test(entry.from)))
  expect(wrong).toEqual([])
})

test('no package is imported but the bundled one', () => {
  const packages = imports.filter((entry) => !isLocal(entry) && !entry.to.startsWith('node:') && !entry.to.startsWith('.'))
  expect(packages.filter((entry) => !(entry.to === 'fzstd' && entry.from.startsWith('codec/')) && !(entry.to === 'fast-check' && entry.from.startsWith('testing/')))).toEqual([])
})
