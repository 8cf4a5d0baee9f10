/** The formats of images on the command line. */
import type { Context } from '../command.ts'

/** A format images can be read and made in. */
export type ImageFormat = 'qcow2' | 'raw' | 'luks'

/** All of them, as messages list them. */
export const imageFormats: readonly ImageFormat[] = ['qcow2', 'raw', 'luks']

/** True for the name of a format. */
export function isImageFormat(name: string): name is ImageFormat {
  return imageFormats.some((known) => known === name)
}

/** A name that ends in `.qcow2` for an image that will be raw, because no format was given: qemu-img's way, and rarely what is wanted. */
export function warnOfRaw({ warn, terminal }: Pick<Context, 'warn' | 'terminal'>, name: string, option: '-f' | '-O'): void {
  if (terminal.program === 'qemu-img' || !/\.qcow2?$/i.test(name)) return
  warn(`${name} becomes a raw image, because no format is given: ${option} qcow2 makes a qcow2 image, ${option} raw says that raw is meant`)
}
