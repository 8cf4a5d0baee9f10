/** Other programs as judges: suites that run where they are installed. */
import { execFileSync } from 'node:child_process'
import { describe, expect, test } from 'vitest'

/** What a program prints; without what it writes to stderr. */
export function outputOf(tool: string, ...args: string[]): string {
  return execFileSync(tool, args, { encoding: 'utf8', stdio: ['ignore', 'pipe', 'ignore'], timeout: 60_000 })
}

function isInstalled(tool: string): boolean {
  try {
    outputOf(tool, '--version')
    return true
  } catch {
    return false
  }
}

/** Registers the suite if all programs are installed. Without them it says so loudly, and fails in CI. */
export function describeWithTools(name: string, tools: readonly string[], suite: () => void): void {
  const missing = tools.filter((tool) => !isInstalled(tool)).join(' and ')
  if (missing === '') {
    describe(name, suite)
    return
  }
  describe(name, () => {
    if (process.env['CI'] === undefined) {
      console.warn(`\n*** ${missing} MISSING: "${name}" was not run. Run .ci/install-qemu (Debian) to test against it. ***\n`)
      test.skip(`needs ${missing}`, () => undefined)
    } else {
      test(`needs ${missing}`, () => expect.fail(`${missing} missing in CI: run .ci/install-qemu first`))
    }
  })
}
