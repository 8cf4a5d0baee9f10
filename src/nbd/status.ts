/**
 * The runs of a block status reply: neighbours of one state merged, cut to the request, never more
 * than a reply may hold.
 */
import type { NbdMetaContext } from './export.ts'
import type { StatusRun } from './protocol.ts'

/** Runs in one reply, 64 KiB of it; the client asks again for the rest. */
const maxRuns = 8192

/** The runs from `offset` on; with `one`, only the first. Always at least one, none past the request. */
export async function statusRuns(
  context: NbdMetaContext,
  request: { offset: number; length: number; one: boolean; signal: AbortSignal },
): Promise<StatusRun[]> {
  const { offset, length, one, signal } = request
  const runs: { length: number; flags: number }[] = []
  let left = length
  for await (const run of context.status(offset, length, { signal })) {
    const bytes = Math.min(run.length, left)
    const last = runs.at(-1)
    if (last?.flags === run.flags) last.length += bytes
    else if (runs.length === (one ? 1 : maxRuns)) break
    else runs.push({ length: bytes, flags: run.flags })
    left -= bytes
    if (left <= 0) break
  }
  if (runs.length === 0) throw new Error(`${context.name} has no state for offset ${offset}`)
  return runs
}
