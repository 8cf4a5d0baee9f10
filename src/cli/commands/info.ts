import type { LuksHeader } from '../../codec/crypto/luks-header.ts'
import { luksDiskSize, readLuksHeader } from '../../luks/luks-image.ts'
import { Qcow2Error } from '../../core/errors.ts'
import { readImageInfo, type ImageInfo } from '../../qcow2/info.ts'
import { command } from '../command.ts'
import { ExitError } from '../errors.ts'
import { bitmapsWarning } from '../image/bitmap-warning.ts'
import { spaceTaken } from '../image/host.ts'
import { resolveBacking } from '../image/names.ts'
import type { ImageFile, NamedFile } from '../image/opened.ts'
import type { Opener } from '../image/open.ts'
import { snapshotTableReason } from '../image/snapshot-table-reason.ts'
import { forceShareOption, formatOption, imageOptsOption, objectOption, fileArgument, openerFor, outputOption } from '../image/options.ts'
import { couldNotOpen } from '../image/reasons.ts'
import { parseName, type ImageSpec } from '../image/spec.ts'
import { infoText } from '../print/info.ts'
import { prettyJson, type ImageEntry, type Json } from '../print/shapes.ts'
import { nameFor } from '../terminal.ts'
import { snapshotEntry, snapshotIn } from './snapshot.ts'

export const infoCommand = command({
  name: 'info',
  summary: 'Show what an image is: format, sizes, snapshots, bitmaps',
  description: ['Only metadata is read: neither the backing file nor the data file need exist, and no key is needed.'],
  options: {
    'backing-chain': { short: 'b', help: 'show the images below it too' },
    ...formatOption,
    ...imageOptsOption,
    ...outputOption,
    cache: { short: 't', value: 'MODE', help: 'accepted for compatibility' },
    limits: { help: 'accepted for compatibility' },
    ...forceShareOption,
    ...objectOption,
  },
  arguments: [{ name: 'FILENAME', help: 'the image' }],
  examples: [
    { line: 'qcow2 info disk.qcow2', shows: 'for people' },
    { line: 'qcow2 info --output=json --backing-chain overlay.qcow2', shows: 'the whole chain, for programs' },
    { line: 'qcow2 info disk.qcow2@before-update', shows: 'one snapshot, and the size its disk had' },
    { line: 'qcow2 info https://example.org/images/disk.qcow2', shows: 'an image on a web server' },
  ],
  async run(context) {
    const { options, print } = context
    const opener = openerFor(context)
    const entries = await chainEntries(opener, await fileArgument(context, { readOnly: true }), options['backing-chain'])
    if (options.output === 'json') await print(prettyJson(options['backing-chain'] ? entries : entries[0]))
    else await print(entries.map((entry) => infoText(entry, nameFor(context.terminal.stdout))).join('\n\n'))
    return 0
  },
})

/** The entry of an image, and with `chain` those below it. */
async function chainEntries(opener: Opener, top: NamedFile, chain: boolean): Promise<ImageEntry[]> {
  const entries = [await readEntry(opener, top)]
  const seen = new Set([top.spec.shown])
  const root = top.spec.place.kind === 'file' ? top.spec.place.path : undefined
  for (let from = top.spec; ; ) {
    const above = entries.at(-1)!
    const below = chain ? above['full-backing-filename'] : undefined
    if (below === undefined) return entries
    const spec = parseName(below, above['backing-filename-format'])
    if (seen.has(spec.shown)) throw new ExitError(1, `Backing file '${spec.shown}' creates an infinite loop.`)
    seen.add(spec.shown)
    const reference = { name: above['backing-filename'] ?? spec.shown, from: from.shown }
    const bytes = await opener.referenced(spec, reference, root, { readOnly: true })
    entries.push(await readEntry(opener, { spec, file: await opener.file(spec, { readOnly: true }, bytes), snapshot: undefined }))
    from = spec
  }
}

/** The entry of an image, whose file is closed. */
async function readEntry({ settings }: Opener, { spec, file, snapshot }: NamedFile): Promise<ImageEntry> {
  try {
    if (snapshot !== undefined && file.format !== 'qcow2') throw new Qcow2Error('ERR_NOT_FOUND', `a ${file.format} image has no snapshots`)
    if (file.format === 'raw') return await rawEntry(file)
    if (file.format === 'luks') return await luksEntry(file, spec)
    const info = await readImageInfo(file.host)
    if (info.bitmapsInvalid) settings.warn(bitmapsWarning(file.filename))
    return await qcow2Entry(file, nameOf(spec), info, snapshot)
  } catch (error) {
    throw couldNotOpen(spec.given ?? spec.shown, await snapshotTableReason(file.host, error, { signal: settings.signal }))
  } finally {
    await file.host.close()
  }
}

async function rawEntry(file: ImageFile): Promise<ImageEntry> {
  const taken = await spaceTaken(file.place)
  return {
    filename: file.filename,
    format: 'raw',
    'virtual-size': sectors(file.size),
    ...(taken === undefined ? {} : { 'actual-size': taken }),
    children: [fileChild(file, taken)],
    'dirty-flag': false,
  }
}

async function luksEntry(file: ImageFile, spec: ImageSpec): Promise<ImageEntry> {
  const taken = await spaceTaken(file.place)
  const header = await readLuksHeader(file.host)
  const { format: _, ...data } = luksData(header)
  return {
    children: [fileChild(file, taken)],
    'virtual-size': luksDiskSize(file.host, header),
    filename: nameOf(spec),
    format: 'luks',
    ...(taken === undefined ? {} : { 'actual-size': taken }),
    'format-specific': { type: 'luks', data },
    encrypted: true,
    'dirty-flag': false,
  }
}

/** As QEMU names an image that its file name alone does not open. */
function nameOf({ shown, format, place, keySecret }: ImageSpec): string {
  if (keySecret === undefined || place.kind !== 'file') return shown
  if (format === 'luks') return `json:{"driver": "luks", "file": {"driver": "file", "filename": ${JSON.stringify(place.path)}}, "key-secret": ${JSON.stringify(keySecret)}}`
  return `json:{"encrypt.key-secret": ${JSON.stringify(keySecret)}, "driver": "qcow2", "file": {"driver": "file", "filename": ${JSON.stringify(place.path)}}}`
}

async function qcow2Entry(file: ImageFile, filename: string, info: ImageInfo, snapshot: string | undefined): Promise<ImageEntry> {
  const taken = await spaceTaken(file.place)
  const { backingFile, backingFormat } = info
  const snapshots = snapshot === undefined ? info.snapshots : [snapshotIn(info, snapshot)]
  const fullName = backingFile === undefined ? undefined : resolveBacking(file.place, backingFile)
  return {
    children: [fileChild(file, taken)],
    ...(snapshots.length === 0 ? {} : { snapshots: snapshots.map(snapshotEntry) }),
    ...(backingFormat === undefined || backingFile === undefined ? {} : { 'backing-filename-format': backingFormat }),
    'virtual-size': snapshot === undefined ? info.virtualSize : snapshots[0]!.diskSize,
    filename: snapshot === undefined ? filename : `${filename}@${snapshot}`,
    'cluster-size': info.clusterSize,
    format: 'qcow2',
    ...(taken === undefined ? {} : { 'actual-size': taken }),
    'format-specific': { type: 'qcow2', data: specificData(info) },
    ...(fullName === undefined ? {} : { 'full-backing-filename': fullName }),
    ...(info.encryption === 'none' ? {} : { encrypted: true }),
    ...(backingFile === undefined ? {} : { 'backing-filename': backingFile }),
    'dirty-flag': info.dirty,
  }
}

function fileChild({ filename, host }: ImageFile, taken: number | undefined): { name: string; info: ImageEntry } {
  const info: ImageEntry = {
    children: [],
    'virtual-size': sectors(host.size),
    filename,
    format: 'file',
    ...(taken === undefined ? {} : { 'actual-size': taken }),
    'format-specific': { type: 'file', data: {} },
    'dirty-flag': false,
  }
  return { name: 'file', info }
}

function sectors(bytes: number): number {
  return Math.ceil(bytes / 512) * 512
}

/** In the order in which qemu-img prints them. */
function specificData(info: ImageInfo): { readonly [key: string]: Json | undefined } {
  const compat = info.version === 2 ? '0.10' : '1.1'
  const encrypt = info.encryption === 'none' ? {} : { encrypt: encryptionData(info) }
  if (info.version === 2) return { compat, 'compression-type': info.compressionType, 'refcount-bits': info.refcountBits, ...encrypt }
  const bitmaps = info.bitmaps.map(({ name, granularity, inUse, auto }) => ({ flags: [...(inUse ? ['in-use'] : []), ...(auto ? ['auto'] : [])], name, granularity }))
  return {
    compat,
    'compression-type': info.compressionType,
    'lazy-refcounts': info.lazyRefcounts,
    ...(bitmaps.length === 0 ? {} : { bitmaps }),
    'refcount-bits': info.refcountBits,
    ...(info.dataFile === undefined ? {} : { 'data-file': info.dataFile }),
    ...encrypt,
    ...(info.externalData ? { 'data-file-raw': info.dataFileRaw } : {}),
    corrupt: info.corrupt,
    'extended-l2': info.extendedL2,
  }
}

function encryptionData({ encryption, luks }: ImageInfo): { readonly [key: string]: Json | undefined } {
  return luks === undefined ? { format: encryption === 'luks' ? 'luks' : 'aes' } : luksData(luks)
}

/** A LUKS1 header in QEMU's words. */
function luksData(luks: LuksHeader): { readonly [key: string]: Json | undefined } {
  const [mode = '', ivgen = ''] = luks.cipherMode.split('-')
  // XTS takes two keys of the cipher's width
  const bits = (luks.keyBytes * 8) / (mode === 'xts' ? 2 : 1)
  const slots = luks.slots.map(({ active, iterations, keyOffset, stripes }) =>
    active ? { active, iters: iterations, 'key-offset': keyOffset, stripes } : { active, 'key-offset': keyOffset },
  )
  return {
    'ivgen-alg': ivgen,
    'detached-header': false,
    'hash-alg': luks.hash,
    'cipher-alg': `${luks.cipherName}-${bits}`,
    uuid: luks.uuid,
    format: 'luks',
    'cipher-mode': mode,
    slots,
    'payload-offset': luks.payloadOffset,
    'master-key-iters': luks.digestIterations,
  }
}
