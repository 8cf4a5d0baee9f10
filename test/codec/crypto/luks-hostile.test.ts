/** LUKS headers that would cost time, or name what is not there: typed errors before anything is derived. */
import { beforeAll, describe, expect, test } from 'vitest'
import { createLuks, openLuks } from '../../../src/codec/crypto/luks.ts'

describe('a LUKS header', () => {
  let sound: Uint8Array = new Uint8Array(0)
  beforeAll(async () => {
    sound = (await createLuks('abc', { iterations: 1000 })).area
  })

  const withText = (at: number, text: string) => (area: Uint8Array): void => {
    area.fill(0, at, at + 32)
    area.set(new TextEncoder().encode(text), at)
  }
  const withNumber = (at: number, value: number) => (area: Uint8Array): void => new DataView(area.buffer).setUint32(at, value)
  const open = (change: (area: Uint8Array) => void, options: { signal?: AbortSignal } = {}): Promise<unknown> => {
    const area = sound.slice()
    change(area)
    return openLuks(area, 'abc', options)
  }

  test.each([
    ...['cbc-essiv:bogus', 'cbc-essiv:sha512', 'cbc-essiv:sha1', 'xts-essiv:', 'xts-essiv:shake128', 'xts-plain64x', 'ecb', ''].map((mode) => [`mode ${mode}`, withText(40, mode)] as const),
    ...['shake128', 'shake256', 'md4', 'whirlpool', 'null', 'blake2b512', ''].map((hash) => [`hash ${hash}`, withText(72, hash)] as const),
    ['cipher', withText(8, 'serpent')],
    ['iterations without end', withNumber(208 + 4, 0xffff_ffff)],
    ['more stripes than any program writes', withNumber(208 + 44, 4001)],
    ['fewer stripes', withNumber(208 + 44, 1)],
  ] as const)('%s is refused by its name', async (_name, change) => {
    await expect(open(change)).rejects.toMatchObject({ code: 'ERR_UNSUPPORTED' })
  })

  test('modes that go with the key are open to a passphrase', async () => {
    for (const mode of ['cbc-essiv:sha256', 'cbc-essiv:md5', 'cbc-plain64']) {
      const change = (area: Uint8Array): void => {
        withText(40, mode)(area)
        if (mode.startsWith('cbc')) withNumber(108, 32)(area)
      }
      await expect(open(change), mode).rejects.toMatchObject({ code: 'ERR_NOT_FOUND' })
    }
  })

  test('a derivation under way does not keep an abort waiting', async () => {
    const abort = new AbortController()
    const opening = open(withNumber(208 + 4, 5_000_000), { signal: abort.signal })
    setTimeout(() => abort.abort(new Error('enough')), 20)
    await expect(opening).rejects.toThrow('enough')
  })
})
