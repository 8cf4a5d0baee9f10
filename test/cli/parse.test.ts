import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { command } from '../../src/cli/command.ts'
import { UsageError } from '../../src/cli/errors.ts'
import { edits, nearest } from '../../src/cli/nearest.ts'
import { parse } from '../../src/cli/parse.ts'
import { formatSize, parseSize } from '../../src/cli/size.ts'

const sample = command({
  name: 'sample',
  summary: 'Sample',
  options: {
    format: { short: 'f', value: 'FMT', help: '' },
    quiet: { short: 'q', help: '' },
    progress: { short: 'p', value: 'STYLE', optional: true, choices: ['human', 'json'], help: '' },
    output: { value: 'FORMAT', choices: ['human', 'json'], help: '' },
    options: { short: 'o', value: 'LIST', many: true, help: '' },
    'force-share': { short: 'U', help: '' },
    'backing-chain': { aliases: ['chain'], help: '' },
    'backing-format': { short: 'F', value: 'FMT', help: '' },
  },
  arguments: [{ name: 'FILE', help: '' }, { name: 'SIZE', optional: true, help: '' }],
  examples: [],
  signedLast: true,
  run: () => Promise.resolve(0),
})

const parsed = (line: string): ReturnType<typeof parse> => parse(sample, line.split(' '))

describe('the habits of getopt', () => {
  test.each([
    ['-f qcow2 a', { format: 'qcow2' }, ['a']],
    ['-fqcow2 a', { format: 'qcow2' }, ['a']],
    ['--format=qcow2 a', { format: 'qcow2' }, ['a']],
    ['--format qcow2 a', { format: 'qcow2' }, ['a']],
    ['-qpU a', { quiet: true, progress: true, 'force-share': true }, ['a']],
    ['-qfraw a', { quiet: true, format: 'raw' }, ['a']],
    ['a -q 1M', { quiet: true }, ['a', '1M']],
    ['--progress=json a', { progress: 'json' }, ['a']],
    ['-q -- -f', { quiet: true }, ['-f']],
    ['-o a=1 -ob=2,c=3 x', { options: ['a=1', 'b=2,c=3'] }, ['x']],
    ['--backing-c a', { 'backing-chain': true }, ['a']],
    ['--chain a', { 'backing-chain': true }, ['a']],
    ['a -1M', {}, ['a', '-1M']],
    ['a -', {}, ['a', '-']],
    ['-f a -f b x', { format: 'b' }, ['x']],
  ])('%s', (line, options, args) => {
    const result = parsed(line)
    expect(result.options).toMatchObject(options)
    expect(result.args).toEqual(args)
  })

  test.each([
    ['--outptu=json a', "unknown option '--outptu'; did you mean '--output'?"],
    ['--output=xml a', "--output expects 'human' or 'json', not 'xml'"],
    ['--output=jsno a', "--output expects 'human' or 'json', not 'jsno'; did you mean 'json'?"],
    ['--backing a', "option '--backing' could be '--backing-chain' or '--backing-format'"],
    ['-z a', "unknown option '-z'"],
    ['-quite a', "unknown option '-u'"],
    ['--quiet=1 a', "option '--quiet' takes no value"],
    ['a -f', "option '-f' needs a value"],
    ['a b c', "unexpected argument 'c'"],
    ['-q', 'FILE is missing'],
  ])('%s is refused', (line, message) => {
    expect(() => parsed(line)).toThrow(UsageError)
    expect(() => parsed(line)).toThrow(message)
  })

  test('the order of the options is kept', () => {
    expect(parsed('-q -o a --output=json -ob x').order).toEqual([
      { option: 'quiet', value: undefined },
      { option: 'options', value: 'a' },
      { option: 'output', value: 'json' },
      { option: 'options', value: 'b' },
    ])
  })

  test('any words are parsed or refused with a UsageError', () => {
    const word = fc.oneof(fc.string({ maxLength: 8 }), fc.constantFrom('-f', '--format', '-q', '--', '-', '--output=json', '-o'))
    fc.assert(
      fc.property(fc.array(word, { maxLength: 6 }), (words) => {
        try {
          parse(sample, words)
        } catch (error) {
          expect(error).toBeInstanceOf(UsageError)
        }
      }),
    )
  })
})

describe('nearest word', () => {
  test.each([
    ['inof', 'info'],
    ['snapshoot', 'snapshot'],
    ['snap', 'snapshot'],
    ['cretae', 'create'],
    ['xyzzy', undefined],
    ['', undefined],
  ])('%s -> %s', (given, word) => expect(nearest(given, ['info', 'create', 'convert', 'snapshot'])).toBe(word))

  test('edits are a metric: symmetric, zero only for equals, at most the longer length', () => {
    fc.assert(
      fc.property(fc.string({ maxLength: 10 }), fc.string({ maxLength: 10 }), (a, b) => {
        expect(edits(a, b)).toBe(edits(b, a))
        expect(edits(a, b) === 0).toBe(a === b)
        expect(edits(a, b)).toBeLessThanOrEqual(Math.max(a.length, b.length))
      }),
    )
  })
})

describe('sizes', () => {
  test.each([
    ['0', 0], ['512', 512], ['512b', 512], ['1k', 1024], ['64K', 65536], ['1.5M', 1572864], ['10G', 10737418240],
    ['1T', 1099511627776], ['0x200', 512], ['0.5k', 512], ['1P', 2 ** 50], ['.5M', 524288], ['+5M', 5242880], [' 5m', 5242880],
  ])('%s is %d', (text, bytes) => expect(parseSize(text)).toBe(bytes))

  test.each(['', 'x', '1x', '-1', '1.5', '1.5b', '9E', '1 G', 'k', '1kk', '1e3', '0x5k', '5MB'])('%s is none', (text) => {
    expect(parseSize(text)).toBeUndefined()
  })

  test.each([
    [0, '0 B'], [999, '999 B'], [1000, '0.977 KiB'], [1024, '1 KiB'], [196616, '192 KiB'], [1610612736, '1.5 GiB'],
    [38253, '37.4 KiB'], [2425344, '2.31 MiB'], [1023 * 1024 - 500, '0.999 MiB'],
    [197120, '192 KiB'], [524800, '512 KiB'], [459264, '448 KiB'], [193.5 * 1024, '194 KiB'], [999.6 * 1024, '1e+03 KiB'],
  ])('%d prints as %s', (bytes, text) => expect(formatSize(bytes)).toBe(text))
})
