/**
 * The browser build: what the reading core takes from Node is replaced. `node:zlib` by an inflate in
 * TypeScript; files, ciphers and threads by functions that say they need Node, called only for what a
 * browser cannot open anyway.
 */
import { resolve } from 'node:path'
import type { Options } from 'tsup'

type Plugin = NonNullable<Options['esbuildPlugins']>[number]

const needsNode = `
const needs = (name) => Object.assign(() => { throw new Error(name + ' needs Node') }, { needsNode: true })
const any = new Proxy({}, { get: (_, name) => (name === '__esModule' ? undefined : name === 'promisify' ? () => needs(name) : needs(String(name))) })
// as the prototype: the names an import asks for are looked up, never listed
module.exports = Object.create(any)
`

/** Replaces every `node:` module. */
export const withoutNode: Plugin = {
  name: 'without-node',
  setup(build) {
    build.onResolve({ filter: /^(node:|zlib$)/ }, ({ path }) =>
      path === 'node:zlib' ? { path: resolve(import.meta.dirname, 'src/codec/browser-zlib.ts') } : { path, namespace: 'needs-node' },
    )
    build.onLoad({ filter: /.*/, namespace: 'needs-node' }, () => ({ contents: needsNode, loader: 'js' }))
  },
}

/** Options of the browser build, for tsup. */
export const browserBuild: Options = {
  entry: ['src/browser.ts'],
  format: 'esm',
  target: 'es2022',
  platform: 'browser',
  splitting: false,
  minify: true,
  sourcemap: false,
  clean: false,
  noExternal: ['fzstd'],
  esbuildPlugins: [withoutNode],
  define: { 'process.version': '"none"', 'process.platform': '"browser"' },
  removeNodeProtocol: false,
}
