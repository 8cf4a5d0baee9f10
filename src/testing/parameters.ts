/** Parameters of images, chosen by fast-check: the shapes that `qemu-img create -o` can make. */
import fc from 'fast-check'

/** The shape of an image to make. */
export interface ImageParameters {
  /** Virtual size in bytes; a multiple of 512. */
  readonly size: number
  /** Bytes, a power of two from 512 to 2 MiB. */
  readonly clusterSize: number
  readonly version: 2 | 3
  /** Width of a counter; 16 in version 2. */
  readonly refcountBits: number
  /** 32 subclusters in each cluster; version 3, clusters of at least 16 KiB. */
  readonly extendedL2: boolean
  /** Version 3 only. */
  readonly lazyRefcounts: boolean
  readonly preallocation: 'off' | 'metadata'
  /** A raw backing file of this size with these seeded bytes. */
  readonly backing: { readonly size: number; readonly seed: number } | undefined
}

/** Options of {@link imageParameters}. */
export interface ParameterConstraints {
  /** Largest virtual size in bytes; default 2 MiB. */
  readonly maxSize?: number
  /** Default: all powers of two from 512 to 65536, and rarely 2 MiB. */
  readonly clusterSizes?: readonly number[]
  /** Whether images may have a backing file, which needs a path to be stored beside; default true. */
  readonly backing?: boolean
}

/** Any valid shape, shrinking to an empty image of version 3 with QEMU's defaults. */
export function imageParameters(constraints: ParameterConstraints = {}): fc.Arbitrary<ImageParameters> {
  const maxSize = constraints.maxSize ?? 2 << 20
  const size = fc.oneof(fc.nat(Math.floor(maxSize / 512)), fc.nat(Math.floor(maxSize / 65_536)).map((n) => n * 128)).map((n) => n * 512)
  const backing = fc.record({ size, seed: fc.integer({ min: 1, max: 1000 }) })
  return fc
    .record({
      size,
      clusterSize: clusterSizes(constraints.clusterSizes),
      version: fc.oneof({ weight: 4, arbitrary: fc.constant(3 as const) }, { weight: 1, arbitrary: fc.constant(2 as const) }),
      refcountBits: fc.constantFrom(16, 1, 2, 4, 8, 32, 64),
      extendedL2: fc.boolean(),
      lazyRefcounts: fc.boolean(),
      preallocation: fc.oneof({ weight: 5, arbitrary: fc.constant('off' as const) }, { weight: 1, arbitrary: fc.constant('metadata' as const) }),
      backing: constraints.backing === false ? fc.constant(undefined) : fc.option(backing, { nil: undefined, freq: 2 }),
    })
    .map(consistent)
}

function clusterSizes(sizes: readonly number[] | undefined): fc.Arbitrary<number> {
  if (sizes !== undefined) return fc.constantFrom(...sizes)
  const usual = fc.constantFrom(65_536, 32_768, 16_384, 8192, 4096, 2048, 1024, 512)
  return fc.oneof({ weight: 30, arbitrary: usual }, { weight: 1, arbitrary: fc.constant(2 << 20) })
}

/** What the format forbids is left out. */
function consistent(parameters: ImageParameters): ImageParameters {
  const { version, clusterSize, backing } = parameters
  const extendedL2 = parameters.extendedL2 && version === 3 && clusterSize >= 16_384
  return {
    ...parameters,
    extendedL2,
    lazyRefcounts: parameters.lazyRefcounts && version === 3,
    refcountBits: version === 2 ? 16 : parameters.refcountBits,
    preallocation: backing === undefined ? parameters.preallocation : 'off',
  }
}
