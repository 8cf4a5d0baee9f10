/**
 * A postcopy destination that is not QEMU: it takes the stream apart, places pages, asks for pages when told to,
 * and complains of everything that would hang, kill or corrupt the real one.
 */
import type { Duplex } from 'node:stream'
import { ramFlag } from '../../src/migration/format.ts'
import { MigrationParser } from '../../src/migration/parser.ts'
import type { CommandRecord, MigrationRecord, RamPagesRecord } from '../../src/migration/records.ts'
import { encodeReturnPath, type ReturnPathMessage } from '../../src/migration/return-path.ts'
import type { PageSource } from '../../src/snapshot/page-source.ts'
import { duplexPair } from '../qmp/monitor.ts'

export interface FakeDestinationOptions {
  /** Pages to ask for, one after the other: block and page number. */
  readonly requests?: readonly { readonly block: string; readonly page: number }[]
  /** Ask for all of them at once, whatever has arrived. */
  readonly atOnce?: boolean
  /** Ask while the package comes, before the guest runs. */
  readonly early?: boolean
  /** Bytes in a host page. */
  readonly hostPageSize?: number
  /** Milliseconds from the end of the stream until SHUT. */
  readonly shutAfter?: number
  /** Close the connection when so many pages have arrived. */
  readonly dieAfter?: number
  /** What arrived before, on a connection that broke: this one recovers. */
  readonly before?: FakeDestination
}

/** See above. `problems` stays empty if the source does everything right. */
export class FakeDestination {
  readonly stream: Duplex
  readonly problems: string[] = []
  readonly memory = new Map<string, Uint8Array>()
  readonly received = new Map<string, Uint8Array>()
  readonly order: string[] = []
  /** Requested pages in the order in which they came, as `block:page`. */
  readonly arrivals: string[] = []
  readonly #end: Duplex
  readonly #parser: MigrationParser
  readonly #options: FakeDestinationOptions
  readonly #source: PageSource
  readonly #open = new Set<string>()
  readonly #requests: { block: string; page: number }[]
  readonly #package: Uint8Array[] = []
  #packageLeft = 0
  #pages = 0
  #running: boolean
  #listening: boolean
  #ended = false
  #shut = false

  constructor(source: PageSource, options: FakeDestinationOptions = {}) {
    const [client, end] = duplexPair()
    this.stream = client
    this.#end = end
    this.#source = source
    this.#options = options
    this.#requests = [...(options.requests ?? [])]
    const { before } = options
    this.#running = this.#listening = before !== undefined
    const blocks = source.blocks.map(({ name, length }, index) => ({ name, length, index }))
    this.#parser = new MigrationParser(
      before === undefined ? {} : { continues: { sections: [{ id: source.ramSectionId, idstr: 'ram' }], blocks } },
    )
    for (const { name, length } of blocks) {
      this.memory.set(name, before?.memory.get(name) ?? new Uint8Array(length))
      this.received.set(name, before?.received.get(name) ?? new Uint8Array(length / source.pageSize))
    }
    end.on('data', (chunk: Buffer) => this.#read(chunk))
    end.on('end', () => {
      if (!this.#ended) this.problems.push('half-closed before the end of the stream')
    })
    end.on('close', () => {
      if (this.#ended && !this.#shut) this.problems.push('closed before SHUT: QEMU 7.2 would not complete')
    })
    end.on('error', () => undefined)
  }

  #read(chunk: Buffer): void {
    if (this.#end.destroyed) return
    try {
      for (const record of this.#parser.push(new Uint8Array(chunk))) this.#take(record)
    } catch (error) {
      this.problems.push(String(error))
      this.#end.destroy()
    }
  }

  #take(record: MigrationRecord): void {
    if (this.#ended) this.problems.push(`${record.kind} behind EOF`)
    switch (record.kind) {
      case 'command':
        this.#command(record)
        break
      case 'bytes':
        if (record.of === 'package') this.#takePackage(record.bytes)
        break
      case 'section':
        if (record.type === 'full' && this.#listening) this.problems.push('device section outside the package')
        if (record.type !== 'part' || !this.#listening) this.order.push(record.type)
        if (record.type === 'end') this.#checkEnd()
        break
      case 'ram-pages':
        this.#place(record)
        break
      case 'eof':
        this.#ended = true
        this.order.push('eof')
        setTimeout(() => {
          this.#shut = true
          this.#answer({ kind: 'shut', value: 0 })
        }, this.#options.shutAfter ?? 0)
        break
    }
  }

  #command({ command }: CommandRecord): void {
    if (command.name !== 'ping') this.order.push(command.name)
    switch (command.name) {
      case 'postcopyRamDiscard':
        if (this.#packageLeft > 0 || this.#listening) this.problems.push('DISCARD behind LISTEN')
        break
      case 'ping':
        this.#answer({ kind: 'pong', value: command.value })
        break
      case 'packaged':
        if (!this.order.includes('postcopyRamDiscard')) this.problems.push('no DISCARD before the package: QEMU would deadlock')
        if (!this.order.includes('openReturnPath')) this.problems.push('no return path')
        this.#packageLeft = command.packageLength
        if (this.#options.early === true) this.#ask()
        break
      case 'recvBitmap':
        this.#answer({ kind: 'received-bitmap', block: command.block, bitmap: this.#bitmap(command.block) })
        break
      case 'postcopyResume':
        this.#answer({ kind: 'resume-ack', value: 1 })
        setImmediate(() => this.#ask())
    }
  }

  #takePackage(bytes: Uint8Array): void {
    this.#package.push(new Uint8Array(bytes))
    this.#packageLeft -= bytes.length
    if (this.#packageLeft > 0) return
    const content = Buffer.concat(this.#package)
    const { devices } = this.#source
    if (content.subarray(0, 5).toString('hex') !== '0800040000') this.problems.push('the package does not begin with LISTEN')
    if (content.subarray(-5).toString('hex') !== '0800050000') this.problems.push('the package does not end with RUN')
    if (Buffer.compare(content.subarray(5, 5 + devices.length), devices) !== 0) this.problems.push('device state is not what was saved')
    this.#listening = true
    // Loading device state takes a while; pages are placed meanwhile.
    setTimeout(() => {
      this.#running = true
      this.#answer({ kind: 'pong', value: 3 })
      this.#ask()
    }, 2)
  }

  /**
   * A real QEMU also takes pages between DISCARD and LISTEN: it copies them into plain memory and counts them as received.
   * But the guest does not run before all of them are there, so a source that sends any then wastes its time. Before the
   * DISCARD they would be wrong: the first could bring a huge page, whose zeroes stand for the pages beside it.
   */
  #place(record: RamPagesRecord): void {
    if (!this.#listening) this.problems.push('pages before LISTEN')
    const { pageSize } = this.#source
    const perHostPage = (this.#options.hostPageSize ?? pageSize) / pageSize
    const memory = this.memory.get(record.block.name)!
    const received = this.received.get(record.block.name)!
    for (let i = 0; i < record.count; i++) {
      const page = record.pageOffsets[i]! / pageSize
      const name = `${record.block.name}:${page}`
      if (received[page] === 1) this.problems.push(`page ${name} twice: QEMU would pause or exit`)
      received[page] = 1
      const zero = (record.flags[i]! & ramFlag.zero) !== 0
      if (!zero) memory.set(record.bytes.subarray(record.positions[i], record.positions[i]! + pageSize), page * pageSize)
      if (page % perHostPage !== this.#pages % perHostPage) this.problems.push(`page ${name} breaks a host page`)
      this.#pages++
      if (this.#open.delete(name)) this.arrivals.push(name)
    }
    if (this.#running && this.#pages >= (this.#options.dieAfter ?? Infinity)) this.#end.destroy()
    else if (this.#running && this.#open.size === 0) this.#ask()
  }

  #ask(): void {
    const unit = this.#options.hostPageSize ?? this.#source.pageSize
    for (;;) {
      const request = this.#requests.shift()
      if (request === undefined || this.#ended) return
      const offset = Math.floor((request.page * this.#source.pageSize) / unit) * unit
      const page = offset / this.#source.pageSize
      if (this.received.get(request.block)![page] === 1) continue
      this.#open.add(`${request.block}:${page}`)
      this.#answer({ kind: 'request-pages', block: request.block, offset, length: unit })
      if (this.#options.atOnce !== true) return
    }
  }

  #checkEnd(): void {
    if (!this.#running) this.problems.push('END before the device state is loaded: QEMU would deadlock')
    // A request that crosses END is for a page of zeroes, which completion puts there; the memory is compared later.
  }

  #bitmap(block: string): Uint8Array {
    const received = this.received.get(block)!
    const bitmap = new Uint8Array(Math.ceil(received.length / 64) * 8)
    received.forEach((state, page) => {
      if (state === 1) bitmap[page >> 3]! |= 1 << (page & 7)
    })
    return bitmap
  }

  #answer(message: ReturnPathMessage): void {
    if (!this.#end.destroyed) this.#end.write(encodeReturnPath(message))
  }
}
