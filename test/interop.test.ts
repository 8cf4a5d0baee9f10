/**
 * Interop suites are left out where the program they talk to is not installed. This file says which
 * are missing; CI, which installs all of them, fails instead.
 */
import { existsSync } from 'node:fs'
import { expect, test } from 'vitest'
import { qemus } from './support/qemu.ts'

const programs: Record<string, boolean> = {
  'QEMU before 10': qemus.some(({ major }) => major < 10),
  'QEMU 10 or newer': qemus.some(({ major }) => major >= 10),
  nbdinfo: existsSync('/usr/bin/nbdinfo'),
  nbdkit: existsSync('/usr/bin/nbdkit'),
  Chromium: existsSync('/usr/bin/chromium'),
}

test('every program that interop tests talk to is here, or said to be missing', () => {
  const missing = Object.keys(programs).filter((name) => !programs[name])
  if (process.env['CI'] !== undefined) expect(missing, 'run .ci/install-qemu first').toEqual([])
  if (missing.length > 0) console.warn(`\n*** NOT INSTALLED: ${missing.join(', ')}. Their interop tests were not run; .ci/install-qemu (Debian) installs them. ***\n`)
})
