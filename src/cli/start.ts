/** This process's arguments and streams to a command, its exit code back. */
import process from 'node:process'
import { main } from './main.ts'
import { commandLine, leave, processTerminal } from './process.ts'

const terminal = processTerminal()

void main(commandLine(), terminal).then((code) => {
  // what was interrupted may have left a wait that nothing ends
  if (terminal.signal.aborted) leave(code)
  process.exitCode = code
})
