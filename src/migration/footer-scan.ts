/**
 * Finds the end of a device section whose length is not known: its footer, with something behind it
 * that looks like the next section. Only used for the small sections that some devices (virtio-mem)
 * write before RAM; whoever has the whole stream confirms the result with the VM description.
 */
import { commandNumber, sectionByte } from './format.ts'
import type { ParserInput } from './input.ts'

/** Footer (5 bytes), type, id, idstr length and the first four characters of an idstr. */
const probe = 15

/**
 * Position of the section's footer in the window, or of the first byte that cannot be judged before
 * more input is there. Throws `underrun` when that is the input's own position.
 */
export function findFooter(input: ParserInput, id: number, isIterated: (id: number) => boolean): number {
  const { bytes, view, end } = input
  for (let at = input.at; ; at++) {
    at = bytes.indexOf(sectionByte.footer, at)
    if (at === -1 || at >= end) {
      input.require(1)
      return end
    }
    if (end - at < probe) {
      if (at === input.at) input.require(probe)
      return at
    }
    if (view.getUint32(at + 1) === id && startsSection(view, at + 5, isIterated)) return at
  }
}

function startsSection(view: DataView, at: number, isIterated: (id: number) => boolean): boolean {
  switch (view.getUint8(at)) {
    case sectionByte.part:
    case sectionByte.end:
      return isIterated(view.getUint32(at + 1))
    case sectionByte.command:
      return view.getUint16(at + 1) >= commandNumber.openReturnPath && view.getUint16(at + 1) <= commandNumber.switchoverStart
    case sectionByte.start:
    case sectionByte.full:
      return looksLikeName(view, at + 5)
  }
  return false
}

function looksLikeName(view: DataView, at: number): boolean {
  const length = view.getUint8(at)
  for (let i = 1; i <= Math.min(length, 4); i++) {
    const character = view.getUint8(at + i)
    if (character < 0x20 || character > 0x7e) return false
  }
  return length > 0
}
