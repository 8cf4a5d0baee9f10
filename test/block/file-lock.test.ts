import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { writeFileSync } from 'node:fs'
import { open } from 'node:fs/promises'
import { join } from 'node:path'
import { expect, test } from 'vitest'
import { checkImageLocks, openSource, readImageLocks } from '../../src/block.ts'
import { parseLocks } from '../../src/block/file-lock.ts'
import { describeWithQemu } from '../support/qemu.ts'
import { tempFolder } from '../support/temp.ts'

test('reads the lines of /proc/locks', () => {
  const list = [
    '1: OFDLCK ADVISORY  READ -1 fe:00:1234 100 101',
    '2: OFDLCK ADVISORY  READ -1 fe:00:1234 203 203',
    '2: -> OFDLCK ADVISORY  READ -1 fe:00:1234 102 102',
    '3: OFDLCK ADVISORY  READ -1 fe:00:9999 103 103',
    '4: OFDLCK ADVISORY  READ -1 fd:00:1234 103 103',
    '5: FLOCK  ADVISORY  WRITE 1012 fe:00:1234 0 EOF',
    'nonsense',
  ].join('\n')
  const { held, unshared } = parseLocks(list, 0xfe00n, 1234n)
  expect([...held]).toEqual(['consistent read', 'write'])
  expect([...unshared]).toEqual(['resize'])
  expect(parseLocks('7: POSIX  ADVISORY  WRITE 77 fe:00:5 0 EOF\n', 0xfe00n, 5n).held.size).toBe(4)
  // device numbers above 8 bits, as `stat` packs them
  expect(parseLocks('8: OFDLCK ADVISORY READ -1 103:1234:5 101 101', (0x103n << 8n) | 0x34n | (0x1200n << 12n), 5n).held.size).toBe(1)
})

test('a file that nobody holds', async () => {
  const path = join(tempFolder(), 'disk')
  writeFileSync(path, new Uint8Array(512))
  const { held, unshared } = await readImageLocks(path)
  expect(held.size + unshared.size).toBe(0)
  await checkImageLocks(path, 'write')
  await using handle = await open(path)
  await checkImageLocks(handle, 'write')
})

describeWithQemu('an image in use', (qemu) => {
  /** Runs `body` while a real QEMU has the image open. */
  async function whileOpen(path: string, readOnly: boolean, body: () => Promise<void>): Promise<void> {
    const holder = spawn(qemu.path('qemu-io'), [...(readOnly ? ['-r'] : []), '-f', 'qcow2', path], { stdio: ['pipe', 'pipe', 'inherit'] })
    try {
      holder.stdin.write('length\n')
      await once(holder.stdout, 'data')
      await body()
    } finally {
      holder.stdin.end('quit\n')
      if (holder.exitCode === null) await once(holder, 'exit')
    }
  }

  test('for writing is refused, for reading too unless forced', async () => {
    const path = join(tempFolder(), 'disk')
    await qemu.imgOk('create', '-f', 'qcow2', path, '1M')
    await whileOpen(path, false, async () => {
      expect((await readImageLocks(path)).held.has('write')).toBe(true)
      await expect(openSource(path)).rejects.toMatchObject({ code: 'ERR_BUSY' })
      await expect(openSource(path, { readOnly: true })).rejects.toThrow(/forceShare/)
      await (await openSource(path, { readOnly: true, forceShare: true })).close()
      await expect(openSource(path, { forceShare: true })).rejects.toMatchObject({ code: 'ERR_BUSY' })
      await using handle = await open(path)
      await expect(checkImageLocks(handle, 'read')).rejects.toMatchObject({ code: 'ERR_BUSY' })
    })
    await (await openSource(path)).close()
  })

  test('for reading is refused for writing only', async () => {
    const path = join(tempFolder(), 'disk')
    await qemu.imgOk('create', '-f', 'qcow2', path, '1M')
    await whileOpen(path, true, async () => {
      await (await openSource(path, { readOnly: true })).close()
      await expect(openSource(path)).rejects.toMatchObject({ code: 'ERR_BUSY' })
    })
  })
})
