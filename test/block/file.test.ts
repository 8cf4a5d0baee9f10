import { execFileSync } from 'node:child_process'
import { once } from 'node:events'
import fs, { closeSync, constants, existsSync, openSync, readFileSync, rmSync, statSync, truncateSync, writeFileSync } from 'node:fs'
import { access, open } from 'node:fs/promises'
import { syncBuiltinESMExports } from 'node:module'
import { createServer } from 'node:net'
import { join } from 'node:path'
import fc from 'fast-check'
import { describe, expect, test, vi } from 'vitest'
import { allocateAligned, IoError, openFile, pad, UnsupportedError, type FileOptions } from '../../src/block.ts'
import { isInMemory } from '../../src/block/file-system.ts'
import { pattern } from '../suites/block-device.ts'
import { expectBytes } from '../support/bytes.ts'
import { systemFlags } from '../support/descriptors.ts'
import { tempFolder } from '../support/temp.ts'

describe('opening', () => {
  test('a missing file', async () => {
    await expect(openFile(join(tempFolder(), 'none'))).rejects.toMatchObject({ code: 'ERR_NOT_FOUND' })
  })

  test("create: 'wx' makes a new file and refuses an existing one", async () => {
    const path = join(tempFolder(), 'new')
    await using device = await openFile(path, { create: 'wx' })
    await device.write(0, pattern(1000))
    await expect(openFile(path, { create: 'wx' })).rejects.toMatchObject({ code: 'ERR_EXISTS' })
    expect(device.path).toBe(path)
    expect(readFileSync(path)).toEqual(Buffer.from(pattern(1000)))
  })

  test("create: 'w' empties an existing file", async () => {
    const path = join(tempFolder(), 'old')
    writeFileSync(path, 'old')
    await using device = await openFile(path, { create: 'w' })
    expect(device.size).toBe(0)
  })

  test('neither a file nor a device', async () => {
    await expect(openFile(tempFolder(), { readOnly: true })).rejects.toMatchObject({ code: 'ERR_UNSUPPORTED' })
    await expect(openFile('/dev/null', { readOnly: true })).rejects.toMatchObject({ code: 'ERR_UNSUPPORTED' })
  })

  test('a pipe is refused at once, for reading and for writing, and leaves the thread pool free', async () => {
    const path = join(tempFolder(), 'pipe')
    execFileSync('mkfifo', [path])
    const ways: FileOptions[] = [{ readOnly: true }, {}, { create: 'w' }, { direct: true }]
    const opening = ways.flatMap((way) => [openFile(path, way), openFile(path, way)])
    for (const each of await Promise.allSettled(opening)) {
      expect(each).toMatchObject({ status: 'rejected', reason: { code: 'ERR_UNSUPPORTED', message: expect.stringContaining('a pipe (FIFO)') as string } })
    }
    await access(path)
  })

  test('sockets, folders and character devices are refused by what they are', async () => {
    const folder = tempFolder()
    const path = join(folder, 'socket')
    const server = createServer().listen(path)
    await once(server, 'listening')
    for (const [name, kind] of [[path, 'a socket'], [folder, 'a directory'], ['/dev/zero', 'a character device']] as const) {
      for (const readOnly of [true, false]) {
        await expect(openFile(name, { readOnly })).rejects.toMatchObject({ code: 'ERR_UNSUPPORTED', message: expect.stringContaining(kind) as string })
      }
    }
    server.close()
  })

  test('an abort ends an open that the system does not answer, and what it opens later is closed', async () => {
    const path = join(tempFolder(), 'slow')
    writeFileSync(path, 'x')
    const controller = new AbortController()
    const system = fs.open
    let answer: (() => void) | undefined
    fs.open = ((...args: Parameters<typeof fs.open>) => (answer = () => system(...args))) as unknown as typeof fs.open
    syncBuiltinESMExports()
    try {
      const opening = openFile(path, { readOnly: true, signal: controller.signal })
      controller.abort()
      await expect(opening).rejects.toMatchObject({ name: 'AbortError' })
    } finally {
      fs.open = system
      syncBuiltinESMExports()
    }
    answer!()
    await vi.waitFor(() => expect(systemFlags(path)).toEqual([]))
  })

  test('options that contradict each other', async () => {
    const path = join(tempFolder(), 'x')
    await expect(openFile(path, { create: 'w', readOnly: true })).rejects.toThrow(TypeError)
    await using handle = await open(path, 'w')
    await expect(openFile(handle, { direct: true })).rejects.toThrow(TypeError)
  })

  test('a filesystem without direct I/O is a typed error', async () => {
    // files of /proc never take O_DIRECT
    const opening = openFile('/proc/self/status', { readOnly: true, direct: true })
    await expect(opening).rejects.toBeInstanceOf(UnsupportedError)
    await expect(opening).rejects.toMatchObject({ features: ['O_DIRECT'] })
  })
})

describe('direct I/O', () => {
  test('really passes O_DIRECT to the system', async () => {
    const path = join(tempFolder(), 'direct')
    writeFileSync(path, pattern(65_536))
    await using device = await openFile(path, { direct: true })
    const [flags] = systemFlags(path)
    expect(flags! & constants.O_DIRECT).toBe(constants.O_DIRECT)
    expect(device.limits.requestAlignment).toBeGreaterThanOrEqual(512)
    expect(device.limits.memoryAlignment).toBeGreaterThanOrEqual(1)
  })

  test('a file too short to try out gets page alignment', async () => {
    await using device = await openFile(join(tempFolder(), 'empty'), { direct: true, create: 'wx' })
    expect(device.limits).toMatchObject({ requestAlignment: 4096, memoryAlignment: 4096 })
  })

  test('reads the last, partial sector', async () => {
    const path = join(tempFolder(), 'odd')
    const content = pattern(10_000)
    writeFileSync(path, content)
    await using device = await openFile(path, { direct: true, readOnly: true })
    const whole = allocateAligned(10_000)
    await device.readInto(0, whole)
    expectBytes(whole, content)
    const tail = allocateAligned(10_000 - 8192)
    await device.readInto(8192, tail)
    expectBytes(tail, content.subarray(8192))
  })

  test('padded, a file keeps its exact size', async () => {
    const path = join(tempFolder(), 'padded')
    await fc.assert(
      fc.asyncProperty(
        fc.array(fc.record({ offset: fc.nat(20_000), length: fc.nat(9000) }), { maxLength: 6 }),
        fc.boolean(),
        async (writes, concurrent) => {
          const model = new Uint8Array(32_768)
          let end = 0
          const device = pad(await openFile(path, { direct: true, create: 'w' }))
          const running: Promise<void>[] = []
          for (const [index, { offset, length }] of writes.entries()) {
            const at = concurrent ? index * 4999 : offset
            const bytes = pattern(concurrent ? Math.min(length, 4999) : length, index)
            if (bytes.length === 0) continue
            model.set(bytes, at)
            end = Math.max(end, at + bytes.length)
            running.push(device.write(at, bytes))
            if (!concurrent) await running.at(-1)
          }
          await Promise.all(running)
          expect(device.size).toBe(end)
          expectBytes(await device.read(0, end), model.subarray(0, end))
          await device.close()
          expect(statSync(path).size).toBe(end)
          expectBytes(readFileSync(path), model.subarray(0, end))
        },
      ),
      { numRuns: 60 },
    )
  })
})

describe('failures', () => {
  test('a full filesystem is ERR_NO_SPACE', async () => {
    if (!existsSync('/dev/full')) return
    // /dev/full is no file, so the error is provoked through a handle whose type was a file's
    const { fileError } = await import('../../src/block/file-error.ts')
    const full = await open('/dev/full', 'w')
    const cause = await full.write('x').then(
      () => undefined,
      (error: unknown) => error,
    )
    await full.close()
    const error = fileError('write', cause, { offset: 4096, length: 1, name: 'disk.qcow2' })
    expect(error).toBeInstanceOf(IoError)
    expect(error).toMatchObject({ code: 'ERR_NO_SPACE', operation: 'write', offset: 4096, length: 1, cause })
    expect(error.message).toBe('disk.qcow2: write of 1 byte at offset 4096 failed: ENOSPC: no space left on device')
  })

  test.each([0, 1 << 20])('a file truncated under the device (syncLimit %i)', async (syncLimit) => {
    const path = join(tempFolder(), 'cut')
    writeFileSync(path, pattern(8192))
    await using device = await openFile(path, { syncLimit })
    truncateSync(path, 5000)
    await expect(device.read(0, 8192)).rejects.toMatchObject({ code: 'ERR_IO', operation: 'read', offset: 0, length: 8192 })
    expectBytes(await device.read(0, 5000), pattern(8192).subarray(0, 5000))
  })

  test.each([0, 1 << 20])('a descriptor that does not write (syncLimit %i)', async (syncLimit) => {
    const path = join(tempFolder(), 'ro')
    writeFileSync(path, pattern(8192))
    await using device = await openFile(await open(path, 'r'), { syncLimit })
    await expect(device.write(0, pattern(10))).rejects.toMatchObject({ code: 'ERR_IO', operation: 'write' })
    await expect(device.resize(0)).rejects.toMatchObject({ code: 'ERR_IO', operation: 'resize' })
  })
})

test('zeroes past the end take no space', async () => {
  const path = join(tempFolder(), 'sparse')
  await using device = await openFile(path, { create: 'wx' })
  await device.write(0, pattern(4096))
  await device.writeZeroes(2048, 64 << 20)
  expect(device.size).toBe(2048 + (64 << 20))
  expect(statSync(path).blocks * 512).toBeLessThan(1 << 20)
  expectBytes(await device.read(2048, 4096), new Uint8Array(4096))
})

test('a synchronous limit does not change what is stored', async () => {
  const path = join(tempFolder(), 'sync')
  await using device = await openFile(path, { create: 'wx', syncLimit: 4096 })
  await device.write(0, pattern(4096))
  await device.write(4096, pattern(100_000, 2))
  expectBytes(await device.read(0, 4096), pattern(4096))
  expectBytes(await device.read(4096, 100_000), pattern(100_000, 2))
})

describe('closing', () => {
  test('waits for whole operations, so that no piece of one reaches the next file of that number', async () => {
    const [path, other] = [join(tempFolder(), 'zeroed'), join(tempFolder(), 'other')]
    const bytes = pattern(4 << 20)
    for (let pause = 0; pause < 4; pause++) {
      writeFileSync(path, bytes)
      writeFileSync(other, bytes)
      const device = await openFile(path)
      const zeroing = device.writeZeroes(0, bytes.length)
      for (let turn = 0; turn < pause; turn++) await new Promise((resolve) => setImmediate(resolve))
      await device.close()
      const next = openSync(other, 'r+') // takes the number that became free
      const outcome = await Promise.allSettled([zeroing])
      closeSync(next)
      expect(outcome).toMatchObject([{ status: 'fulfilled' }])
      expectBytes(readFileSync(other), bytes)
      expectBytes(readFileSync(path), new Uint8Array(bytes.length))
    }
  })
})

describe('a flush that failed', () => {
  /** `fdatasync` as it fails once for a lost write-back and then knows nothing of it. */
  async function failOnce(run: () => Promise<void>): Promise<void> {
    const real = fs.fdatasync
    let failing = true
    fs.fdatasync = ((fd: number, done: (error: Error | null) => void) => {
      if (!failing) {
        real(fd, done)
        return
      }
      failing = false
      done(Object.assign(new Error('EIO: i/o error, fdatasync'), { code: 'EIO' }))
    }) as typeof fs.fdatasync
    syncBuiltinESMExports()
    try {
      await run()
    } finally {
      fs.fdatasync = real
      syncBuiltinESMExports()
    }
  }

  test('fails every later one of a buffered file', async () => {
    await using device = await openFile(join(tempFolder(), 'buffered'), { create: 'wx' })
    await device.write(0, pattern(4096))
    await failOnce(async () => {
      await expect(device.flush()).rejects.toMatchObject({ code: 'ERR_IO', operation: 'flush' })
      await expect(device.flush()).rejects.toMatchObject({ code: 'ERR_IO', operation: 'flush' })
      await expect(device.write(0, pattern(4096), { fua: true })).rejects.toMatchObject({ code: 'ERR_IO', operation: 'flush' })
    })
  })

  test('may be tried again where nothing is cached: direct I/O', async () => {
    await using device = await openFile(join(tempFolder(), 'direct'), { create: 'wx', direct: true })
    await failOnce(async () => {
      await expect(device.flush()).rejects.toMatchObject({ code: 'ERR_IO' })
      await device.flush()
    })
  })
})

test('synchronous requests one after another let the event loop turn', async () => {
  const path = join(tempFolder(), 'busy')
  writeFileSync(path, new Uint8Array(1 << 20))
  await using device = await openFile(path, { readOnly: true, syncLimit: 1 << 20 })
  expect(device.limits.optimalTransfer).toBe(1 << 20)
  const target = new Uint8Array(1 << 20)
  const loop = { turned: false }
  setImmediate(() => (loop.turned = true))
  let reads = 0
  while (!loop.turned && reads < 1000) {
    await device.readInto(0, target)
    reads++
  }
  expect(reads).toBeGreaterThan(1)
  expect(reads, '32 MiB at most').toBeLessThanOrEqual(33)
})

test('synchronous direct requests carry the same bytes, also a last sector cut short', async () => {
  const path = join(tempFolder(), 'direct')
  const content = pattern(3 * 4096 + 100, 5)
  writeFileSync(path, content)
  await using device = pad(await openFile(path, { direct: true, syncLimit: 4096 }))
  expectBytes(await device.read(0, content.length), content)
  expectBytes(await device.read(4096, 4096), content.subarray(4096, 8192))
  await device.write(4096, pattern(4096, 6))
  await device.write(8192 + 10, pattern(50, 7))
  expectBytes(await device.read(4096, 4096), pattern(4096, 6))
  expectBytes(await device.read(8192 + 10, 50), pattern(50, 7))
})

describe.runIf(isInMemory('/dev/shm'))('on a file system in memory', () => {
  const open = async (options: FileOptions): Promise<number> => {
    const path = `/dev/shm/qcow2-test-${process.pid}-${performance.now()}`
    try {
      await using file = await openFile(path, { ...options, create: 'wx' })
      return file.limits.optimalTransfer
    } finally {
      rmSync(path)
    }
  }

  test('requests of up to 512 KiB are synchronous, unless something else is asked for', async () => {
    expect(await open({})).toBe(512 << 10)
    expect(await open({ syncLimit: 4096 })).toBe(4096)
    expect(await open({ syncLimit: 0 })).toBe(1 << 20)
  })
})

/** A disk of this machine that may be read. */
const disk = ['vda', 'sda', 'nvme0n1', 'loop0'].map((name) => `/dev/${name}`).find((path) => {
  try {
    closeSync(openSync(path, 'r'))
    return true
  } catch {
    return false
  }
})

test.runIf(disk !== undefined)('a host block device is waited for, although its name is in memory', async () => {
  await using device = await openFile(disk!, { readOnly: true })
  expect(device.limits.optimalTransfer).toBe(1 << 20)
})

test('what is on a disk, or nowhere, is not in memory', () => {
  expect(isInMemory('/proc/self')).toBe(false)
  expect(isInMemory(join(tempFolder(), 'missing'))).toBe(false)
})
