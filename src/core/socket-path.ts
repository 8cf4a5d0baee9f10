/** What a unix socket's address can hold. Beyond it the system, or Node for it, cuts a path short without a word. */

/** Bytes of a path: `sun_path` less the NUL at its end, on Linux; BSD and macOS have 103. */
export const maxSocketPath = 107

/** Why `path` cannot be a unix socket's, and what to do; `undefined` if it can. */
export function socketPathProblem(path: string): string | undefined {
  const bytes = new TextEncoder().encode(path).length
  // '\0' begins a name of Linux's abstract kind; elsewhere it would end the path
  if (path.indexOf('\0', 1) >= 0) return 'a socket path must not contain a NUL'
  if (bytes <= maxSocketPath) return undefined
  return `a socket path has at most ${maxSocketPath} bytes, this one has ${bytes}: use a shorter one, relative to the working folder or through a symbolic link`
}
