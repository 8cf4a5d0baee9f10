/** `Symbol.asyncDispose` for Node before 20.5; import this file before using the symbol. */
const symbols = Symbol as { asyncDispose?: symbol; dispose?: symbol }
symbols.asyncDispose ??= Symbol.for('Symbol.asyncDispose')
symbols.dispose ??= Symbol.for('Symbol.dispose')
