/** Shell completions, made from the same definitions as `--help`. */
import type { CommandDefinition } from './command.ts'
import { withNested } from './reference.ts'

/** The shells that have completions. */
export const shells = ['bash', 'zsh', 'fish'] as const

/** The script a user sources. */
export function completion(shell: (typeof shells)[number], commands: readonly CommandDefinition[]): string {
  const all = commands.flatMap((definition) => withNested(definition))
  switch (shell) {
    case 'bash':
      return bash(commands, all)
    case 'zsh':
      return `#compdef qcow2\nautoload -U +X bashcompinit && bashcompinit\n${bash(commands, all)}`
    case 'fish':
      return fish(commands, all)
  }
}

type Named = ReturnType<typeof withNested>[number]

function bash(commands: readonly CommandDefinition[], all: readonly Named[]): string {
  const cases = all.map(({ path, definition }) => {
    const words = [...(definition.commands ?? []).map(({ name }) => name), ...optionWords(definition)]
    return `    '${path}') words='${words.join(' ')}' ;;`
  })
  const nested = commands.filter(({ commands }) => commands !== undefined).map(({ name }) => name)
  return `_qcow2() {
  local current=\${COMP_WORDS[COMP_CWORD]} path=\${COMP_WORDS[1]} words='' line
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W '${commands.map(({ name }) => name).join(' ')} --help --version' -- "$current"))
    return
  fi
  case " ${nested.join(' ')} " in
    *" $path "*) [ "$COMP_CWORD" -gt 2 ] && path="$path \${COMP_WORDS[2]}" ;;
  esac
  case $path in
${cases.join('\n')}
  esac
  case $current in
    -*) COMPREPLY=($(compgen -W "$words" -- "$current")) ;;
    *)
      # a line each: names may have blanks
      COMPREPLY=()
      while IFS= read -r line; do COMPREPLY+=("$line"); done < <(compgen -f -- "$current"; compgen -W "\${words//-*/}" -- "$current")
      ;;
  esac
}
complete -o filenames -F _qcow2 qcow2
`
}

function fish(commands: readonly CommandDefinition[], all: readonly Named[]): string {
  const lines = commands.map(({ name, summary }) => `complete -c qcow2 -n __fish_use_subcommand -f -a ${name} -d ${quote(summary)}`)
  for (const { path, definition } of all) {
    const seen = path.split(' ').map((word) => `__fish_seen_subcommand_from ${word}`).join('; and ')
    for (const { name, summary } of definition.commands ?? []) {
      lines.push(`complete -c qcow2 -n ${quote(seen)} -f -a ${name} -d ${quote(summary)}`)
    }
    for (const [name, option] of Object.entries(definition.options)) {
      const short = option.short === undefined ? '' : ` -s ${option.short}`
      const value = option.value === undefined ? '' : option.choices === undefined ? ' -r' : ` -x -a ${quote(option.choices.join(' '))}`
      lines.push(`complete -c qcow2 -n ${quote(seen)} -l ${name}${short}${value} -d ${quote(option.help)}`)
    }
  }
  return `${lines.join('\n')}\n`
}

function optionWords(definition: CommandDefinition): string[] {
  return [...Object.entries(definition.options).flatMap(([name, { short }]) => [`--${name}`, ...(short === undefined ? [] : [`-${short}`])]), '--help']
}

function quote(text: string): string {
  return `'${text.replaceAll('\\', '\\\\').replaceAll("'", "\\'")}'`
}
