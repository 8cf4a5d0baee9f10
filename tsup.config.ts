import { defineConfig } from 'tsup'

export default defineConfig({
  entry: ['src/index.ts', 'src/block.ts', 'src/migration.ts', 'src/nbd.ts', 'src/snapshot.ts'],
  format: ['esm', 'cjs'],
  target: 'node20',
  platform: 'node',
  splitting: true,
  sourcemap: true,
  clean: true,
  shims: true,
  // fzstd is the only library that ships: bundled, with its licence in THIRD_PARTY_NOTICES.md
  noExternal: ['fzstd'],
  dts: {
    compilerOptions: { ignoreDeprecations: '6.0' },
    // users without @types/node need the Disposable types; tsup drops reference comments from sources
    banner: '/// <reference lib="esnext.disposable" />',
  },
})
