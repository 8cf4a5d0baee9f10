/**
 * What the answers of the commands this library sends must have for it to read them. Owns the check of a peer's word:
 * QEMU is what a hostile guest breaks out into. Fields that may be absent end in `?`; others not listed are let pass.
 */
import { QmpError } from './error.ts'

type Shape = 'string' | 'number' | 'boolean' | 'any' | readonly [Shape] | { readonly [field: string]: Shape }

const blockImage: Shape = { 'filename': 'string', 'virtual-size': 'number', 'backing-image?': { filename: 'string' } }
const blockNode: Shape = { 'node-name?': 'string', 'drv': 'string', 'file': 'string', 'ro?': 'boolean', 'image': blockImage }
const pciDevice: Shape = { 'id': { vendor: 'number', device: 'number' }, 'pci_bridge?': { 'bus': { number: 'number' }, 'devices?': [{ id: {} }] } }
const version: Shape = { qemu: { major: 'number', minor: 'number', micro: 'number' } }

const greeting: Shape = { version, capabilities: ['string'] }

const answers: Readonly<Record<string, Shape>> = {
  'query-status': { running: 'boolean', status: 'string' },
  'query-version': version,
  'query-kvm': { enabled: 'boolean' },
  'query-cpus-fast': [{ 'qom-path': 'string' }],
  'query-pci': [{ bus: 'number', devices: [pciDevice] }],
  'qom-list': [{ name: 'string', type: 'string' }],
  'query-migrate': { 'status?': 'string', 'error-desc?': 'string', 'downtime?': 'number', 'ram?': { 'transferred?': 'number', 'total?': 'number', 'remaining?': 'number' } },
  'query-migrate-parameters': {},
  'query-migrate-capabilities': [{ capability: 'string', state: 'boolean' }],
  'query-block': [{ 'device': 'string', 'qdev?': 'string', 'inserted?': blockNode }],
  'query-named-block-nodes': [blockNode],
  'human-monitor-command': 'string',
}

/** The answer to a command, if it has what is read of it. @throws QmpError */
export function checkAnswer(command: string, value: unknown): unknown {
  const shape = Object.hasOwn(answers, command) ? answers[command]! : 'any'
  const problem = problemOf(value, shape, 'the answer')
  if (problem !== undefined) throw new QmpError(`${command}: QEMU answered in another shape: ${problem}`, { command })
  return value
}

/** True for a greeting with all that is read of it. */
export function isGreeting(value: unknown): boolean {
  return problemOf(value, greeting, '') === undefined
}

function problemOf(value: unknown, shape: Shape, path: string): string | undefined {
  if (shape === 'any') return undefined
  if (typeof shape === 'string') return typeof value === shape ? undefined : `${path} is not a ${shape}`
  if (isList(shape)) {
    if (!Array.isArray(value)) return `${path} is not an array`
    return firstProblem(value.map((item: unknown, at) => () => problemOf(item, shape[0], `${path}[${at}]`)))
  }
  if (typeof value !== 'object' || value === null || Array.isArray(value)) return `${path} is not an object`
  return firstProblem(Object.entries(shape).map(([field, inner]) => () => fieldProblem(value, field, inner, path)))
}

function fieldProblem(object: object, field: string, shape: Shape, path: string): string | undefined {
  const optional = field.endsWith('?')
  const name = optional ? field.slice(0, -1) : field
  if (!Object.hasOwn(object, name)) return optional ? undefined : `${path}.${name} is missing`
  return problemOf((object as Record<string, unknown>)[name], shape, `${path}.${name}`)
}

function firstProblem(checks: readonly (() => string | undefined)[]): string | undefined {
  for (const check of checks) {
    const problem = check()
    if (problem !== undefined) return problem
  }
  return undefined
}

function isList(shape: Shape): shape is readonly [Shape] {
  return Array.isArray(shape)
}
