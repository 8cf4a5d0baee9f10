import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { UsageError } from '../../src/cli/errors.ts'
import { jsonTree, keyValues, optionTree } from '../../src/cli/image/key-values.ts'
import { parseSecrets } from '../../src/cli/image/secrets.ts'
import { parseImageOpts, parseName, parsePlace } from '../../src/cli/image/spec.ts'

describe('names', () => {
  test.each([
    ['a.qcow2', { kind: 'file', path: 'a.qcow2' }],
    ['/x/a:b.qcow2', { kind: 'file', path: '/x/a:b.qcow2' }],
    ['./a:b', { kind: 'file', path: './a:b' }],
    ['file:a.raw', { kind: 'file', path: 'a.raw' }],
    ['file:///x/a%20b', { kind: 'file', path: '/x/a b' }],
    ['nbd:unix:/tmp/s', { kind: 'nbd', address: { path: '/tmp/s' }, name: '' }],
    ['nbd:unix:/tmp/s:exportname=a b', { kind: 'nbd', address: { path: '/tmp/s' }, name: 'a b' }],
    ['nbd:localhost:10810', { kind: 'nbd', address: { host: 'localhost', port: 10810 }, name: '' }],
    ['nbd://h/x%2Fy', { kind: 'nbd', address: { host: 'h', port: 10809 }, name: 'x/y' }],
    ['nbd+unix:///e?socket=/tmp/s', { kind: 'nbd', address: { path: '/tmp/s' }, name: 'e' }],
    ['https://h/a.qcow2', { kind: 'http', url: new URL('https://h/a.qcow2') }],
  ])('%s', (name, place) => expect(parsePlace(name)).toEqual(place))

  test.each(['bogus:x', 'nbd:', 'nbd:unix', 'nbd+unix:///x'])('%s is refused', (name) => {
    expect(() => parsePlace(name)).toThrow(UsageError)
  })
})

describe('options', () => {
  test('JSON with single quotes, as QEMU takes it', () => {
    expect(jsonTree(`{'driver': 'file', "filename": "it's", 'node-name': 'say "a"', 'x': 'it\\'s', 'n': 1}`)).toEqual({
      driver: 'file', filename: "it's", 'node-name': 'say "a"', x: "it's", n: '1',
    })
  })

  test('commas written twice, dots as levels, a key alone', () => {
    expect(keyValues('a=1,,2,b,c=')).toEqual([['a', '1,2'], ['b', 'on'], ['c', '']])
    expect(optionTree('qcow2,file.filename=x,file.driver=file')).toEqual({ driver: 'qcow2', file: { filename: 'x', driver: 'file' } })
    expect(() => optionTree('a=1,a.b=2')).toThrow(UsageError)
  })

  test('any pairs survive being written and read', () => {
    const key = fc.stringMatching(/^[a-z][a-z-]{0,8}$/)
    fc.assert(
      fc.property(fc.array(fc.tuple(key, fc.string({ minLength: 1, maxLength: 10 })), { maxLength: 5 }), (pairs) => {
        const text = pairs.map(([name, value]) => `${name}=${value.replaceAll(',', ',,')}`).join(',')
        expect(keyValues(text)).toEqual(pairs)
      }),
    )
  })

  test('a prototype is out of reach', () => {
    const tree = optionTree('__proto__.polluted=yes,driver=raw')
    expect(({} as Record<string, unknown>)['polluted']).toBeUndefined()
    expect(Object.keys(tree)).toEqual(['__proto__', 'driver'])
  })

  test('json is the same tree, flat or nested', () => {
    expect(jsonTree('{"driver":"qcow2","file":{"driver":"file","filename":"x"},"read-only":true}')).toEqual(
      jsonTree('{"driver":"qcow2","file.driver":"file","file.filename":"x","read-only":"on"}'),
    )
    for (const text of ['', '[]', '1', '{']) expect(() => jsonTree(text)).toThrow(UsageError)
  })

  test('images', () => {
    expect(parseImageOpts('driver=qcow2,file.filename=x,l2-cache-size=1M')).toEqual({ shown: 'x', given: 'driver=qcow2,file.filename=x,l2-cache-size=1M', format: 'qcow2', place: { kind: 'file', path: 'x' } })
    expect(parseImageOpts('filename=x')).toEqual({ shown: 'x', given: 'filename=x', format: undefined, place: { kind: 'file', path: 'x' } })
    expect(parseImageOpts('driver=raw,file.driver=qcow2,file.file.filename=x')).toMatchObject({
      format: 'raw',
      place: { kind: 'image', spec: { format: 'qcow2', place: { kind: 'file', path: 'x' } } },
    })
    expect(parseImageOpts('driver=nbd,server.type=unix,server.path=/s,export=e')).toMatchObject({
      place: { kind: 'nbd', address: { path: '/s' }, name: 'e' },
    })
    expect(parseImageOpts('driver=nbd,server.type=unix,server.path=/s,x-dirty-bitmap=qemu:dirty-bitmap:b').place).toMatchObject({ context: 'qemu:dirty-bitmap:b' })
    expect(parseImageOpts('driver=raw,offset=1M,size=64k,file.filename=x,file.locking=off')).toMatchObject({
      shown: 'x', format: 'raw', place: { kind: 'file', path: 'x', locking: false }, part: { offset: 1 << 20, size: 65536 },
    })
    expect(parseImageOpts('driver=null-co,size=2M,read-zeroes=on').place).toEqual({ kind: 'null', size: 2 << 20 })
    expect(parseImageOpts('driver=qcow2,file.filename=x,encrypt.key-secret=s,data-file.filename=d')).toMatchObject({
      keySecret: 's',
      dataFile: { kind: 'file', path: 'd' },
    })
    expect(parseName('json:{"driver":"qcow2","file":{"driver":"file","filename":"x"},"backing":null}', undefined)).toMatchObject({ backing: null })
  })

  test.each(['driver=bogus,file.filename=x', 'driver=qcow2', 'driver=qcow2,file.filename=x,nonsense=1', 'driver=file', 'driver=qcow2,offset=1M,file.filename=x', 'driver=raw,size=x,file.filename=x'])('%s is refused', (text) => {
    expect(() => parseImageOpts(text)).toThrow(UsageError)
  })
})

test('secrets', () => {
  const secrets = parseSecrets(['secret,id=a,data=abc', 'qom-type=secret,id=b,data=YWJj,format=base64'])
  expect(Buffer.from(secrets.get('a')!).toString()).toBe('abc')
  expect(Buffer.from(secrets.get('b')!).toString()).toBe('abc')
  for (const text of ['tls-creds,id=a', 'secret,data=x', 'secret,id=a', 'secret,id=a,data=x,keyid=k']) {
    expect(() => parseSecrets([text])).toThrow(UsageError)
  }
})
