import fc from 'fast-check'
import { expect, test } from 'vitest'
import { join } from '../../src/block/join.ts'
import { MemoryDevice } from '../../src/block/memory.ts'

test('any range of joined devices is that of their bytes one after another; they stay open', async () => {
  const bytes = fc.uint8Array({ maxLength: 40 })
  await fc.assert(
    fc.asyncProperty(bytes, bytes, fc.nat(), fc.nat(), async (a, b, from, to) => {
      const [first, second] = [new MemoryDevice(a), new MemoryDevice(b)]
      const joined = join(first, second)
      const whole = Buffer.concat([a, b])
      expect(joined.size).toBe(whole.length)
      const offset = from % (whole.length + 1)
      const length = to % (whole.length - offset + 1)
      expect(Buffer.compare(await joined.read(offset, length), whole.subarray(offset, offset + length))).toBe(0)
      await expect(joined.write(0, new Uint8Array(1))).rejects.toMatchObject({ code: 'ERR_READ_ONLY' })
      await joined.close()
      expect([first.closed, second.closed]).toEqual([false, false])
    }),
  )
})
