/** Direct I/O where it can be had: what is tried, and which failures count as "not here". */
import { expect, test } from 'vitest'
import { openFile } from '../../src/block/file.ts'
import { preferDirect } from '../../src/block/prefer-direct.ts'
import { Qcow2Error, UnsupportedError } from '../../src/core/errors.ts'

async function tried(wanted: boolean | undefined, refusal?: Error): Promise<{ tries: boolean[]; outcome: unknown }> {
  const tries: boolean[] = []
  const outcome = await preferDirect(wanted, (direct) => {
    tries.push(direct)
    return direct && refusal !== undefined ? Promise.reject(refusal) : Promise.resolve('open')
  }).catch((error: unknown) => error)
  return { tries, outcome }
}

const refusal = new UnsupportedError('the filesystem refuses', ['O_DIRECT'])

test('what is asked for is done, or fails', async () => {
  expect(await tried(true)).toEqual({ tries: [true], outcome: 'open' })
  expect(await tried(false)).toEqual({ tries: [false], outcome: 'open' })
  expect(await tried(true, refusal)).toEqual({ tries: [true], outcome: refusal })
})

test('where nothing is said, the page cache serves file systems that have no direct I/O', async () => {
  expect(await tried(undefined)).toEqual({ tries: [true], outcome: 'open' })
  expect(await tried(undefined, refusal)).toEqual({ tries: [true, false], outcome: 'open' })
})

test('a failure of another kind is not hidden', async () => {
  for (const error of [new Qcow2Error('ERR_NOT_FOUND', 'no such file'), new UnsupportedError('a pipe')]) {
    expect(await tried(undefined, error)).toEqual({ tries: [true], outcome: error })
  }
})

test('a file of a file system that refuses direct I/O is opened nevertheless', async () => {
  await using file = await preferDirect(undefined, (direct) => openFile('/proc/self/status', { readOnly: true, direct }))
  expect(file.limits.requestAlignment).toBe(1)
})
