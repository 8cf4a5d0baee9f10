import { defineConfig } from 'vitest/config'

const long = process.env['QCOW2_LONG'] === '1'

export default defineConfig({
  test: {
    include: ['test/**/*.test.ts'],
    setupFiles: ['test/support/seed.ts'],
    pool: 'forks',
    maxWorkers: 2,
    testTimeout: long ? 1_800_000 : 60_000,
    hookTimeout: 60_000,
    coverage: { include: ['src/**'] },
  },
})
