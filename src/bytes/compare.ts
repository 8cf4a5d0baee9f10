/** Node's comparison of bytes, which is several times as fast as a loop; a browser has nothing of the kind. */

/** 0 if `this` from `sourceStart` to `sourceEnd` holds what `target` holds from `targetStart` to `targetEnd`. */
type Compare = (this: Uint8Array, target: Uint8Array, targetStart: number, targetEnd: number, sourceStart: number, sourceEnd: number) => number

/** Undefined where there is no Node. */
export const compare: Compare | undefined = (globalThis as { Buffer?: { prototype: { compare: Compare } } }).Buffer?.prototype.compare

/** Bytes from which the call into Node pays. */
export const worthCalling = 64
