/** Our human forms of QEMU's own JSON, against the human forms QEMU prints. */
import { readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { gunzipSync } from 'node:zlib'
import { describe, expect, onTestFinished, test } from 'vitest'
import { checkText } from '../../src/cli/print/check.ts'
import { infoText } from '../../src/cli/print/info.ts'
import { mapHeading, mapJson, mapRow } from '../../src/cli/print/map.ts'
import { measureText } from '../../src/cli/print/measure.ts'
import { prettyJson, type CheckEntry, type ImageEntry, type MapEntry, type MeasureEntry } from '../../src/cli/print/shapes.ts'
import { snapshotTable } from '../../src/cli/print/snapshots.ts'
import { formatSize } from '../../src/cli/size.ts'
import { qemus } from '../support/qemu.ts'
import { tempFolder } from '../support/temp.ts'

// the forms are those of 10.0: 7.2 prints fewer fields
const qemu = qemus.find(({ major }) => major >= 10)

/** A folder in which names are relative, as people give them. */
function inFolder(): void {
  const folder = tempFolder()
  const before = process.cwd()
  process.chdir(folder)
  onTestFinished(() => process.chdir(before))
}

const images: Record<string, readonly string[][]> = {
  'a fresh image': [['create', '-f', 'qcow2', 'x', '10G']],
  'compat 0.10': [['create', '-f', 'qcow2', '-o', 'compat=0.10', 'x', '1000']],
  'a raw image': [['create', '-f', 'raw', 'x', '3M']],
  'every option': [['create', '-f', 'qcow2', '-o', 'cluster_size=16k,lazy_refcounts=on,refcount_bits=8,extended_l2=on,compression_type=zstd', 'x', '1.5G']],
  'an overlay': [['create', '-f', 'raw', 'base.raw', '1M'], ['create', '-f', 'qcow2', '-b', 'base.raw', '-F', 'raw', 'x']],
  'two bitmaps': [['create', '-f', 'qcow2', 'x', '8M'], ['bitmap', '--add', 'x', 'b0'], ['bitmap', '--add', '--disable', '-g', '32k', 'x', 'b1']],
  'a data file': [['create', '-f', 'qcow2', '-o', 'data_file=data,data_file_raw=on', 'x', '1M']],
  snapshots: [['create', '-f', 'qcow2', 'x', '8M'], ['snapshot', '-c', 'one', 'x'], ['snapshot', '-c', 'a much longer name than sixteen', 'x']],
  encryption: [['create', '-f', 'qcow2', '--object', 'secret,id=s,data=abc', '-o', 'encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10', 'x', '1M']],
}

describe.skipIf(qemu === undefined)('the forms of qemu-img 10.0', () => {
  const both = async (...args: string[]): Promise<[string, string]> => {
    const { stdout: text } = await qemu!.img(...args)
    const { stdout: json } = await qemu!.img(args[0]!, '--output=json', ...args.slice(1))
    return [text, json]
  }

  test.each(Object.entries(images))('info of %s', async (_name, commands) => {
    inFolder()
    for (const command of commands) await qemu!.imgOk(...command)
    const [text, json] = await both('info', 'x')
    expect(`${infoText(JSON.parse(json) as ImageEntry)}\n`).toBe(text)
  })

  test('info and the list of a snapshot with VM state', async () => {
    inFolder()
    writeFileSync('x', gunzipSync(readFileSync(join(import.meta.dirname, '../fixtures/captures/qemu100-savevm.qcow2.gz'))))
    const [text, json] = await both('info', 'x')
    const image = JSON.parse(json) as ImageEntry
    expect(`${infoText(image)}\n`).toBe(text)
    expect(snapshotTable(image.snapshots!).join('\n')).toBe((await qemu!.imgOk('snapshot', '-l', 'x')).trimEnd())
  })

  test('map, check and measure', async () => {
    inFolder()
    await qemu!.imgOk('create', '-f', 'qcow2', 'x', '8M')
    await qemu!.io('-c', 'write 0 1M', '-c', 'write -c 3M 64k', '-c', 'write -z 5M 1M', 'x')
    const [checked, checkJson] = await both('check', 'x')
    expect(`${checkText(JSON.parse(checkJson) as CheckEntry).join('\n')}\n`).toBe(checked)
    const [measured, measureJson] = await both('measure', '-O', 'qcow2', 'x')
    expect(`${measureText(JSON.parse(measureJson) as MeasureEntry).join('\n')}\n`).toBe(measured)
    const mapped = await qemu!.imgOk('map', '--output=json', 'x')
    const entries = JSON.parse(mapped) as MapEntry[]
    expect(`[${entries.map(mapJson).join(',\n')}]\n`).toBe(mapped)
    const [plain] = await both('map', '-l', '1M', 'x')
    const rows = entries.slice(0, 1).map((entry) => mapRow(entry, 'x'))
    expect(`${[mapHeading, ...rows].join('\n')}\n`).toBe(plain)
  })

  test.each([[1, '3.12'], [3, '9.38'], [5, '15.62'], [7, '21.88'], [10, '31.25'], [31, '96.88']])('%i of 32 clusters are %s percent', (allocated, percent) => {
    const result = { 'total-clusters': 32, 'allocated-clusters': allocated, 'check-errors': 0, filename: 'x', format: 'qcow2' }
    expect(checkText(result)).toContain(`${allocated}/32 = ${percent}% allocated, 0.00% fragmented, 0.00% compressed clusters`)
  })

  test('a check that finds leaks and corruptions', async () => {
    inFolder()
    await qemu!.imgOk('create', '-f', 'qcow2', '-o', 'cluster_size=4k', 'x', '1M')
    await qemu!.io('-c', 'write 0 64k', 'x')
    const bytes = readFileSync('x')
    const block = Number(bytes.readBigUInt64BE(Number(bytes.readBigUInt64BE(48))))
    bytes.writeUInt16BE(5, block + 2 * 6)
    bytes.writeUInt16BE(1, block + 2 * 40)
    writeFileSync('x', bytes)
    const [text, json] = await both('check', 'x')
    expect(`${checkText(JSON.parse(json) as CheckEntry).join('\n')}\n`).toBe(text)
  })

  test('sizes of every magnitude', async () => {
    inFolder()
    for (const size of [512, 1024, 1000 * 512, 1023 * 512, 1024 * 1023, 999 * 1024, 1023 * 1024, 1000 * 1024 + 512, 123456 * 512, 2 ** 40 - 512, 2 ** 49 + 2 ** 47]) {
      await qemu!.imgOk('create', '-q', '-f', 'qcow2', 'x', String(size))
      expect(await qemu!.imgOk('info', 'x')).toContain(`virtual size: ${formatSize(size)} (${size} bytes)`)
    }
  })
})

test('JSON is indented by four', () => {
  expect(prettyJson({ a: [1] })).toBe('{\n    "a": [\n        1\n    ]\n}')
})
