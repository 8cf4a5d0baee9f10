/** The word the user may have meant. */

/** `; did you mean 'x'?` for the nearest of `words`, or nothing where none is near. */
export function didYouMean(given: string, words: readonly string[], prefix = ''): string {
  const word = nearest(given, words)
  return word === undefined ? '' : `; did you mean '${prefix}${word}'?`
}

/** The word fewest edits away, if that is less than about half of it. */
export function nearest(given: string, words: readonly string[]): string | undefined {
  let best: string | undefined
  let fewest = Infinity
  for (const word of words) {
    const distance = word.startsWith(given) && given.length > 1 ? 1 : edits(given, word)
    if (distance < fewest && distance <= Math.max(1, Math.ceil(word.length / 2) - 1)) {
      best = word
      fewest = distance
    }
  }
  return best
}

/** Insertions, deletions, replacements and swaps of neighbours that lead from `a` to `b`. */
export function edits(a: string, b: string): number {
  let before: number[] = []
  let last = Array.from({ length: b.length + 1 }, (_, at) => at)
  for (let i = 1; i <= a.length; i++) {
    const row = [i]
    for (let j = 1; j <= b.length; j++) {
      const same = a[i - 1] === b[j - 1]
      let cost = Math.min(row[j - 1]! + 1, last[j]! + 1, last[j - 1]! + (same ? 0 : 1))
      if (i > 1 && j > 1 && a[i - 1] === b[j - 2] && a[i - 2] === b[j - 1]) cost = Math.min(cost, before[j - 2]! + 1)
      row.push(cost)
    }
    before = last
    last = row
  }
  return last[b.length]!
}
