/**
 * Options by their names. Owns the rule that one which does not exist is refused: in JavaScript a typing error would
 * otherwise go unnoticed, and `readonly` open an image for writing, `clustersize` make one that cannot be changed later.
 */

/** All names that `T` has; the compiler sees to it that none is missing. */
export type OptionNames<T> = Readonly<Record<keyof T, true>>

/**
 * Refuses options that `task` does not have. Those set to undefined are not given.
 * @throws TypeError with the names there are
 */
export function refuseUnknownOptions<T extends object>(task: string, options: T, names: OptionNames<T>): void {
  for (const [name, value] of Object.entries(options)) {
    if (value === undefined || Object.hasOwn(names, name)) continue
    throw new TypeError(`${task}: there is no option '${name}'; there are ${Object.keys(names).sort().join(', ')}`)
  }
}
