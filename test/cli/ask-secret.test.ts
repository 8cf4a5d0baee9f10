/** Passphrases that are typed: asked for where somebody can answer, never shown. */
import { spawn } from 'node:child_process'
import { EventEmitter, once } from 'node:events'
import { existsSync, readFileSync } from 'node:fs'
import { join, resolve } from 'node:path'
import { describe, expect, test } from 'vitest'
import { askSecret, type KeyInput } from '../../src/cli/ask-secret.ts'
import { main } from '../../src/cli/main.ts'
import { LuksImage } from '../../src/luks/luks-image.ts'
import { Qcow2Image } from '../../src/qcow2/image.ts'
import { tempFolder } from '../support/temp.ts'
import { terminal } from './run.ts'

const KiB = 1024
const program = resolve(import.meta.dirname, '../../dist/cli.cjs')

class Keys extends EventEmitter implements KeyInput {
  raw = false
  setRawMode(raw: boolean): void {
    this.raw = raw
  }
  resume(): void {
    // typed by the test
  }
  pause(): void {
    // nothing comes by itself
  }
}

describe('keys', () => {
  const ask = (signal = new AbortController().signal): { keys: Keys; shown: () => string; answer: Promise<string>; interrupts: () => number } => {
    const keys = new Keys()
    const { stderr } = terminal({ tty: true })
    let interrupts = 0
    const answer = askSecret('Q: ', { input: keys, output: stderr, signal, interrupt: () => interrupts++ }).then((bytes) => Buffer.from(bytes).toString())
    return { keys, shown: () => stderr.bytes.toString(), answer, interrupts: () => interrupts }
  }

  test.each([
    [['secret\r'], 'secret'],
    [['sec', 'ret\n'], 'secret'],
    [['wrong\u0015right\r'], 'right'],
    [['ä€\u007f\u007fok\r'], 'ok'],
    [['\u007f\u0008x\u0004'], 'x'],
    [['a b,c=d\r'], 'a b,c=d'],
  ])('%j', async (pieces, typed) => {
    const { keys, shown, answer } = ask()
    expect(keys.raw).toBe(true)
    for (const piece of pieces) keys.emit('data', Buffer.from(piece))
    expect(await answer).toBe(typed)
    expect([shown(), keys.raw, keys.listenerCount('data'), keys.listenerCount('end')]).toEqual(['Q: \n', false, 0, 0])
  })

  test('nothing, an interrupt and an abort', async () => {
    const none = ask()
    none.keys.emit('data', Buffer.from('\r'))
    await expect(none.answer).rejects.toThrow('no passphrase was given')
    const abort = new AbortController()
    const stopped = ask(abort.signal)
    stopped.keys.emit('data', Buffer.from([3]))
    expect(stopped.interrupts()).toBe(1)
    abort.abort(new Error('interrupted'))
    await expect(stopped.answer).rejects.toThrow('interrupted')
    expect(stopped.keys.raw).toBe(false)
  })
})

/** An encrypted image and a LUKS volume. */
async function encrypted(): Promise<{ folder: string; images: string[] }> {
  const folder = tempFolder()
  const images = ['disk.qcow2', 'disk.luks'].map((name) => join(folder, name))
  const encryption = { format: 'luks', passphrase: 'pass', iterations: 1000 } as const
  const image = await Qcow2Image.create(images[0]!, { size: 64 * KiB, encryption })
  await image.write(0, new Uint8Array(1024).fill(7))
  await image.close()
  const volume = await LuksImage.create(images[1]!, { size: 64 * KiB, passphrase: 'pass', iterations: 1000 })
  await volume.write(0, new Uint8Array(1024).fill(7))
  await volume.close()
  return { folder, images }
}

test('a command asks once for each image that needs a passphrase, and only where somebody answers', async () => {
  const { folder, images } = await encrypted()
  for (const image of images) {
    const questions: string[] = []
    const asking = (answer: string, name = 'qcow2'): Promise<number> =>
      main(['convert', '-O', 'raw', image, join(folder, 'out')], { ...terminal({ program: name }), askSecret: (question) => (questions.push(question), Promise.resolve(Buffer.from(answer))) })
    expect(await asking('pass')).toBe(0)
    expect(readFileSync(join(folder, 'out'))[999]).toBe(7)
    expect(questions).toEqual([`Passphrase for ${image}: `])
    expect(await asking('wrong')).toBe(1)
    expect(await asking('pass', 'qemu-img')).toBe(1)
    expect(questions).toHaveLength(2)
    expect(await main(['convert', '-O', 'raw', image, join(folder, 'out')], terminal())).toBe(1)
  }
})

test.skipIf(!existsSync(program) || !existsSync('/usr/bin/script'))('on a terminal nothing of it is shown', { timeout: 60_000 }, async () => {
  const { folder, images } = await encrypted()
  const child = spawn('/usr/bin/script', ['-qec', `'${process.execPath}' '${program}' convert -O raw '${images[0]!}' '${join(folder, 'out')}'`, '/dev/null'], { stdio: ['pipe', 'pipe', 'ignore'] })
  let shown = ''
  child.stdout.on('data', (bytes: Buffer) => {
    if (!shown.includes('Passphrase') && (shown + bytes.toString()).includes('Passphrase')) child.stdin.write('pass\r')
    shown += bytes.toString()
  })
  const [code] = (await once(child, 'exit')) as [number]
  expect([code, shown.trim()]).toEqual([0, `Passphrase for ${images[0]!}:`])
  expect(readFileSync(join(folder, 'out'))[999]).toBe(7)
})
