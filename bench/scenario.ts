/** What a scenario is given and what it gives back. */
import type { GroupResult, Machine, Rounds } from './harness.ts'

export interface ScenarioContext extends Rounds {
  /** Function check only: tiny sizes; figures mean nothing. */
  readonly quick: boolean
  /** Where the measured files go. The scenario removes what it makes. */
  readonly folder: string
  /** MiB of VM state moved by each run; a scenario has its own default. */
  readonly size?: number
}

export interface Figure {
  /** File name without extension. */
  readonly name: string
  readonly title: string
  readonly svg: string
}

export interface ScenarioResult {
  readonly groups: readonly GroupResult[]
  readonly figures: readonly Figure[]
  /** What did not run and why, and what the reader must know. */
  readonly notes: readonly string[]
}

export interface Scenario {
  /** As given on the command line. */
  readonly name: string
  readonly title: string
  /** A paragraph: what is compared, and how it is kept fair. */
  readonly about: string
  readonly run: (context: ScenarioContext) => Promise<ScenarioResult>
}

/** A result as it is stored: with what it was measured on. */
export interface Report extends ScenarioResult {
  readonly name: string
  readonly title: string
  readonly about: string
  readonly date: string
  readonly quick: boolean
  readonly rounds: number
  readonly seed: number
  readonly seconds: number
  readonly machine: Machine
}
