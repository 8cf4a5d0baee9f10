/** `check` for people, as qemu-img 10.0 prints it. */
import type { CheckEntry } from './shapes.ts'

/** The lines of a result. */
export function checkText(result: CheckEntry): string[] {
  return [...verdict(result), ...allocation(result), ...end(result)]
}

/** What a repair did; the second pass follows. */
export function repairText(result: CheckEntry): string[] {
  const leaks = result['leaks-fixed'] ?? 0
  const corruptions = result['corruptions-fixed'] ?? 0
  if (leaks === 0 && corruptions === 0) return []
  return [
    'The following inconsistencies were found and repaired:',
    '',
    `    ${leaks} leaked clusters`,
    `    ${corruptions} corruptions`,
    '',
    'Double checking the fixed image now...',
  ]
}

function verdict(result: CheckEntry): string[] {
  const lines: string[] = []
  const { corruptions = 0, leaks = 0, 'check-errors': errors } = result
  if (corruptions === 0 && leaks === 0 && errors === 0) return ['No errors were found on the image.']
  if (corruptions > 0) {
    lines.push('', `${corruptions} errors were found on the image.`)
    lines.push('Data may be corrupted, or further writes to the image may corrupt it.')
  }
  if (leaks > 0) {
    lines.push('', `${leaks} leaked clusters were found on the image.`)
    lines.push('This means waste of disk space, but no harm to data.')
  }
  if (errors > 0) lines.push('', `${errors} internal errors have occurred during the check.`)
  return lines
}

function allocation(result: CheckEntry): string[] {
  const total = result['total-clusters'] ?? 0
  const allocated = result['allocated-clusters'] ?? 0
  if (total === 0 || allocated === 0) return []
  const percent = (part: number | undefined, whole: number): string => `${twoDecimals(((part ?? 0) * 100) / whole)}%`
  const fragmented = percent(result['fragmented-clusters'], allocated)
  const compressed = percent(result['compressed-clusters'], allocated)
  return [`${allocated}/${total} = ${percent(allocated, total)} allocated, ${fragmented} fragmented, ${compressed} compressed clusters`]
}

/** As `%.2f` of C prints it: exactly half of a hundredth goes to the even one, where `toFixed` goes up. */
function twoDecimals(value: number): string {
  const isHalfAboveEven = (value * 8) % 4 === 1
  return (isHalfAboveEven ? value - 0.005 : value).toFixed(2)
}

function end(result: CheckEntry): string[] {
  const offset = result['image-end-offset'] ?? 0
  return offset > 0 ? [`Image end offset: ${offset}`] : []
}
