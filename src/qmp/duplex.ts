/**
 * What this library asks of a two-way byte connection. A `net.Socket` and every other Node
 * `stream.Duplex` has this shape; naming it here keeps `node:` types out of the layers above.
 */

/** A two-way byte stream in the shape of Node's `stream.Duplex`. */
export interface DuplexStream {
  /** Listens to an event: `data`, `end`, `close`, `error`, `drain`. */
  on(event: string, listener: (...values: never[]) => void): unknown
  /** Ends what `on` began. */
  removeListener(event: string, listener: (...values: never[]) => void): unknown
  /**
   * False: the buffer is above its mark, wait for `drain` before writing more. `done` is called when the
   * bytes were handed on and their memory may be used again.
   */
  write(bytes: Uint8Array | string, done?: (error?: Error | null) => void): boolean
  /** Half-closes: everything written is delivered, then the peer reads the end. */
  end(): unknown
  /** Drops the connection at once. */
  destroy(error?: Error): unknown
  /** No `data` until `resume`. */
  pause(): unknown
  /** `data` again. */
  resume(): unknown
  readonly destroyed: boolean
}

/** True for an object with the methods of {@link DuplexStream}. */
export function isDuplexStream(value: unknown): value is DuplexStream {
  const candidate = value as Partial<Record<keyof DuplexStream, unknown>> | null
  return (
    typeof candidate === 'object' &&
    candidate !== null &&
    typeof candidate.on === 'function' &&
    typeof candidate.write === 'function' &&
    typeof candidate.destroy === 'function'
  )
}
