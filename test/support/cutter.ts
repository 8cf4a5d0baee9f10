/** Stands between a source and the QEMU it talks to, and cuts the connection. */
import { connect, createServer, type Socket } from 'node:net'
import { once } from 'node:events'

/** Passes what comes to the unix socket `path` on to the one at `destination`; after `bytes` it destroys both ends. */
export async function cutAfter(path: string, destination: string, bytes: number): Promise<void> {
  const server = createServer({ allowHalfOpen: true }, (near) => {
    server.close()
    const far = connect({ path: destination, allowHalfOpen: true })
    let left = bytes
    const pass = (from: Socket, to: Socket): void => {
      const cut = (): void => void to.destroy()
      from.on('end', () => to.end()).on('close', cut).on('error', cut)
    }
    pass(near, far)
    pass(far, near)
    far.pipe(near)
    near.on('data', (chunk: Buffer) => {
      far.write(chunk.subarray(0, left))
      left -= chunk.length
      if (left <= 0) near.destroy()
    })
  })
  server.listen(path)
  await once(server, 'listening')
}
