/**
 * QEMU's two ways to write options: `key=value,key.sub=value` (a comma is written twice) and JSON.
 * Both become one tree; dots in keys are levels.
 */
import { UsageError } from '../errors.ts'

/** Options by key; below a key, options again. */
export interface OptionTree {
  [key: string]: string | OptionTree
}

/** `key=value` pairs in order, without making levels of dots. A key alone is `on`; `no`-prefixes are not known. */
export function keyValues(text: string, implied?: string): [string, string][] {
  if (text === '') return []
  return splitCommas(text).map((part, at) => {
    const equals = part.indexOf('=')
    if (equals > 0) return [part.slice(0, equals), part.slice(equals + 1)]
    return at === 0 && implied !== undefined ? [implied, part] : [part, 'on']
  })
}

/** As {@link keyValues}, with dots as levels. */
export function optionTree(text: string): OptionTree {
  const tree: OptionTree = {}
  for (const [key, value] of keyValues(text, 'driver')) place(tree, key, value)
  return tree
}

/**
 * The tree of a `json:` name's object.
 * @throws UsageError if it is no JSON object
 */
export function jsonTree(text: string): OptionTree {
  let value: unknown
  try {
    value = JSON.parse(doubleQuoted(text))
  } catch {
    throw new UsageError(`Could not parse the JSON options: ${text}`)
  }
  if (typeof value !== 'object' || value === null || Array.isArray(value)) throw new UsageError('Invalid JSON object given')
  const tree: OptionTree = {}
  copyInto(tree, value as Record<string, unknown>, '')
  return tree
}

/** QEMU takes strings in single quotes too. */
function doubleQuoted(text: string): string {
  return text.replace(/"(?:[^"\\]|\\.)*"|'((?:[^'\\]|\\.)*)'/gs, (whole, single: string | undefined) =>
    single === undefined ? whole : `"${single.replaceAll("\\'", "'").replace(/(?<!\\)"/g, '\\"')}"`,
  )
}

/** Parts between single commas; `,,` is a comma within a part. */
function splitCommas(text: string): string[] {
  const parts = ['']
  for (let at = 0; at < text.length; at++) {
    if (text[at] !== ',') parts[parts.length - 1]! += text[at]!
    else if (text[at + 1] === ',') {
      parts[parts.length - 1]! += ','
      at++
    } else parts.push('')
  }
  return parts.filter((part) => part !== '')
}

function copyInto(tree: OptionTree, object: Record<string, unknown>, prefix: string): void {
  for (const [key, value] of Object.entries(object)) {
    const path = prefix + key
    if (typeof value === 'object' && value !== null) copyInto(tree, value as Record<string, unknown>, `${path}.`)
    else place(tree, path, scalar(value))
  }
}

/** A JSON scalar as the other way to write options has it. */
function scalar(value: unknown): string {
  if (typeof value === 'boolean') return value ? 'on' : 'off'
  return typeof value === 'string' ? value : value === null ? '' : JSON.stringify(value)
}

function place(tree: OptionTree, path: string, value: string): void {
  const keys = path.split('.')
  let at = tree
  for (const key of keys.slice(0, -1)) {
    const below = Object.hasOwn(at, key) ? at[key] : undefined
    if (typeof below === 'string') throw new UsageError(`option '${path}' is given below '${key}', which has a value`)
    if (below === undefined) Object.defineProperty(at, key, { value: {}, enumerable: true, configurable: true, writable: true })
    at = at[key] as OptionTree
  }
  Object.defineProperty(at, keys.at(-1)!, { value, enumerable: true, configurable: true, writable: true })
}
