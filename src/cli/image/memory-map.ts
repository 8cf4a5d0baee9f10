/** The option `--map`: where guest memory is, as text. */
import type { PhysicalRange } from '../../migration/physical-ranges.ts'
import type { VmState } from '../../migration/vm-state.ts'
import { UsageError } from '../errors.ts'
import { parseSize } from '../size.ts'

/** The option and its help, for commands that need addresses. */
export const mapOption = {
  map: { value: 'MAP', help: "where guest memory is, if that is not certain: 'BLOCK:FROM-TO@ADDRESS,…', for example 'pc.ram:0-3G@0,pc.ram:3G-@4G'" },
} as const

/**
 * Ranges separated by commas: `BLOCK:FROM-TO@ADDRESS`, `TO` being the end of the block if it is left out, or
 * `BLOCK@ADDRESS` for a whole block.
 * @throws UsageError
 */
export function parseMemoryMap(text: string, vm: VmState): PhysicalRange[] {
  return text.split(',').map((part) => {
    const match = /^(.+?)(?::([^:@-]*)-([^:@-]*))?@([^@]+)$/.exec(part.trim())
    const problem = (detail: string): UsageError => new UsageError(`--map: '${part}': ${detail}; expected BLOCK:FROM-TO@ADDRESS`)
    if (match === null) throw problem('no range')
    const [, name = '', from = '', to = '', at = ''] = match
    const block = vm.ram.blocks.find((each) => each.name === name)
    if (block === undefined) throw problem(`no RAM block '${name}'; there are ${vm.ram.blocks.slice(0, 10).map((each) => each.name).join(', ')}`)
    const offset = from === '' ? 0 : parseSize(from)
    const end = to === '' ? block.length : parseSize(to)
    const address = parseSize(at)
    if (offset === undefined || end === undefined || address === undefined) throw problem('not a size')
    if (end <= offset || end > block.length) throw problem(`the block has ${block.length} bytes`)
    return { block: name, offset, length: end - offset, address }
  })
}
