/** Where a server listens: sockets that died, live ones, files, long paths; and clients that only take up room. */
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { existsSync, lstatSync, readFileSync, symlinkSync, writeFileSync } from 'node:fs'
import { connect, type Socket } from 'node:net'
import { join } from 'node:path'
import { describe, expect, onTestFinished, test } from 'vitest'
import { MemoryDevice } from '../../src/block/memory.ts'
import { maxSocketPath } from '../../src/core/socket-path.ts'
import { NbdServer, type NbdServerOptions } from '../../src/nbd/server.ts'
import { connectNbd, listen, type NbdListener } from '../../src/nbd/socket.ts'
import { tempFolder } from '../support/temp.ts'

function served(options: NbdServerOptions = {}): NbdServer {
  return new NbdServer([{ name: '', device: new MemoryDevice(new Uint8Array(65536)) }], options)
}

/** A unix socket whose server was killed. */
async function deadSocket(path: string): Promise<void> {
  const program = `require('net').createServer().listen(${JSON.stringify(path)}, () => console.log('listens'))`
  const child = spawn(process.execPath, ['-e', program], { stdio: ['ignore', 'pipe', 'inherit'] })
  await once(child.stdout, 'data')
  child.kill('SIGKILL')
  await once(child, 'exit')
  expect(lstatSync(path).isSocket()).toBe(true)
}

async function isServed(path: string): Promise<boolean> {
  await using client = await connectNbd({ path })
  return client.size === 65536
}

describe('a unix socket', () => {
  test('that nobody listens on is replaced, and goes with the new server', async () => {
    const path = join(tempFolder(), 'nbd')
    await deadSocket(path)
    const listener = await listen(served(), { path })
    expect(await isServed(path)).toBe(true)
    await listener.close()
    expect(existsSync(path)).toBe(false)
  })

  test('with a server is left alone', async () => {
    const path = join(tempFolder(), 'nbd')
    const first = await listen(served(), { path })
    await expect(listen(served(), { path })).rejects.toMatchObject({ code: 'ERR_BUSY' })
    expect(await isServed(path)).toBe(true)
    await first.close()
  })

  test('a file, or a link, of its name is never replaced', async () => {
    const folder = tempFolder()
    const file = join(folder, 'file')
    writeFileSync(file, 'precious')
    symlinkSync(file, join(folder, 'link'))
    symlinkSync(join(folder, 'nowhere'), join(folder, 'dangling'))
    for (const name of ['file', 'link', 'dangling']) {
      await expect(listen(served(), { path: join(folder, name) })).rejects.toMatchObject({ code: 'ERR_IO', message: expect.stringContaining('no socket') as string })
    }
    expect(readFileSync(file, 'utf8')).toBe('precious')
    expect(existsSync(join(folder, 'nowhere'))).toBe(false)
  })

  test('has a path that is not cut, and a folder', async () => {
    const folder = tempFolder()
    const fits = join(folder, 'x'.repeat(maxSocketPath - folder.length - 1))
    const listener = await listen(served(), { path: fits })
    expect(await isServed(fits)).toBe(true)
    await listener.close()
    for (const call of [listen(served(), { path: `${fits}x` }), connectNbd({ path: `${fits}x` })]) {
      await expect(call).rejects.toMatchObject({ code: 'ERR_IO', message: expect.stringContaining(`at most ${maxSocketPath} bytes`) as string })
    }
    expect(existsSync(fits)).toBe(false)
    await expect(listen(served(), { path: join(folder, 'none', 'nbd') })).rejects.toThrow('there is no folder')
  })

  test('is told so that it can be opened', async () => {
    const path = join(tempFolder(), 'a b&c#d?e%f')
    const listener = await listen(served(), { path })
    onTestFinished(() => listener.close())
    const { parseNbdName } = await import('../../src/cli/image/nbd-name.ts')
    expect(parseNbdName(listener.uri('x y'))).toEqual({ address: { path }, name: 'x y' })
  })
})

describe('clients that only take up room', () => {
  const silent = async (listener: NbdListener): Promise<Socket> => {
    const { port } = listener.address as { port: number }
    const socket = connect(port, '127.0.0.1').on('error', () => undefined)
    await once(socket, 'data')
    onTestFinished(() => void socket.destroy())
    return socket
  }

  test('one that does not negotiate makes room for the next', async () => {
    const listener = await listen(served({ maxConnections: 2 }), { port: 0 })
    onTestFinished(() => listener.close())
    const first = await silent(listener)
    await silent(listener)
    const { port } = listener.address as { port: number }
    await expect(connectNbd({ port }, { timeout: 5000 })).rejects.toMatchObject({ code: expect.stringMatching(/ERR_FORMAT|ERR_IO/) as string })
    await new Promise((resolve) => setTimeout(resolve, 1100))
    const gone = once(first, 'close')
    await using client = await connectNbd({ port })
    expect(client.size).toBe(65536)
    await gone
    expect(listener.server.connections).toBe(2)
  })

  test('one that asks nothing is disconnected, where a limit is set', async () => {
    const errors: unknown[] = []
    const listener = await listen(served({ idleTimeout: 100, onConnectionError: (error) => errors.push(error) }), { port: 0 })
    onTestFinished(() => listener.close())
    const { port } = listener.address as { port: number }
    const client = await connectNbd({ port })
    for (let n = 0; n < 6; n++) {
      await client.read(0, 512)
      await new Promise((resolve) => setTimeout(resolve, 40))
    }
    await expect.poll(() => listener.server.connections, { timeout: 5000 }).toBe(0)
    expect(errors).toMatchObject([{ code: 'ERR_IO', message: expect.stringContaining('100 ms') as string }])
    await expect(client.read(0, 512)).rejects.toMatchObject({ code: 'ERR_IO' })
    await client.close()
  })

  test('a device that takes long is not idleness', async () => {
    class SlowFlush extends MemoryDevice {
      protected override onFlush(): Promise<void> {
        return new Promise((resolve) => setTimeout(resolve, 400))
      }
    }
    const listener = await listen(new NbdServer([{ name: '', device: new SlowFlush(new Uint8Array(65536)) }], { idleTimeout: 100 }), { port: 0 })
    onTestFinished(() => listener.close())
    await using client = await connectNbd({ port: (listener.address as { port: number }).port })
    await client.flush()
  })

  test('without a limit an idle client stays', async () => {
    const listener = await listen(served(), { port: 0 })
    onTestFinished(() => listener.close())
    await using client = await connectNbd({ port: (listener.address as { port: number }).port })
    await new Promise((resolve) => setTimeout(resolve, 200))
    expect(await client.read(0, 1)).toEqual(new Uint8Array(1))
  })
})
