/** Where QEMU connects to when it sends memory, by the options `--receiver` and `--receiver-mode`. */
import { statSync } from 'node:fs'
import type { Qmp } from '../../qmp/client.ts'
import { MigrationListener } from '../../snapshot/socket.ts'
import { UsageError } from '../errors.ts'

/** The options. */
export const receiverOptions = {
  'receiver': { value: 'PATH', file: true, help: "the unix socket that QEMU connects to, which is made and removed, or an existing folder for it: for a QEMU that sees another /tmp. Default: in a new folder in the system's folder for temporary files" },
  'receiver-mode': { value: 'MODE', help: 'mode of that socket, octal, default 600: 666 for a QEMU that runs as another user (root gives the socket to that user anyway)' },
} as const

interface Values {
  readonly 'receiver': string | undefined
  readonly 'receiver-mode': string | undefined
}

/** The socket that the options ask for; undefined where they ask for none. */
export async function openReceiver(qmp: Qmp, { receiver: path, 'receiver-mode': mode }: Values): Promise<MigrationListener | undefined> {
  if (path === undefined && mode === undefined) return undefined
  const isFolder = path !== undefined && statSync(path, { throwIfNoEntry: false })?.isDirectory() === true
  return MigrationListener.open({ ...(isFolder ? { folder: path } : { path }), mode: socketMode(mode), qmp })
}

/** An octal mode. @throws UsageError for anything else */
export function socketMode(text: string | undefined): number | undefined {
  if (text === undefined) return undefined
  if (!/^0?[0-7]{3}$/.test(text)) throw new UsageError(`--receiver-mode takes three octal digits, such as 660; it is ${JSON.stringify(text)}`)
  return Number.parseInt(text, 8)
}
