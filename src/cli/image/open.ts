/**
 * Opening what the command line names: the bytes, the format over them, the backing chain below.
 * Owns the chain, so that every image in it has the name users know it by; the formats are the
 * library's.
 */
import { readFile } from 'node:fs/promises'
import type { BlockDevice } from '../../block/device.ts'
import { MemoryDevice } from '../../block/memory.ts'
import { NullDevice } from '../../block/null.ts'
import { openSource } from '../../block/source.ts'
import { pad } from '../../block/pad.ts'
import { slice } from '../../block/slice.ts'
import { IoError, Qcow2Error, UnsupportedError } from '../../core/errors.ts'
import { redacted } from '../../core/redact.ts'
import { LuksImage } from '../../luks/luks-image.ts'
import type { CheckReport } from '../../qcow2/check-report.ts'
import { Qcow2Image } from '../../qcow2/image.ts'
import { readImageInfo } from '../../qcow2/info.ts'
import { foreignFormat } from '../../qcow2/probe.ts'
import { follow, type Advice, type Reference, type ReferenceRule } from '../../qcow2/references.ts'
import { ExitError, UsageError } from '../errors.ts'
import { findingLines } from '../print/findings.ts'
import { bitmapsWarning } from './bitmap-warning.ts'
import { blkdebug, rulesOf } from './blkdebug.ts'
import { isImageFormat, type ImageFormat } from './formats.ts'
import { resolveBacking, splitAddress, splitSnapshot, type SnapshotName } from './names.ts'
import { lengthened, type Link } from './open-chain.ts'
import { syncLimit, type OpenerSettings, type OpenHow } from './open-settings.ts'
import { openedFlat, type Below, type ImageFile, type NamedFile, type OpenedImage } from './opened.ts'
import { lockedSize, probe } from './probe.ts'
import { rawImage } from './raw.ts'
import { couldNotOpen, needsKey } from './reasons.ts'
import { secretOf } from './secrets.ts'
import { snapshotTableReason } from './snapshot-table-reason.ts'
import { parseName, type ImageSpec, type Place } from './spec.ts'

/** What refusals of {@link follow} say there is to do. */
const advice: Advice = { any: '--references=any follows it', write: '--references=any allows it', protocol: '--references=any follows it' }

/** An NBD export as a device that takes any request. */
export async function openExport({ address, name, context = 'base:allocation' }: Extract<Place, { kind: 'nbd' }>, how: { readonly readOnly: boolean; readonly signal: AbortSignal }): Promise<BlockDevice> {
  // loaded where it is used: most runs open files only
  const { connectNbd } = await import('../../nbd/socket.ts')
  return pad(await connectNbd(address, { ...how, name, context, blockSize: 512 }))
}

/** Opens images by name. */
export class Opener {
  readonly settings: OpenerSettings
  /** Passphrases that were asked for, by the image's name: an image is opened several times by some commands. */
  readonly #asked = new Map<string, Promise<Uint8Array>>()

  constructor(settings: OpenerSettings) {
    this.settings = settings
  }

  /**
   * Opens an image by its plain name; `NAME@SNAPSHOT` is a snapshot's disk, read-only. What is there by the whole name
   * is meant before what is by a part of it: for a path that is seen at once, for an address when nothing is found.
   */
  async name(name: string, how: OpenHow, format?: string): Promise<OpenedImage> {
    const split = splitSnapshot(name)
    if (split !== undefined) {
      if (!how.readOnly) throw new ExitError(1, `Could not open '${name}': a snapshot can only be read`)
      return this.snapshot(split.file, split.snapshot, how, format)
    }
    const remote = how.readOnly ? splitAddress(name) : undefined
    if (remote === undefined) return this.spec(parseName(name, format), how)
    try {
      return await this.spec(parseName(name, format), how)
    } catch (error) {
      if (!isAbsent(error)) throw error
      await this.file(parseName(remote.file, format), how).then(
        ({ host }) => host.close(),
        () => Promise.reject(error as Error),
      )
    }
    return this.snapshot(remote.file, remote.snapshot, how, format)
  }

  /** Opens the disk of a snapshot, by its id or name, of the image with a plain name. */
  async snapshot(name: string, idOrName: string, how: OpenHow, format?: string): Promise<OpenedImage> {
    const spec = parseName(name, format)
    const opened = await this.spec(spec, { ...how, readOnly: true })
    return this.#atSnapshot(opened, idOrName, `${spec.shown}@${idOrName}`)
  }

  /**
   * Opens an image as specified.
   * @throws ExitError `Could not open 'NAME': ...`
   */
  async spec(spec: ImageSpec, how: OpenHow): Promise<OpenedImage> {
    try {
      return await this.#open(spec, how, [])
    } catch (error) {
      throw couldNotOpen(spec.given ?? spec.shown, error, { ...this.settings, file: spec.shown })
    }
  }

  /**
   * What an image to be made over another has to know of it. The key of an encrypted one is not needed for that.
   * @throws ExitError `Could not open 'NAME': ...`
   */
  async below(name: string, format?: string): Promise<Below> {
    try {
      const opened = await this.name(name, { readOnly: true }, format)
      const below = { format: opened.format, size: opened.device.size }
      await opened.close()
      return below
    } catch (error) {
      const file = await this.file(parseName(name, format), { readOnly: true }).catch(() => undefined)
      const size = file && (await lockedSize(file.format, file.host).catch(() => undefined))
      await file?.host.close()
      if (file === undefined || size === undefined) throw error
      return { format: file.format, size }
    }
  }

  /**
   * The bytes of an image file without its format opened: for what must work on damaged images.
   * @throws ExitError `Could not open 'NAME': ...`
   */
  async file(spec: ImageSpec, how: OpenHow, bytes?: BlockDevice): Promise<ImageFile> {
    try {
      refuseUnknownFormat(spec.format)
      const host = bytes ?? (await this.bytes(spec.place, how))
      const found = spec.format === 'raw' ? 'raw' : await probeOrClose(host)
      if (spec.format !== undefined && spec.format !== 'raw' && spec.format !== found) {
        await host.close()
        throw new Qcow2Error('ERR_FORMAT', spec.format === 'luks' ? 'Volume is not in LUKS format' : 'Image is not in qcow2 format')
      }
      const { size } = partOf(host, spec.part)
      return { filename: spec.shown, place: spec.place, format: found, host, size }
    } catch (error) {
      throw couldNotOpen(spec.given ?? spec.shown, error, { ...this.settings, file: spec.shown })
    }
  }

  /** As {@link file}, by a plain name; of `NAME@SNAPSHOT` the file that holds the snapshot. */
  async fileAt(name: string, how: OpenHow, format?: string): Promise<NamedFile> {
    const open = async (cut: SnapshotName): Promise<NamedFile> => {
      if (!how.readOnly) throw new ExitError(1, `Could not open '${name}': a snapshot can only be read`)
      const spec = parseName(cut.file, format)
      return { spec, file: await this.file(spec, how), snapshot: cut.snapshot }
    }
    const local = splitSnapshot(name)
    if (local !== undefined) return open(local)
    const remote = how.readOnly ? splitAddress(name) : undefined
    const spec = parseName(name, format)
    try {
      return { spec, file: await this.file(spec, how), snapshot: undefined }
    } catch (error) {
      if (remote === undefined || !isAbsent(error)) throw error
      return open(remote)
    }
  }

  /** Opens bytes, as they are. */
  async bytes(place: Place, how: OpenHow): Promise<BlockDevice> {
    const { signal, forceShare, wrap } = this.settings
    const { readOnly, direct } = how
    if (place.kind === 'blkdebug') return failing(await this.bytes(place.inner, how), place, 'file')
    if (place.kind === 'image') return (await this.#open(place.spec, how, [])).device
    if (place.kind === 'nbd') return openExport(place, { readOnly, signal })
    if (place.kind === 'null') return new NullDevice(place.size)
    const locking = place.kind === 'file' ? place.locking : undefined
    const source = place.kind === 'file' ? place.path : place.url
    const device = await openSource(source, { readOnly, signal, locking, forceShare, ...(direct === true ? { direct } : { syncLimit: how.syncLimit ?? syncLimit }) })
    return wrap === undefined ? device : wrap(device, place.kind === 'file' ? place.path : redacted(place.url.href))
  }

  /** The snapshot of an open image; the image is closed with it. */
  async #atSnapshot(opened: OpenedImage, idOrName: string, filename: string): Promise<OpenedImage> {
    try {
      if (opened.image === undefined) throw new Qcow2Error('ERR_NOT_FOUND', `a ${opened.format} image has no snapshots`)
      const snapshot = await opened.image.snapshots.open(idOrName)
      const close = async (): Promise<void> => {
        await snapshot.close()
        await opened.close()
      }
      return { ...opened, filename, device: snapshot, snapshot, close }
    } catch (error) {
      await opened.close()
      throw couldNotOpen(filename, error, this.settings)
    }
  }

  /** `bytes`: those of the image, where they are open already. */
  async #open(spec: ImageSpec, how: OpenHow, above: readonly Link[], bytes?: BlockDevice): Promise<OpenedImage> {
    const readOnly = how.readOnly || spec.readOnly === true
    const chain = await lengthened(above, spec)
    refuseUnknownFormat(spec.format)
    if (spec.place.kind === 'blkdebug' && spec.place.inner.kind === 'image' && spec.format === undefined) {
      const below = await this.#open(spec.place.inner.spec, { ...how, readOnly }, above)
      return { ...below, spec, device: await failing(below.device, spec.place, 'file'), image: undefined }
    }
    const host = bytes ?? (await this.bytes(spec.place, { ...how, readOnly }))
    try {
      const format = spec.format ?? (await probe(host))
      if (format === 'raw') return openedFlat(spec, 'raw', host, rawImage(partOf(host, spec.part)))
      if (format === 'luks') return openedFlat(spec, 'luks', host, pad(await this.#luks(spec, host, readOnly)))
      return await this.#openQcow2(spec, host, { ...how, readOnly }, chain)
    } catch (error) {
      await host.close()
      throw error
    }
  }

  async #openQcow2(spec: ImageSpec, host: BlockDevice, how: OpenHow, chain: readonly Link[]): Promise<OpenedImage> {
    let backing: OpenedImage | undefined
    let dataFilename: string | undefined
    const { signal } = this.settings
    const locking = spec.place.kind === 'file' ? spec.place.locking : undefined
    const references = async (reference: Reference): Promise<boolean | BlockDevice> => {
      if (reference.kind === 'data file') {
        dataFilename = reference.name
        return follow(this.#rule, reference, { root: chain[0]!.path, advice, open: (path) => this.bytes({ kind: 'file', path }, how) }).catch((error: unknown) => {
          throw Qcow2Error.is(error, 'ERR_NOT_FOUND') ? new Qcow2Error('ERR_NOT_FOUND', couldNotOpen(reference.name, error).message) : error
        })
      }
      backing = await this.#backing(spec, reference, how, chain)
      // what nobody may look at reads as zeroes
      return backing?.device ?? new MemoryDevice(0)
    }
    const dataFile = await this.#dataFile(spec, host, how)
    if (spec.dataFile?.kind === 'file') dataFilename = spec.dataFile.path
    let repaired: CheckReport | undefined
    const onRepair = (report: CheckReport): unknown => (repaired = report)
    const opening = { readOnly: how.readOnly, locking, references, signal, dataFile, onRepair }
    const image = await this.#withPassphrase(spec, (passphrase) => Qcow2Image.open(host, { ...opening, passphrase })).catch(async (error: unknown) => {
      await dataFile?.close()
      throw await snapshotTableReason(host, error, { signal })
    })
    if (image.bitmaps.invalid) this.settings.warn(bitmapsWarning(spec.shown))
    if (repaired !== undefined) this.settings.told?.(findingLines(repaired, image.engine.geometry.clusterSize))
    const device = spec.place.kind === 'blkdebug' ? await failing(image, spec.place, 'guest') : image
    return { filename: spec.shown, format: 'qcow2', place: spec.place, spec, device, host, image, snapshot: undefined, backing, dataFilename, close: () => image.close() }
  }

  /** The data file that the options give, instead of the one the image names. */
  async #dataFile({ dataFile }: ImageSpec, host: BlockDevice, how: OpenHow): Promise<BlockDevice | undefined> {
    if (dataFile === undefined) return undefined
    if (!(await readImageInfo(host)).externalData) throw new UsageError("'data-file' can only be set for images with an external data file")
    return this.bytes(dataFile, how)
  }

  async #backing(spec: ImageSpec, reference: Reference, how: OpenHow, chain: readonly Link[]): Promise<OpenedImage | undefined> {
    if (how.withoutBacking === true || spec.backing === null) return undefined
    const belowHow = { readOnly: true, direct: how.direct }
    const below = spec.backing ?? parseName(resolveBacking(spec.place, reference.name), reference.format)
    try {
      // what the user names himself is no reference of the image, and has its own tree
      if (spec.backing !== undefined) return await this.#open(below, belowHow, chain.map((link) => ({ ...link, path: undefined })))
      return await this.#open(below, belowHow, chain, await this.referenced(below, reference, chain[0]!.path, belowHow))
    } catch (error) {
      throw new Qcow2Error('ERR_IO', `Could not open backing file: ${couldNotOpen(below.shown, error).message}`, { cause: error })
    }
  }

  /**
   * The bytes of a backing file that an image names, as far as the rule for references goes; undefined where it forbids nothing.
   * @param root path of the image that was opened first
   */
  async referenced(below: ImageSpec, reference: Pick<Reference, 'name' | 'from'>, root: string | undefined, how: OpenHow): Promise<BlockDevice | undefined> {
    const { name, from } = reference
    if (this.#rule === 'any') {
      if (below.format === undefined) this.settings.warn(`'${from ?? 'the image'}' does not record the format of its backing file '${name}'; it was guessed`)
      return undefined
    }
    const { place, format } = below
    const path = place.kind === 'file' && below.given === undefined ? place.path : undefined
    if (format === undefined && path !== undefined && this.#rule === 'tree') {
      throw new UnsupportedError(`its format is not recorded, and guessing lets whoever writes a raw disk choose files to open; record it (rebase -u -b NAME -F FMT), or ${advice.any}`, ['backing format'])
    }
    return follow(this.#rule, { kind: 'backing file', name, format, from, path, access: 'read' }, { root, advice, open: () => this.bytes(place, how) })
  }

  get #rule(): ReferenceRule {
    return this.settings.references ?? 'tree'
  }

  /** Opens an image with the secret that its options name; if it needs one and they name none, with what the user types. */
  async #withPassphrase<T>(spec: ImageSpec, open: (passphrase: Uint8Array | undefined) => Promise<T>): Promise<T> {
    const { secrets, askSecret } = this.settings
    if (spec.keySecret !== undefined) return open(secretOf(secrets, spec.keySecret))
    try {
      return await open(undefined)
    } catch (error) {
      if (askSecret === undefined || !needsKey(error)) throw error
      return open(await this.#ask(spec, askSecret))
    }
  }

  #ask({ shown }: ImageSpec, askSecret: (question: string) => Promise<Uint8Array>): Promise<Uint8Array> {
    const asked = this.#asked.get(shown) ?? askSecret(`Passphrase for ${shown}: `)
    this.#asked.set(shown, asked)
    return asked
  }

  async #luks(spec: ImageSpec, host: BlockDevice, readOnly: boolean): Promise<LuksImage> {
    const { keySecret } = spec
    const { secrets, askSecret } = this.settings
    if (keySecret === undefined && askSecret === undefined) throw new Qcow2Error('ERR_NOT_FOUND', "Parameter 'key-secret' is required for cipher")
    const passphrase = keySecret === undefined ? await this.#ask(spec, askSecret!) : secretOf(secrets, keySecret)
    return LuksImage.open(host, { passphrase, readOnly, signal: this.settings.signal }).catch((error: unknown) => {
      throw Qcow2Error.is(error, 'ERR_NOT_FOUND') ? new Qcow2Error('ERR_NOT_FOUND', 'Invalid password, cannot unlock any keyslot', { cause: error }) : error
    })
  }
}

/** Nothing is there by that name, as far as is known: servers say so in several ways. */
function isAbsent(error: unknown): boolean {
  if (error instanceof UsageError) return true
  const cause = error instanceof ExitError ? error.cause : undefined
  return Qcow2Error.is(cause, 'ERR_NOT_FOUND') || (cause instanceof IoError && cause.operation === 'open')
}

function refuseUnknownFormat(format: string | undefined): void {
  const foreign = format === undefined ? undefined : foreignFormat(format)
  if (foreign !== undefined) throw foreign
  if (format !== undefined && !isImageFormat(format)) throw new Qcow2Error('ERR_UNSUPPORTED', `Unknown driver '${format}'`)
}

async function probeOrClose(host: BlockDevice): Promise<ImageFormat> {
  try {
    return await probe(host)
  } catch (error) {
    await host.close()
    throw error
  }
}

/** What `offset` and `size` leave of the bytes. */
function partOf(host: BlockDevice, part: ImageSpec['part']): BlockDevice {
  if (part === undefined) return host
  const { offset, size = Math.max(0, host.size - offset) } = part
  if (offset + size > host.size) throw new Qcow2Error('ERR_RANGE', `offset ${offset} and size ${size} reach past the ${host.size} bytes of the file`)
  return slice(host, offset, size)
}

/** The device, with the faults that `blkdebug` is asked for. */
async function failing(device: BlockDevice, { rules, configuration }: Extract<Place, { kind: 'blkdebug' }>, side: 'file' | 'guest'): Promise<BlockDevice> {
  const configured = configuration === undefined ? [] : rulesOf(await readFile(configuration, 'utf8'))
  return blkdebug(device, [...configured, ...rules], side)
}
