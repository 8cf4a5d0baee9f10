/**
 * The documentation keeps its word: every TypeScript example, in guides and docstrings, compiles against
 * the sources; complete programs in guides run; the cookbook shows the files in examples/; links lead
 * somewhere; every guide is in the table of contents.
 */
import { execFile } from 'node:child_process'
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { dirname, join, relative, resolve } from 'node:path'
import { promisify } from 'node:util'
import { gunzipSync } from 'node:zlib'
import ts from 'typescript'
import { afterAll, describe, expect, test } from 'vitest'

const project = resolve(import.meta.dirname, '..')
const doors = ['index', 'block', 'migration', 'nbd', 'snapshot', 'testing']

const filesUnder = (folder: string, extension: string): string[] =>
  readdirSync(join(project, folder), { recursive: true, encoding: 'utf8' })
    .filter((file) => file.endsWith(extension) && !file.startsWith('api'))
    .map((file) => join(folder, file))

const guides = ['README.md', 'CONTRIBUTING.md', ...filesUnder('docs', '.md')]

interface Snippet {
  /** File and line where it stands. */
  readonly where: string
  readonly code: string
}

/** The `ts` blocks of a text; in a docstring each line begins with an asterisk. */
function snippetsIn(file: string): Snippet[] {
  const text = readFileSync(join(project, file), 'utf8')
  const block = file.endsWith('.md') ? /^```ts\n(.*?)^```$/gms : /^[ ]*\* ```ts\n(.*?)^[ ]*\* ```$/gms
  return [...text.matchAll(block)].map((match) => ({
    where: `${file}:${text.slice(0, match.index).split('\n').length}`,
    code: file.endsWith('.md') ? match[1]! : match[1]!.replaceAll(/^[ ]*\* ?/gm, ''),
  }))
}

const inGuides = guides.flatMap(snippetsIn)
const inDocstrings = filesUnder('src', '.ts').flatMap(snippetsIn)
const isProgram = (snippet: Snippet): boolean => snippet.code.startsWith('import ') || /^\/\/.*\nimport /.test(snippet.code)

const options: ts.CompilerOptions = {
  target: ts.ScriptTarget.ES2022,
  lib: ['lib.es2022.d.ts', 'lib.esnext.disposable.d.ts'],
  module: ts.ModuleKind.NodeNext,
  moduleResolution: ts.ModuleResolutionKind.NodeNext,
  types: ['node'],
  strict: true,
  noEmit: true,
  skipLibCheck: true,
  allowImportingTsExtensions: true,
  paths: Object.fromEntries(doors.map((door) => [door === 'index' ? 'qcow2' : `qcow2/${door}`, [`./src/${door}.ts`]])),
}

/** What examples may take for granted. */
const world = `
declare global {
  const KiB: number, MiB: number, GiB: number
  const image: import('qcow2').Qcow2Image
  const device: import('qcow2/block').BlockDevice
  const bytes: Uint8Array
  const socket: import('node:net').Socket
  const source: AsyncIterable<Uint8Array>
  const stream: AsyncIterable<Uint8Array>
  const sink: { write(bytes: Uint8Array): unknown }
  const parser: import('qcow2/migration').MigrationParser
  const log: import('qcow2/block').TracedRequest[]
  const signal: AbortSignal
}
export {}
`

/** The sources are parsed once, for the names and for the examples. */
const host = ts.createCompilerHost(options)
const parsed = new Map<string, ts.SourceFile | undefined>()
const sources: ts.CompilerHost = {
  ...host,
  getSourceFile(file, ...rest) {
    if (!parsed.has(file)) parsed.set(file, host.getSourceFile(file, ...rest))
    return parsed.get(file)
  },
}

/** Names that the package exports, and from where. */
function exportedNames(): Map<string, string> {
  const program = ts.createProgram(doors.map((door) => join(project, `src/${door}.ts`)), options, sources)
  const checker = program.getTypeChecker()
  const names = new Map<string, string>()
  for (const door of doors) {
    const module = checker.getSymbolAtLocation(program.getSourceFile(join(project, `src/${door}.ts`))!)!
    for (const symbol of checker.getExportsOfModule(module)) if (!names.has(symbol.name)) names.set(symbol.name, door === 'index' ? 'qcow2' : `qcow2/${door}`)
  }
  return names
}

/** A module that holds the snippet: imports first, then its statements in an async function. */
function asModule(snippet: Snippet, names: Map<string, string>): string {
  const code = snippet.code.replaceAll('…', 'void 0')
  const imports = [...code.matchAll(/^import [^;]*? from '[^']+'$/gm)].map(([line]) => line)
  const body = code.replaceAll(/^import [^;]*? from '[^']+'$/gm, '')
  const missing = [...names].filter(([name]) => new RegExp(`\\b${name}\\b`).test(body) && !imports.some((line) => new RegExp(`\\b${name}\\b`).test(line)))
  const added = isProgram(snippet) ? [] : missing.map(([name, from]) => `import { ${name} } from '${from}'`)
  return [...added, ...imports, 'export async function example(): Promise<void> {', body, '}'].join('\n')
}

/** The reader's own file in docs/property-tests.md. */
const tool = 'export declare function toRaw(imagePath: string, rawPath: string): Promise<void>'

function compile(snippets: readonly Snippet[]): string[] {
  const names = exportedNames()
  const virtual = new Map([[join(project, 'world.ts'), world], [join(project, 'my-tool.ts'), tool], ...snippets.map((snippet, n) => [join(project, `snippet-${n}.ts`), asModule(snippet, names)] as const)])
  const withSnippets: ts.CompilerHost = {
    ...sources,
    fileExists: (file) => virtual.has(file) || host.fileExists(file),
    readFile: (file) => virtual.get(file) ?? host.readFile(file),
    getSourceFile(file, version, ...rest) {
      const text = virtual.get(file)
      return text === undefined ? sources.getSourceFile(file, version, ...rest) : ts.createSourceFile(file, text, version)
    },
    getCurrentDirectory: () => project,
  }
  const program = ts.createProgram([...virtual.keys()], options, withSnippets)
  return [...virtual.keys()].flatMap((file, n) => {
    const sourceFile = program.getSourceFile(file)!
    const problems = [...program.getSyntacticDiagnostics(sourceFile), ...program.getSemanticDiagnostics(sourceFile)]
    const where = snippets[n - 2]?.where ?? file
    return problems.map((problem) => `${where}: ${ts.flattenDiagnosticMessageText(problem.messageText, '\n')}`)
  })
}

test('every TypeScript example compiles', { timeout: 300_000 }, () => {
  const snippets = [...inGuides, ...inDocstrings]
  expect(inGuides.length).toBeGreaterThan(15)
  expect(inDocstrings.length).toBeGreaterThan(5)
  expect(compile(snippets)).toEqual([])
})

const work = mkdtempSync(join(tmpdir(), 'qcow2-docs-'))
afterAll(() => rmSync(work, { recursive: true }))

/** Pages whose programs have a test of their own: test/examples.test.ts, test/testing/docs.test.ts. */
const runElsewhere = /^docs\/(cookbook|property-tests)\.md/
/** A program that cannot run here says so in its first line: `// needs …`. */
const programs = inGuides.filter((snippet) => isProgram(snippet) && !runElsewhere.test(snippet.where) && !snippet.code.startsWith('// needs '))

describe('complete programs in guides run', { concurrent: true, timeout: 60_000 }, () => {
  for (const [n, { where, code }] of programs.entries()) {
    test(where, async () => {
      const folder = mkdtempSync(join(work, 'run-'))
      writeFileSync(join(folder, 'package.json'), '{ "type": "module" }')
      writeFileSync(join(folder, `program-${n}.ts`), code)
      writeFileSync(join(folder, 'vm.mig'), gunzipSync(readFileSync(join(project, 'test/fixtures/captures/qemu100-savevm.vmstate.gz'))))
      const args = ['--tsconfig', join(project, 'examples/tsconfig.json'), `program-${n}.ts`]
      await promisify(execFile)(join(project, 'node_modules/.bin/tsx'), args, { cwd: folder, timeout: 50_000 })
      expect(code).toContain('import')
    })
  }
})

test('the cookbook shows the examples as they are, all of them', () => {
  const page = readFileSync(join(project, 'docs/cookbook.md'), 'utf8')
  const shown = [...page.matchAll(/^<!-- (\S+\.ts) -->\n```ts\n(.*?)^```$/gms)]
  for (const [, name, code] of shown) expect(code, name).toBe(readFileSync(join(project, 'examples', name!), 'utf8'))
  expect(shown.map(([, name]) => name).sort()).toEqual(readdirSync(join(project, 'examples')).filter((file) => file.endsWith('.ts')).sort())
})

test('links between pages lead to a file, and headings they name exist', () => {
  const anchorsOf = (file: string): string[] =>
    [...readFileSync(file, 'utf8').matchAll(/^#+ (.*)$/gm)].map(([, heading]) => heading!.toLowerCase().replaceAll(/[^\p{L}\p{N} _-]/gu, '').replaceAll(' ', '-'))
  const broken = guides.flatMap((guide) =>
    [...readFileSync(join(project, guide), 'utf8').replaceAll(/^```.*?^```$/gms, '').matchAll(/\]\((?!https?:)([^)\s]*)\)/g)].flatMap(([, link]) => {
      const [path, anchor] = link!.split('#')
      const target = path === '' ? join(project, guide) : resolve(project, dirname(guide), path!)
      if (!existsSync(target)) return [`${guide}: ${link}`]
      return anchor === undefined || anchorsOf(target).includes(anchor) ? [] : [`${guide}: ${link}`]
    }),
  )
  expect(broken).toEqual([])
})

test('every guide is in the table of contents', () => {
  const contents = readFileSync(join(project, 'docs/README.md'), 'utf8')
  const missing = guides.filter((guide) => guide.startsWith('docs/') && guide !== 'docs/README.md' && !contents.includes(`(${relative('docs', guide)})`))
  expect(missing).toEqual([])
})
