/**
 * JSON from a file that anybody may have made. `JSON.parse` builds many times the bytes it reads where they are mostly
 * brackets and commas: what would be built is counted first.
 */

/** Levels of arrays and objects within each other. */
const maxLevels = 1024
/** Arrays, objects and their elements: a description of the largest VMs has some 100,000. */
const maxValues = 2 << 20

/**
 * The value of a JSON text.
 * @param values most arrays, objects and elements; default 2 Mi
 * @throws SyntaxError if it is no JSON, or would build too much
 */
export function parseJson(text: string, values: number = maxValues): unknown {
  let [levels, found] = [0, 0]
  for (let at = 0; at < text.length; at++) {
    switch (text.charCodeAt(at)) {
      case 0x22: // a string goes to the next quote that is not escaped
        for (at++; at < text.length && text.charCodeAt(at) !== 0x22; at++) if (text.charCodeAt(at) === 0x5c) at++
        break
      case 0x5b:
      case 0x7b:
        if (++levels > maxLevels) throw new SyntaxError(`more than ${maxLevels} levels`)
        found++
        break
      case 0x5d:
      case 0x7d:
        levels--
        break
      case 0x2c:
        found++
    }
    if (found > values) throw new SyntaxError(`more than ${values} values`)
  }
  return JSON.parse(text)
}
