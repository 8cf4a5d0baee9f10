#!/usr/bin/env node
/** The `qcow2` program: this process's arguments and streams to a command, its exit code back. */
import process from 'node:process'
import { main } from './cli/main.ts'
import { processTerminal } from './cli/process.ts'

void main(process.argv.slice(2), processTerminal()).then((code) => {
  process.exitCode = code
})
