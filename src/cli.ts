#!/usr/bin/env node
/** The `qcow2` program. Owns that the signal which opens Node's debugger is taken before anything else is loaded. */
import { hearQueries } from './cli/query.ts'

hearQueries()
void import('./cli/start.ts')
