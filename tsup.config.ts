import { rmSync } from 'node:fs'
import { writeFile } from 'node:fs/promises'
import { defineConfig, type Options } from 'tsup'
import { browserBuild } from './browser-build.ts'

const doors = ['src/index.ts', 'src/block.ts', 'src/migration.ts', 'src/nbd.ts', 'src/snapshot.ts', 'src/testing.ts']

// both builds write to the same folder, so neither may clear it
rmSync('dist', { recursive: true, force: true })

const shared: Options = {
  target: 'node20',
  platform: 'node',
  splitting: true,
  // errors have codes and say where they are from; maps would be two thirds of the package
  sourcemap: false,
  clean: false,
  shims: true,
  // fzstd is the only library that ships: bundled, with its licence in THIRD_PARTY_NOTICES.md
  noExternal: ['fzstd'],
  dts: {
    entry: doors,
    compilerOptions: { ignoreDeprecations: '6.0' },
    // users without @types/node need the Disposable types; tsup drops reference comments from sources
    banner: '/// <reference lib="esnext.disposable" />',
  },
}

export default defineConfig([
  {
    ...shared,
    format: 'esm',
    entry: doors,
    // the program under the name one would guess
    onSuccess: () => writeFile('dist/cli.js', "#!/usr/bin/env node\nimport './cli.cjs'\n", { mode: 0o755 }),
  },
  // the program is CommonJS, which Node starts 10 ms sooner than modules. Without `treeshake`, which hands the output to
  // rollup, it would be lowered to helper functions for `??` and `?.`: a check then takes 1.4 times as long
  { ...shared, format: 'cjs', entry: [...doors, 'src/cli.ts'], treeshake: true },
  { ...browserBuild, dts: { ...(shared.dts as object), entry: ['src/browser.ts'] } },
])
