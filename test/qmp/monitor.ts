/** A fake monitor at the other end of an in-memory connection. */
import { Duplex } from 'node:stream'

/** Two ends of one connection: what is written to one is read from the other. */
export function duplexPair(): [Duplex, Duplex] {
  const make = (peer: () => Duplex): Duplex =>
    new Duplex({
      allowHalfOpen: true,
      read: () => undefined,
      write: (chunk, _encoding, done) => {
        peer().push(chunk)
        done()
      },
      final: (done) => {
        peer().push(null)
        done()
      },
      destroy: (error, done) => {
        if (!peer().destroyed) peer().push(null)
        done(error)
      },
    })
  const ends: [Duplex, Duplex] = [make(() => ends[1]), make(() => ends[0])]
  return ends
}

export interface Command {
  readonly verb: 'execute' | 'exec-oob'
  readonly name: string
  readonly id: number
  readonly arguments: unknown
}

export const greeting =
  '{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "x"}, "capabilities": ["oob"]}}'

/** Speaks when told to; answers what the handler answers. */
export class FakeMonitor {
  readonly client: Duplex
  readonly commands: Command[] = []
  readonly #server: Duplex

  constructor(handler: (command: Command, monitor: FakeMonitor) => void, greet = true) {
    const [client, server] = duplexPair()
    this.client = client
    this.#server = server
    let rest = ''
    server.setEncoding('utf8').on('data', (text: string) => {
      const lines = (rest + text).split('\n')
      rest = lines.pop()!
      for (const line of lines) this.#receive(line, handler)
    })
    if (greet) this.say(greeting)
  }

  say(line: string): void {
    this.raw(`${line}\r\n`)
  }

  raw(text: string | Uint8Array): void {
    this.#server.write(text)
  }

  answer(command: Command, value: unknown): void {
    this.say(JSON.stringify({ return: value, id: command.id }))
  }

  hangUp(): void {
    this.#server.end()
  }

  #receive(line: string, handler: (command: Command, monitor: FakeMonitor) => void): void {
    const message = JSON.parse(line) as { 'execute'?: string; 'exec-oob'?: string; 'id': number; 'arguments'?: unknown }
    const name = message.execute ?? message['exec-oob']!
    const verb = message.execute === undefined ? 'exec-oob' : 'execute'
    const command: Command = { verb, name, id: message.id, arguments: message.arguments }
    this.commands.push(command)
    if (name === 'qmp_capabilities') this.answer(command, {})
    else handler(command, this)
  }
}
