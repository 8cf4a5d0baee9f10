/**
 * A rotational disk as a pure function: the disk's state and a request in, the state after it and the
 * times out. Owns the mechanics (rotation, seek, segment cache, read-ahead); knows nothing of devices,
 * bytes or promises. All times are microseconds of virtual time, all positions logical sectors.
 *
 * ```
 *            platter angle = time mod revolution          LBA angle = lba mod sectors per track
 *   request ──▶ command overhead ──▶ seek ──▶ wait until the LBA's angle comes round ──▶ transfer
 *               (hidden while an earlier request is still being served)
 * ```
 *
 * Tracks form one linear spiral: reading on from track to track costs nothing. The disk serves first
 * come, first served, and has no write cache: a write has completed when it is on the medium.
 */

/** What a simulated disk is made of. Times in microseconds. */
export interface DiskParameters {
  /** Revolutions per minute. */
  readonly rpm: number
  /** Logical sectors on a track; with `rpm` and `sectorSize` it sets the media rate. */
  readonly sectorsPerTrack: number
  /** Bytes of a logical sector, the smallest unit a command can name. */
  readonly sectorSize: number
  /** Bytes of a physical sector; more than `sectorSize` makes a 512e disk, which reads before it writes a part of one. */
  readonly physicalSectorSize: number
  /** Seek over at most `nearTracks` tracks. */
  readonly nearSeek: number
  /** Longest distance that counts as near. */
  readonly nearTracks: number
  /** Seek over a longer distance. */
  readonly farSeek: number
  /** From the arrival of a command at an idle disk to the first movement, and the whole cost of a cached read. */
  readonly commandOverhead: number
  /** Segments of the disk's cache, replaced least recently used first. */
  readonly segments: number
  /** Bytes of one segment. */
  readonly segmentSize: number
  /** Bytes the disk goes on reading behind a read that touched the medium; 0 switches it off. */
  readonly readAhead: number
}

/**
 * A 15,000 rpm disk of 150 MB/s. The rotation speed is fitted, not measured: with one lost turn for
 * each request it gives the 27 MB/s that unaligned VM state writes were reported to reach on such a disk.
 */
export const disk15k: DiskParameters = {
  rpm: 15_000,
  sectorsPerTrack: 1172,
  sectorSize: 512,
  physicalSectorSize: 512,
  nearSeek: 300,
  nearTracks: 64,
  farSeek: 3500,
  commandOverhead: 100,
  segments: 4,
  segmentSize: 2 << 20,
  // four fifths of a segment: the rest keeps what was read before
  readAhead: Math.round((2 << 20) * 0.8),
}

/** A run of logical sectors `[start, end)`. */
export interface SectorRange {
  readonly start: number
  readonly end: number
}

/** One command to the disk. */
export interface DiskRequest extends SectorRange {
  readonly operation: 'read' | 'write'
  /** When the command reaches the disk. Not earlier than the one before. */
  readonly issued: number
}

/** When a command was served. */
export interface DiskTimes {
  /** When the first sector passed under the head; for a cached read, when the disk turned to it. */
  readonly started: number
  readonly completed: number
  /** Answered from the segment cache without waiting for the medium. */
  readonly cached: boolean
}

/** Everything the disk remembers between two commands. */
export interface DiskState {
  /** Completion of the last command. */
  readonly free: number
  /** The sector that passes under the head at `headTime`. */
  readonly head: number
  readonly headTime: number
  /** Cached sectors, most recently used first. */
  readonly segments: readonly SectorRange[]
  /** The read-ahead under way: sector `start` passes under the head at `since`; it stops before `end`. */
  readonly ahead: (SectorRange & { readonly since: number }) | undefined
}

/** A disk at time 0 with an empty cache and its head at sector 0. */
export const diskAtRest: DiskState = { free: 0, head: 0, headTime: 0, segments: [], ahead: undefined }

/** Microseconds of one revolution. */
export function revolution(disk: DiskParameters): number {
  return 60e6 / disk.rpm
}

/** Bytes per second that pass under the head: no pattern of requests can be faster. */
export function mediaRate(disk: DiskParameters): number {
  return (disk.sectorsPerTrack * disk.sectorSize * disk.rpm) / 60
}

/** Serves one command: the state after it, and when it started and completed. */
export function serve(
  disk: DiskParameters,
  state: DiskState,
  request: DiskRequest,
): { readonly state: DiskState; readonly times: DiskTimes } {
  return request.operation === 'read' ? serveRead(disk, state, request) : serveWrite(disk, state, request)
}

function serveRead(disk: DiskParameters, state: DiskState, request: DiskRequest): ReturnType<typeof serve> {
  const missing = afterCached(state.segments, request)
  const ready = readyTime(disk, state, request)
  const arrives = missing.start === missing.end ? ready : arrivalByReadAhead(disk, state, missing)
  if (arrives <= ready + revolution(disk)) return serveCachedRead(disk, state, request, arrives)

  const stopped = stopReadAhead(disk, state, ready)
  const started = reach(disk, stopped, missing.start, ready)
  const completed = started + (missing.end - missing.start) * sectorTime(disk)
  const segments = remember(disk, stopped.segments, request)
  const readAhead = Math.floor(disk.readAhead / disk.sectorSize)
  const ahead = readAhead === 0 ? undefined : { start: missing.end, end: missing.end + readAhead, since: completed }
  return {
    state: { free: completed, head: missing.end, headTime: completed, segments, ahead },
    times: { started, completed, cached: false },
  }
}

/** When the read-ahead under way will have all of `range`; never, where it will not. */
function arrivalByReadAhead(disk: DiskParameters, state: DiskState, range: SectorRange): number {
  const { ahead } = state
  if (ahead === undefined || range.start < ahead.start || range.end > ahead.end) return Number.POSITIVE_INFINITY
  return ahead.since + (range.end - ahead.start) * sectorTime(disk)
}

/** From the cache at once, or when the read-ahead has come that far. */
function serveCachedRead(disk: DiskParameters, state: DiskState, request: DiskRequest, arrives: number): ReturnType<typeof serve> {
  const started = Math.max(request.issued, state.free)
  const completed = Math.max(started + disk.commandOverhead, arrives)
  return {
    state: { ...state, free: completed, segments: remember(disk, state.segments, request) },
    times: { started, completed, cached: true },
  }
}

function serveWrite(disk: DiskParameters, state: DiskState, request: DiskRequest): ReturnType<typeof serve> {
  const ready = readyTime(disk, state, request)
  const stopped = stopReadAhead(disk, state, ready)
  // a physical sector that is not cached must be read before a part of it is written: the write follows a turn later
  const penalty = partialPhysicalSector(disk, stopped.segments, request) ? revolution(disk) : 0
  const started = reach(disk, stopped, request.start, ready) + penalty
  const completed = started + (request.end - request.start) * sectorTime(disk)
  const segments = remember(disk, stopped.segments, request)
  return {
    state: { free: completed, head: request.end, headTime: completed, segments, ahead: undefined },
    times: { started, completed, cached: false },
  }
}

function sectorTime(disk: DiskParameters): number {
  return revolution(disk) / disk.sectorsPerTrack
}

/** The mechanism turns to a command when it is decoded and the one before is done: a queued command's overhead is hidden. */
function readyTime(disk: DiskParameters, state: DiskState, request: DiskRequest): number {
  return Math.max(request.issued + disk.commandOverhead, state.free)
}

/** When sector `lba` next passes under the head, if the head is free to move at `ready`. */
function reach(disk: DiskParameters, state: DiskState, lba: number, ready: number): number {
  if (lba === state.head && ready === state.headTime) return ready
  const arrived = ready + seekTime(disk, state.head, lba)
  const turn = disk.sectorsPerTrack
  const ahead = (lba - arrived / sectorTime(disk)) % turn
  const sectors = ahead < 0 ? ahead + turn : ahead
  // a rounding error before the sector is not a turn lost
  return turn - sectors < 1e-6 ? arrived : arrived + sectors * sectorTime(disk)
}

/** Staying on a track, and following the spiral for less than a turn, needs no seek. */
function seekTime(disk: DiskParameters, from: number, to: number): number {
  const track = (lba: number): number => Math.floor(lba / disk.sectorsPerTrack)
  const follows = to >= from && to - from < disk.sectorsPerTrack
  if (follows || track(from) === track(to)) return 0
  return Math.abs(track(from) - track(to)) <= disk.nearTracks ? disk.nearSeek : disk.farSeek
}

/** The state with its read-ahead ended at time `at`: what was read by then is cached. */
function stopReadAhead(disk: DiskParameters, state: DiskState, at: number): DiskState {
  const { ahead } = state
  if (ahead === undefined) return state
  const passed = Math.max(0, Math.floor((at - ahead.since) / sectorTime(disk)))
  const end = Math.min(ahead.end, ahead.start + passed)
  const segments = end > ahead.start ? remember(disk, state.segments, { start: ahead.start, end }) : state.segments
  const headTime = ahead.since + (end - ahead.start) * sectorTime(disk)
  return { ...state, head: end, headTime, segments, ahead: undefined }
}

/** The part of `range` behind its cached beginning. */
function afterCached(segments: readonly SectorRange[], range: SectorRange): SectorRange {
  let start = range.start
  for (let found = true; found && start < range.end; ) {
    const segment = segments.find((each) => each.start <= start && start < each.end)
    found = segment !== undefined
    if (segment !== undefined) start = Math.min(segment.end, range.end)
  }
  return { start, end: range.end }
}

/** The segments after `range` was read or written: it joins the segment it touches, or takes the oldest one's place. */
function remember(disk: DiskParameters, segments: readonly SectorRange[], range: SectorRange): readonly SectorRange[] {
  const touched = segments.find((each) => each.start <= range.end && range.start <= each.end)
  const start = Math.min(touched?.start ?? range.start, range.start)
  const end = Math.max(touched?.end ?? range.end, range.end)
  const capacity = Math.max(1, Math.floor(disk.segmentSize / disk.sectorSize))
  const latest = { start: Math.max(start, range.end - capacity), end: Math.min(end, Math.max(start, range.end - capacity) + capacity) }
  return [latest, ...segments.filter((each) => each !== touched)].slice(0, disk.segments)
}

/** Whether a write begins or ends within a physical sector whose other part is not cached. */
function partialPhysicalSector(disk: DiskParameters, segments: readonly SectorRange[], write: SectorRange): boolean {
  const group = disk.physicalSectorSize / disk.sectorSize
  const before = { start: write.start - (write.start % group), end: write.start }
  const after = { start: write.end, end: Math.ceil(write.end / group) * group }
  return [before, after].some((rest) => {
    const missing = afterCached(segments, rest)
    return missing.start < missing.end
  })
}
