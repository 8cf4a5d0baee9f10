// Opens an image that lies on a web server; only the parts that are read are fetched.
import { readFile } from 'node:fs/promises'
import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import { Qcow2Image } from 'qcow2'
import { openHttp, readAhead } from 'qcow2/block'

{
  await using image = await Qcow2Image.create('disk.qcow2', { size: 1 << 24 })
  await image.write(1_000_000, new TextEncoder().encode('from afar'))
}

// a web server that knows ranges, as they all do
const content = await readFile('disk.qcow2')
const server = createServer((request, response) => {
  const range = /bytes=(\d+)-(\d+)/.exec(request.headers.range ?? '')
  const [from, to] = range === null ? [0, content.length - 1] : [Number(range[1]), Math.min(Number(range[2]), content.length - 1)]
  const headers = { 'accept-ranges': 'bytes', etag: '"1"', 'content-length': to - from + 1, 'content-range': `bytes ${from}-${to}/${content.length}` }
  response.writeHead(range === null ? 200 : 206, headers)
  response.end(request.method === 'HEAD' ? undefined : content.subarray(from, to + 1))
})
await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))

const url = `http://127.0.0.1:${(server.address() as AddressInfo).port}/disk.qcow2`
{
  await using image = await Qcow2Image.open(readAhead(await openHttp(url)), { readOnly: true })
  console.log(new TextDecoder().decode(await image.read(1_000_000, 9)))
}
server.closeAllConnections()
server.close()
