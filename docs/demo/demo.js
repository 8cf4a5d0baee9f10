// The page of docs/demo: opens a Blob or a URL with the browser build and shows what is in it. To try it:
// npm run build, copy dist/browser.js beside this file, and serve the folder with any web server.
import { openSource, Qcow2Image, readImageInfo, VmState, Qcow2Error } from './browser.js'

const result = document.querySelector('#result')
const drop = document.querySelector('#drop')
/** What was opened last: what comes later from something opened before is not shown. */
let turn = 0

drop.addEventListener('dragover', (event) => {
  event.preventDefault()
  drop.classList.add('over')
})
drop.addEventListener('dragleave', () => drop.classList.remove('over'))
drop.addEventListener('drop', (event) => {
  event.preventDefault()
  drop.classList.remove('over')
  const file = event.dataTransfer.files[0]
  if (file) show(file, file.name)
})
document.querySelector('#file').addEventListener('change', (event) => {
  const file = event.target.files[0]
  if (file) show(file, file.name)
})
document.querySelector('#from').addEventListener('submit', (event) => {
  event.preventDefault()
  const text = document.querySelector('#url').value
  show(new URL(text, location.href), text)
})
const asked = new URLSearchParams(location.search).get('url')
if (asked !== null) show(new URL(asked, location.href), asked)

async function show(source, name) {
  const mine = ++turn
  result.dataset.state = 'working'
  result.replaceChildren(element('p', 'Reading …'))
  const parts = []
  try {
    const device = await openSource(source, { readOnly: true })
    const magic = await device.read(0, Math.min(4, device.size))
    const isImage = magic.join() === '81,70,73,251'
    if (isImage) await imageParts(device, name, parts)
    else parts.push(...(await vmParts(device, `VM state in ${name}`)))
  } catch (error) {
    const text = Qcow2Error.is(error) ? error.message : String(error)
    const neither = Qcow2Error.is(error, 'ERR_STREAM') && error.offset === 0
    parts.push(element('p', neither ? `${name}: this is neither a qcow2 image nor a migration stream (${text})` : `${name}: ${text}`, 'error'))
  }
  if (mine !== turn) return
  result.replaceChildren(...parts)
  result.dataset.state = 'done'
}

/** Adds to `parts` as it goes: what was read before an error is shown above it. */
async function imageParts(device, name, parts) {
  const info = await readImageInfo(device)
  const facts = {
    'file length': size(device.size),
    'virtual size': size(info.virtualSize),
    version: `${info.version} (compat ${info.version === 2 ? '0.10' : '1.1'})`,
    'cluster size': size(info.clusterSize),
    'refcount bits': info.refcountBits,
    compression: info.compressionType,
    ...(info.encryption === 'none' ? {} : { encryption: info.encryption }),
    ...(info.backingFile === undefined ? {} : { 'backing file': info.backingFile }),
    ...(info.dataFile === undefined ? {} : { 'data file': info.dataFile }),
  }
  const flags = [['extended L2', info.extendedL2], ['lazy refcounts', info.lazyRefcounts], ['dirty', info.dirty], ['corrupt', info.corrupt]].filter(([, on]) => on)
  if (flags.length > 0) facts.flags = flags.map(([text]) => text).join(', ')
  parts.push(element('h2', name), definitionList(facts))
  if (info.bitmaps.length > 0) parts.push(element('h2', 'Bitmaps'), table(['name', 'granularity#', 'state'], info.bitmaps.map(({ name, granularity, inUse, auto }) => [name, size(granularity), inUse ? 'in use' : auto ? 'enabled' : 'disabled'])))
  if (info.encryption !== 'none') {
    parts.push(element('p', 'The content is encrypted: it needs Node to be read.', 'error'))
    return
  }
  // what a backing file would give cannot be read here; it shows as unallocated
  const image = await Qcow2Image.open(device, { readOnly: true, references: () => emptyDevice() })
  parts.push(element('h2', 'Allocation'), ...(await allocation(image, info.clusterSize)))
  if (info.backingFile !== undefined) parts.push(element('p', 'What is unallocated here comes from the backing file.'))
  parts.push(element('h2', 'Snapshots'))
  const snapshots = [...image.snapshots]
  if (snapshots.length === 0) parts.push(element('p', 'There are none.'))
  else parts.push(table(['id', 'name', 'date', 'disk#', 'VM state#'], snapshots.map(({ id, name, date, diskSize, vmStateSize }) => [id, name, date.toLocaleString(undefined, { dateStyle: 'medium', timeStyle: 'short' }), size(diskSize), vmStateSize === 0 ? '' : size(vmStateSize)])))
  for (const snapshot of snapshots) {
    if (snapshot.vmStateSize === 0) continue
    const opened = await image.snapshots.open(snapshot.id)
    parts.push(...(await vmParts(opened.vmState, `VM state of “${snapshot.name}”`)))
    await opened.close()
  }
}

async function vmParts(device, title) {
  const vm = await VmState.index(device, { keepOpen: true })
  const blocks = vm.ram.blocks.map((block) => {
    const counts = { data: 0, zero: 0, absent: 0 }
    for (let offset = 0; offset < block.length; offset += vm.ram.pageSize) counts[vm.ram.pageKind(block.index, offset)]++
    return [block.name, size(block.length), counts.data, counts.zero, counts.absent]
  })
  const headings = ['RAM block', 'size#', 'data pages#', 'zero pages#', 'absent#']
  // pages are absent only where the memory is in another file
  if (blocks.every((cells) => cells.at(-1) === 0)) for (const cells of [headings, ...blocks]) cells.pop()
  const facts = { machine: vm.machine ?? 'not recorded', 'page size': size(vm.ram.pageSize), stream: size(vm.streamLength), devices: vm.devices.length, ...(vm.capabilities.length === 0 ? {} : { capabilities: vm.capabilities.join(', ') }) }
  const parts = [element('h2', title), definitionList(facts), table(headings, blocks)]
  const devices = new Map()
  for (const { name } of vm.devices) devices.set(name, (devices.get(name) ?? 0) + 1)
  parts.push(element('p', `Devices: ${[...devices].map(([name, count]) => (count === 1 ? name : `${name} ×${count}`)).join(', ')}`))
  return parts
}

const kinds = { data: 'data', compressed: 'compressed', zero: 'zeroes', unallocated: 'unallocated' }

/** The disk from left to right, top to bottom, in at most a thousand squares of whole clusters. */
async function allocation(image, clusterSize) {
  const columns = innerWidth < 600 ? 32 : 64
  const perCell = Math.max(1, Math.ceil(image.size / 1024 / clusterSize)) * clusterSize
  const cells = Math.ceil(image.size / perCell)
  const rows = Math.max(1, Math.ceil(cells / columns))
  const weight = { data: new Float64Array(cells), compressed: new Float64Array(cells), zero: new Float64Array(cells), unallocated: new Float64Array(cells) }
  const totals = { data: 0, compressed: 0, zero: 0, unallocated: 0 }
  for await (const { start, length, kind } of image.map()) {
    totals[kind] += length
    for (let at = start; at < start + length; ) {
      const cell = Math.floor(at / perCell)
      const end = Math.min(start + length, (cell + 1) * perCell)
      weight[kind][cell] += end - at
      at = end
    }
  }
  const svg = document.createElementNS('http://www.w3.org/2000/svg', 'svg')
  svg.id = 'map'
  svg.setAttribute('viewBox', `0 0 ${columns * 10} ${rows * 10}`)
  svg.setAttribute('role', 'img')
  svg.setAttribute('aria-label', `Allocation of the disk: ${Object.entries(totals).map(([kind, bytes]) => `${kinds[kind]} ${size(bytes)}`).join(', ')}`)
  for (let cell = 0; cell < cells; cell++) {
    // data is what people look for: any of it in a cell shows
    const kind = Object.keys(kinds).find((each) => weight[each][cell] > 0) ?? 'unallocated'
    const rect = document.createElementNS(svg.namespaceURI, 'rect')
    for (const [name, value] of Object.entries({ x: (cell % columns) * 10, y: Math.floor(cell / columns) * 10, width: 9, height: 9, rx: 1.5 })) rect.setAttribute(name, value)
    rect.style.fill = `var(--${kind === 'unallocated' ? 'empty' : kind})`
    const title = document.createElementNS(svg.namespaceURI, 'title')
    title.textContent = `${size(cell * perCell)}: ${Object.keys(kinds).filter((each) => weight[each][cell] > 0).map((each) => `${kinds[each]} ${size(weight[each][cell])}`).join(', ')}`
    rect.append(title)
    svg.append(rect)
  }
  const legend = element('div', '', 'legend')
  for (const [kind, text] of Object.entries(kinds)) {
    const item = element('span', '')
    const swatch = document.createElement('i')
    swatch.style.background = `var(--${kind === 'unallocated' ? 'empty' : kind})`
    item.append(swatch, `${text} ${size(totals[kind])}`)
    legend.append(item)
  }
  legend.append(element('span', `one square is ${size(perCell)}`))
  return [svg, legend]
}

function emptyDevice() {
  return openSource(new Uint8Array(0), { readOnly: true })
}

function size(bytes) {
  const units = ['B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB']
  let unit = 0
  while (bytes >= 1000 && unit < units.length - 1) {
    bytes /= 1024
    unit++
  }
  return `${Number(bytes.toPrecision(3))} ${units[unit]}`
}

function element(tag, text, className) {
  const made = document.createElement(tag)
  made.textContent = text
  if (className) made.className = className
  return made
}

function definitionList(facts) {
  const list = element('dl', '', 'facts')
  for (const [term, value] of Object.entries(facts)) {
    const row = document.createElement('div')
    row.append(element('dt', term), element('dd', String(value)))
    list.append(row)
  }
  return list
}

/** A table; headings that end in # are numbers. */
function table(headings, rows) {
  const made = document.createElement('table')
  const numeric = headings.map((heading) => heading.endsWith('#'))
  const line = (tag, cells) => {
    const row = document.createElement('tr')
    cells.forEach((cell, at) => row.append(element(tag, String(cell), numeric[at] ? 'n' : '')))
    return row
  }
  made.append(line('th', headings.map((heading) => heading.replace('#', ''))), ...rows.map((row) => line('td', row)))
  const scroll = element('div', '', 'scroll')
  scroll.append(made)
  return scroll
}
