/** The browser build and its demo page, in a real headless browser. */
import { readFileSync, statSync, writeFileSync } from 'node:fs'
import { createServer, type Server } from 'node:http'
import type { AddressInfo } from 'node:net'
import { tmpdir } from 'node:os'
import { mkdtempSync, rmSync } from 'node:fs'
import { join } from 'node:path'
import { gunzipSync } from 'node:zlib'
import { build } from 'tsup'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { browserBuild } from '../../browser-build.ts'
import { MemoryDevice } from '../../src/block/memory.ts'
import { Qcow2Image } from '../../src/qcow2/image.ts'
import { chromiumPath, Page } from '../support/chromium.ts'

const project = join(import.meta.dirname, '../..')
const files = new Map<string, Uint8Array>()
let folder: string
let server: Server
let origin: string

beforeAll(async () => {
  folder = mkdtempSync(join(tmpdir(), 'qcow2-browser-'))
  await build({ ...browserBuild, config: false, silent: true, dts: false, sourcemap: false, outDir: folder })
  for (const name of ['index.html', 'demo.js']) files.set(`/${name}`, readFileSync(join(project, 'docs/demo', name)))
  files.set('/browser.js', readFileSync(join(folder, 'browser.js')))
  const capture = (name: string): Uint8Array => gunzipSync(readFileSync(join(project, 'test/fixtures/captures', `${name}.gz`)))
  files.set('/vm.qcow2', capture('qemu100-savevm.qcow2'))
  files.set('/vm.stream', capture('qemu100-precopy.mig'))
  files.set('/mixed.qcow2', await mixedImage())
  files.set('/overlay.qcow2', await overlay())
  files.set('/junk', new Uint8Array(5000).fill(7))
  server = createServer((request, response) => {
    const path = new URL(request.url!, 'http://x').pathname
    const bytes = files.get(path)
    if (bytes === undefined) {
      response.writeHead(404).end()
      return
    }
    const type = path.endsWith('.html') ? 'text/html' : path.endsWith('.js') ? 'text/javascript' : 'application/octet-stream'
    const [, from, to = ''] = /bytes=(\d+)-(\d*)/.exec(request.headers.range ?? '') ?? []
    if (from === undefined) {
      response.writeHead(200, { 'content-type': type, 'content-length': bytes.length, 'accept-ranges': 'bytes' })
      response.end(request.method === 'HEAD' ? undefined : bytes)
      return
    }
    const end = to === '' ? bytes.length - 1 : Math.min(Number(to), bytes.length - 1)
    response.writeHead(206, { 'content-type': type, 'content-range': `bytes ${from}-${end}/${bytes.length}`, 'content-length': end + 1 - Number(from), etag: '"1"' })
    response.end(bytes.subarray(Number(from), end + 1))
  })
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
  origin = `http://127.0.0.1:${(server.address() as AddressInfo).port}`
})

afterAll(() => {
  server.close()
  server.closeAllConnections()
  rmSync(folder, { recursive: true, force: true })
})

/** Every kind of cluster, two snapshots. */
async function mixedImage(): Promise<Uint8Array> {
  const host = new MemoryDevice(0, { growable: true })
  const image = await Qcow2Image.create(host, { size: 64 << 20, clusterSize: 65536 })
  await image.write(0, new Uint8Array(8 << 20).fill(1))
  await image.writeCompressed(16 << 20, new Uint8Array(4 << 20).fill(2))
  await image.snapshots.create({ name: 'first' })
  await image.write(40 << 20, new Uint8Array(1 << 20).fill(3))
  await image.write(48 << 20, new Uint8Array(4 << 20).fill(4))
  await image.writeZeroes(48 << 20, 4 << 20)
  await image.snapshots.create({ name: 'second' })
  await image.flush()
  return host.bytes.slice()
}

/** An overlay of a file that is not there, with one cluster of its own. */
async function overlay(): Promise<Uint8Array> {
  const host = new MemoryDevice(0, { growable: true })
  const references = (): MemoryDevice => new MemoryDevice(1 << 20)
  const image = await Qcow2Image.create(host, { size: 1 << 20, backing: { file: '/images/base.raw', format: 'raw' }, references })
  await image.write(0, new Uint8Array(65536).fill(1))
  await image.close()
  return host.bytes.slice()
}

test('the build needs nothing of Node, and is small', () => {
  const bundle = readFileSync(join(folder, 'browser.js'), 'utf8')
  expect(bundle).not.toMatch(/from\s*["']node:|require\(["']node:/)
  expect(statSync(join(folder, 'browser.js')).size).toBeLessThan(400 << 10)
})

test('the build reads an image with compressed clusters, in Node without its modules', async () => {
  const browser = (await import(join(folder, 'browser.js'))) as typeof import('../../src/browser.ts')
  await using image = await browser.Qcow2Image.open(new Blob([new Uint8Array(files.get('/mixed.qcow2')!)]), { readOnly: true })
  expect(new Set(await image.read(16 << 20, 4 << 20))).toEqual(new Set([2]))
  expect(new Set(await image.read(40 << 20, 1 << 20))).toEqual(new Set([3]))
})

describe.skipIf(chromiumPath === undefined)('in Chromium', () => {
  const opened = async (path: string, options = {}): Promise<Page> => {
    const page = await Page.open(options)
    await page.goto(`${origin}/index.html?url=${path}`)
    await page.until('document.querySelector("#result").dataset.state === "done"')
    await keep(page, `${path.slice(1)}${JSON.stringify(options).replace(/\W+/g, '-')}`)
    return page
  }
  const text = async (page: Page): Promise<string> => String(await page.evaluate('document.querySelector("#result").innerText'))

  test('an image behind a URL: header, snapshots, allocation, VM state', async () => {
    const page = await opened('/vm.qcow2')
    const shown = await text(page)
    expect(shown).toContain('snap1')
    expect(shown).toMatch(/virtual size\s+1 MiB/)
    expect(shown).toMatch(/machine\s+pc-i440fx-10\.0/)
    expect(shown).toMatch(/pc\.ram\s+4 MiB\s+738/)
    expect(shown).toContain('i8259')
  })

  test('an image dropped as a file: every kind of cluster in the map', async () => {
    const page = await Page.open()
    await page.goto(`${origin}/index.html`)
    await page.evaluate(`(async () => {
      const blob = await (await fetch('/mixed.qcow2')).blob()
      const transfer = new DataTransfer()
      transfer.items.add(new File([blob], 'dropped.qcow2'))
      document.querySelector('#drop').dispatchEvent(new DragEvent('drop', { dataTransfer: transfer, bubbles: true, cancelable: true }))
    })()`)
    await page.until('document.querySelector("#result").dataset.state === "done"')
    await keep(page, 'dropped')
    const shown = await text(page)
    expect(shown).toContain('dropped.qcow2')
    expect(shown).toMatch(/first[\s\S]*second/)
    const label = String(await page.evaluate('document.querySelector("#map").getAttribute("aria-label")'))
    expect(label).toBe('Allocation of the disk: data 9 MiB, compressed 4 MiB, zeroes 4 MiB, unallocated 47 MiB')
    expect(await page.evaluate('document.querySelectorAll("#map rect").length')).toBe(1024)
  })

  test('an overlay: its backing file is named, and not needed', async () => {
    const shown = await text(await opened('/overlay.qcow2'))
    expect(shown).toContain('/images/base.raw')
    expect(shown).toMatch(/data 64 KiB[\s\S]*comes from the backing file/)
    expect(shown).toContain('There are none.')
  })

  test('a migration stream', async () => {
    expect(await text(await opened('/vm.stream'))).toMatch(/pc\.ram\s+4 MiB/)
  })

  test('what is neither says so, with where and why', async () => {
    expect(await text(await opened('/junk'))).toMatch(/^\/junk: .*magic/)
  })

  test.each([
    ['a phone', { width: 390, height: 800 }],
    ['the dark', { dark: true }],
  ])('on %s nothing is wider than the page', async (_name, options) => {
    const page = await opened('/vm.qcow2', options)
    expect(await page.evaluate('document.documentElement.scrollWidth <= innerWidth')).toBe(true)
  })
})

/** Screenshots to look at, where QCOW2_SCREENSHOTS names a folder. */
async function keep(page: Page, name: string): Promise<void> {
  const target = process.env['QCOW2_SCREENSHOTS']
  if (target !== undefined) writeFileSync(join(target, `${name}.png`), await page.screenshot())
}
