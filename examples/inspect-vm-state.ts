// What is in a saved VM: its machine, its memory, its devices; and a page of its memory.
//   node inspect-vm-state.js STREAM
import { VmState } from 'qcow2/migration'

await using vm = await VmState.index(process.argv[2] ?? 'vm.mig')
console.log('machine', vm.machine)
for (const block of vm.ram.blocks) console.log('RAM block', block.name, block.length)
console.log('devices', vm.devices.length)

const page = await vm.ram.read('pc.ram', 0x100000, 4096)
console.log('first bytes at 1 MiB:', Buffer.from(page.subarray(0, 8)).toString('hex'))
