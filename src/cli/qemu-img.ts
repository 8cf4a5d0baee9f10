/** Called by the other name the program speaks as qemu-img does, whose lines scripts match. Owns those lines that are worded otherwise here. */

/** A failure of `command`, with the name of who speaks before it. */
export function asQemuImg(command: string, message: string): string {
  for (const [pattern, line] of usage) {
    if (pattern.test(message)) return `qemu-img ${command}: ${message.replace(pattern, line)}\nTry 'qemu-img ${command} --help' for more info`
  }
  return `qemu-img: ${other.reduce((text, [pattern, line]) => text.replace(pattern, line), message)}`
}

const commands = new Set(['amend', 'bench', 'bitmap', 'check', 'commit', 'compare', 'convert', 'create', 'dd', 'info', 'map', 'measure', 'rebase', 'resize', 'snapshot'])

/** True for a command that qemu-img has too. */
export function isQemuImgCommand(word: string | undefined): boolean {
  return word !== undefined && commands.has(word)
}

type Replacement = readonly [pattern: RegExp, line: string]

const usage: readonly Replacement[] = [
  [/^unknown option '(--[^']*)'(?! before).*/s, "unrecognized option '$1'"],
  [/^unknown option '-([^'])'.*/s, "invalid option -- '$1'"],
  [/^option '-([^-])' needs a value$/, "option requires an argument -- '$1'"],
  [/^option '(--[^']*)' needs a value$/, "option '$1' requires an argument"],
]

const other: readonly Replacement[] = [
  [/^(--\S+ expects '.*'), not '/, "$1 not '"],
  [/a running QEMU writes to this file; forceShare.*$/m, 'Failed to get shared "write" lock'],
  [/a running QEMU (writes to this file;|reads this file and wants nobody to write).*$/m, 'Failed to get "write" lock'],
  [/a running QEMU has this file for itself$/m, 'Failed to get shared "consistent read" lock'],
]
