/**
 * The command lines that must behave as qemu-img 10.0 does, in the folders they run in. `img` and `io`
 * lines of `setup` are made by real QEMU; then each of `lines` runs through both programs on copies of
 * the same files.
 */
export interface Scenario {
  readonly name: string
  readonly setup?: readonly string[]
  /** Words are cut at spaces; single quotes keep them together. */
  readonly lines: readonly string[]
  /**
   * Image files have the same bytes on both sides, so that offsets, lengths and counters in the output
   * are compared too. Without it only what does not depend on where the clusters lie.
   */
  readonly sameLayout?: boolean
}

const create: readonly string[] = [
  'create -f qcow2 plain 1M',
  'create -f qcow2 odd 1000',
  'create -f qcow2 zero 0',
  'create -f qcow2 -o cluster_size=4k small 10M',
  'create -f qcow2 -o cluster_size=512 tiny 1M',
  'create -f qcow2 -o cluster_size=2M large 10G',
  'create -f qcow2 -o compat=0.10 v2 1M',
  'create -f qcow2 -o compat=v2 v2a 1M',
  'create -f qcow2 -o compat=1.1 v3 1M',
  'create -f qcow2 -o compat=v3,refcount_bits=1 r1 1M',
  'create -f qcow2 -o refcount_bits=64 r64 1M',
  'create -f qcow2 -o extended_l2=on ext 1M',
  'create -f qcow2 -o lazy_refcounts=on lazy 1M',
  'create -f qcow2 -o compression_type=zstd zstd 1M',
  'create -f qcow2 -o preallocation=metadata meta 1M',
  'create -f qcow2 -o preallocation=full full 1M',
  'create -f qcow2 -o preallocation=metadata,extended_l2=on,cluster_size=16k metaext 1M',
  'create -f qcow2 -o size=3M fromoption',
  'create -f qcow2 -o data_file=ext.data data1 1M',
  'create -f qcow2 -o data_file=raw.data,data_file_raw=on data2 1M',
  'create -q -f qcow2 quiet 1M',
  'create -f qcow2 -o cluster_size=64k -o lazy_refcounts=on twice 1M',
  'create -f raw raw.img 1M',
  'create raw2.img 1.5M',
  'create -f raw raw3.img 1000',
  'create -f qcow2 -b plain -F qcow2 over',
  'create -f qcow2 -b plain -F qcow2 overbig 4M',
  'create -f qcow2 -F raw -b raw.img overraw',
  'create -f qcow2 -o backing_file=plain,backing_fmt=qcow2 overopt',
  'create -f qcow2 -u -b missing -F qcow2 overmissing 2M',
  'create -f qcow2 suffix 1.5G',
  'create -f qcow2 suffixk 100k',
  'create -f qcow2 hex 0x100000',
  'create -f qcow2 huge 1T',
  'create -f qcow2 -o cluster_size=3 bad 1M',
  'create -f qcow2 -o cluster_size=4M bad 1M',
  'create -f qcow2 -o refcount_bits=3 bad 1M',
  'create -f qcow2 -o refcount_bits=-1 bad 1M',
  'create -f qcow2 -o compat=0.10,refcount_bits=8 bad 1M',
  'create -f qcow2 -o compat=bogus bad 1M',
  'create -f qcow2 -o compat=0.10,extended_l2=on bad 1M',
  'create -f qcow2 -o extended_l2=on,cluster_size=4k bad 1M',
  'create -f qcow2 -o nonsense=1 bad 1M',
  'create -f qcow2 -o lazy_refcounts=maybe bad 1M',
  'create -f qcow2 -o preallocation=some bad 1M',
  'create -f qcow2 -o compression_type=lzma bad 1M',
  'create -f qcow2 -o data_file_raw=on bad 1M',
  'create -f qcow2 -o cluster_size=512 bad 1P',
  'create -f qcow2 bad',
  'create -f qcow2 bad 1x',
  'create -f qcow2 bad 1E',
  'create -f qcow2 bad 1152921504606846976',
  'create -f qcow2 bad 8E',
  'create -f qcow2 bad 9223372036854775807',
  'create -f raw bad 7E', 'create -f raw -o preallocation=metadata bad 1M',
  'create -f qcow2 -o nocow=off,extent_size_hint=1M hints 1M',
  'create -f raw -o preallocation=off,extent_size_hint=0,nocow=off rawhints 1M',
  'create -f qcow2 bad -- -1',
  'create -f qcow2 bad 1M 2M',
  'create -f bogus bad 1M',
  'create -f qcow2 -b missing -F qcow2 bad',
  'create -f qcow2 -b plain bad',
  'create -f qcow2 -b plain -F bogus bad',
  'create -f raw -b plain -F qcow2 bad',
  'create -f qcow2 nodir/bad 1M',
  'create',
]

const disk = [
  'img create -f qcow2 disk 8M',
  "io -c 'write -P 1 0 1M' -c 'write -P 2 4M 100k' -c 'write -z 6M 1M' -c 'write -P 3 7M 512' disk",
]

const chain = [
  ...disk,
  'img create -f qcow2 -b disk -F qcow2 mid',
  "io -c 'write -P 4 512k 1M' -c 'write -z 4M 64k' mid",
  'img create -f qcow2 -b mid -F qcow2 top 12M',
  "io -c 'write -P 5 5M 200k' -c 'discard 0 128k' top",
]

/** Every scenario. */
const secrets = '--object secret,id=s,data=x --object secret,id=t,data=y --object secret,id=u,data=z'
const withKey = (id: string): string => `--image-opts driver=qcow2,file.filename=secret,encrypt.key-secret=${id}`

export const scenarios: readonly Scenario[] = [
  { name: 'create', lines: create },
  {
    name: 'info',
    sameLayout: true,
    setup: [
      ...chain,
      'img create -f qcow2 -o compat=0.10 v2 1M',
      'img create -f raw raw.img 3M',
      'img create -f qcow2 -o cluster_size=16k,extended_l2=on,lazy_refcounts=on,refcount_bits=8,compression_type=zstd all 1.5G',
      'img create -f qcow2 -o data_file=d.raw,data_file_raw=on data 1M',
      'img create -f qcow2 bitmaps 8M',
      'img bitmap --add bitmaps b0',
      'img bitmap --add --disable -g 32k bitmaps b1',
      'img create -f qcow2 -u -b /nonexistent/base -F qcow2 orphan 1M',
    ],
    lines: [
      'info disk', 'info --output=json disk', 'info -f qcow2 disk', 'info -U disk', 'info top', 'info --output=json top',
      'info --backing-chain top', 'info --backing-chain --output=json top', 'info v2', 'info --output=json v2', 'info raw.img', 'info --output=json raw.img',
      'info -f raw disk', 'info all', 'info --output=json all', 'info data', 'info --output=json data', 'info bitmaps',
      'info --output=json bitmaps', 'info orphan', 'info --output=json orphan', 'info --image-opts driver=qcow2,file.filename=disk',
      `info 'json:{"driver":"qcow2","file":{"driver":"file","filename":"disk"}}'`, 'info missing', 'info', 'info disk top', 'info --output=xml disk', 'info -f bogus disk',
      'info --bogus disk', 'info --backing-chain orphan', 'info ./disk', 'info file:disk', 'info -f qcow2 raw.img',
    ],
  },
  {
    name: 'snapshot',
    setup: disk,
    lines: [
      'snapshot disk', 'snapshot -l disk', 'snapshot -c one disk', 'snapshot -l disk', 'snapshot -c two disk', 'snapshot -l disk',
      'info disk', 'info --output=json disk', 'snapshot -a one disk', 'snapshot -a 2 disk', 'snapshot -d two disk', 'snapshot -l disk', 'snapshot -c three disk',
      'snapshot -d one disk', 'snapshot -q -c quiet disk', 'snapshot -a nope disk', 'snapshot -d nope disk', 'snapshot -c', 'snapshot -l missing',
      'snapshot -l -c x disk', 'snapshot -f qcow2 -l disk', 'check disk',
    ],
  },
  {
    name: 'map',
    sameLayout: true,
    setup: [...chain, 'img convert -c -O qcow2 disk packed'],
    lines: [
      'map disk', 'map --output=json disk', 'map top', 'map --output=json top', 'map mid', 'map --output=json mid', 'map --output=json packed',
      'map packed', 'map --output=json -s 512k -l 4M top', 'map -s 512k -l 1M disk', 'map --start-offset=7M --output=json disk',
      'map --output=json --max-length=64k disk', 'map missing', 'map --output=json --image-opts driver=qcow2,file.filename=top',
    ],
  },
  {
    name: 'check',
    sameLayout: true,
    setup: [...disk, 'img convert -c -O qcow2 disk packed', 'img create -f qcow2 -o cluster_size=4k broken 1M', "io -c 'write 0 64k' broken", 'img create -f raw raw.img 1M', 'damage broken'],
    lines: [
      'check disk', 'check --output=json disk', 'check packed', 'check --output=json packed', 'check -q disk', 'check broken', 'check --output=json broken',
      'check -r leaks broken', 'check broken', 'check -r all broken', 'check broken', 'check --output=json -r all disk', 'check -f raw raw.img',
      'check missing', 'check -r some disk', 'check -U disk', 'check', 'check --image-opts driver=qcow2,file.filename=disk',
    ],
  },
  {
    name: 'compare',
    sameLayout: true,
    setup: [...chain, 'img convert -O raw disk disk.raw', 'img convert -O qcow2 top flat', 'img create -f raw longer.raw 9M', 'img create -f qcow2 empty 8M'],
    lines: [
      'compare disk disk.raw', 'compare -f qcow2 -F raw disk disk.raw', 'compare -s disk disk.raw', 'compare top flat', 'compare disk top', 'compare disk mid',
      'compare -q disk mid', 'compare disk empty', 'compare empty longer.raw', 'compare -s empty longer.raw', 'compare longer.raw empty', 'compare disk missing',
      'compare missing disk', 'compare disk', 'compare -f bogus disk top', 'compare -U disk disk', 'compare -p -q disk disk.raw',
    ],
  },
  {
    name: 'convert',
    setup: [...chain, 'img snapshot -c snap disk2', 'img create -f raw raw.img 2M', "io -f raw -c 'write -P 9 64k 100k' raw.img"].filter((line) => !line.includes('disk2')),
    lines: [
      'convert -O qcow2 disk out1', 'convert -O raw disk out2', 'convert disk out3', 'convert -f qcow2 -O qcow2 top out4', 'convert -c -O qcow2 disk out5',
      'convert -O qcow2 -o cluster_size=4k disk out6', 'convert -O qcow2 -o compat=0.10 disk out7', 'convert -S 0 -O qcow2 disk out8',
      'convert -S 64k -O qcow2 disk out9', 'convert -O qcow2 raw.img out10', 'convert -f raw -O qcow2 -o extended_l2=on raw.img out11',
      'convert -O qcow2 -B disk -F qcow2 top out12', 'convert -O qcow2 -o backing_file=mid,backing_fmt=qcow2 top out13', 'convert -n -O raw disk out2',
      'convert -W -m 4 -O qcow2 disk out14', 'convert -q -O qcow2 disk out15', 'convert -O qcow2 -o preallocation=metadata disk out16',
      'convert -O qcow2 disk raw.img out17', 'convert -t none -T none -O qcow2 disk out18', 'convert -c -o compression_type=zstd -O qcow2 disk out19',
      'convert -O qcow2 missing bad', 'convert -O bogus disk bad', 'convert disk', 'convert -c -O raw disk bad', 'convert -o cluster_size=3 -O qcow2 disk bad',
      'convert -n -O qcow2 disk missing', 'convert -l nope -O qcow2 disk bad', 'convert -m 99 -O qcow2 disk bad', 'convert -B missing -F qcow2 -O qcow2 disk bad',
      'convert -S bogus -O qcow2 disk bad', 'convert -S 1000 -O qcow2 disk bad', 'convert -S 17M -O qcow2 disk bad', 'convert -S 16M -O qcow2 disk out23', 'convert --salvage -O qcow2 disk out20', 'convert -O raw -o preallocation=metadata disk bad', 'convert -O raw -o preallocation=full disk out22', 'convert --salvage -O raw disk out21', 'convert --salvage -C -O raw disk bad', 'convert --target-image-opts disk driver=raw,file.filename=bad', 'convert -t bogus disk bad',
    ],
  },
  {
    name: 'convert onto what exists, and over backing files',
    setup: [
      ...chain, "io -c 'write -z 1M 1M' top", 'img create -f qcow2 same 8M', 'img create -f qcow2 -b disk -F qcow2 over 8M', 'img create -f qcow2 -b disk -F qcow2 other 8M', 'img create -f qcow2 packed 8M',
      'img create -f qcow2 small 1M', 'img create -f raw flat 8M',
    ],
    lines: [
      'convert -n -o cluster_size=4k -O qcow2 top same', 'convert -n -o backing_file=disk -O qcow2 top same', 'convert -n -O qcow2 top same', 'convert -n -O qcow2 -B disk mid over', 'map --output=json over',
      'convert -n -O qcow2 -B disk -F qcow2 top other', 'convert -n -F qcow2 -O qcow2 mid same', 'convert -n -c -O qcow2 top packed', 'check packed', 'convert -n -c -O raw top flat', 'convert -n -O qcow2 top small',
      'convert -O qcow2 -B disk top bad', 'convert -O qcow2 -F qcow2 top bad', 'convert -O raw -B disk -F qcow2 top bad', 'convert -O raw -B disk top bad', 'convert -O raw -F qcow2 top bad',
      'convert -O qcow2 -B disk -F qcow2 -o data_file=out1.raw mid out1', 'convert -O qcow2 -B disk -F qcow2 -o extended_l2=on,preallocation=metadata mid out2', 'convert -O qcow2 -B disk -F qcow2 -o compat=0.10 mid out3',
      'convert -c -O qcow2 -o preallocation=metadata top bad', 'convert -c -O qcow2 -o preallocation=off top out4', 'convert -c -O qcow2 -o encrypt.format=luks,encrypt.key-secret=s top bad',
    ],
  },
  {
    name: 'over an encrypted image, without its key',
    setup: [...disk, 'img create -f qcow2 --object secret,id=s,data=x -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10 secret 4M', 'img create -f raw plain.raw 4M'],
    lines: [
      'create -f qcow2 -b secret -F qcow2 over', 'create -f qcow2 -b secret bad', 'info over', 'rebase -u -b plain.raw -F raw over', 'rebase -u -b secret -F qcow2 over', 'map over', 'commit over', 'measure -O qcow2 over',
      'compare over plain.raw', "rebase -b '' over", 'convert -O qcow2 over bad', 'resize over 8M', 'info --image-opts driver=qcow2,encrypt.key-secret=s,file.filename=secret',
      'info --output=json --image-opts driver=qcow2,encrypt.key-secret=s,file.filename=secret', 'info --image-opts driver=qcow2,file.filename=secret',
    ],
  },
  {
    name: 'encrypted images with their keys',
    setup: [
      'img create -f qcow2 --object secret,id=s,data=x -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10 secret 4M',
      'img create -f qcow2 --object secret,id=t,data=y -o encrypt.format=luks,encrypt.key-secret=t,encrypt.iter-time=10 -b secret -F qcow2 over 4M', 'img create -f raw plain.raw 4M', "io -f raw -c 'write -P 5 0 300k' plain.raw",
    ],
    lines: [
      'convert -n --object secret,id=s,data=x -f raw --target-image-opts plain.raw driver=qcow2,encrypt.key-secret=s,file.filename=secret', 'compare --object secret,id=s,data=x --image-opts driver=raw,file.filename=plain.raw driver=qcow2,encrypt.key-secret=s,file.filename=secret',
      'convert -n --object secret,id=s,data=x --object secret,id=t,data=y --image-opts --target-image-opts driver=raw,file.filename=plain.raw driver=qcow2,encrypt.key-secret=t,file.filename=over,backing.driver=qcow2,backing.encrypt.key-secret=s,backing.file.filename=secret',
      'commit --object secret,id=s,data=x --object secret,id=t,data=y --image-opts driver=qcow2,encrypt.key-secret=t,file.filename=over,backing.driver=qcow2,backing.encrypt.key-secret=s,backing.file.filename=secret',
      'check --object secret,id=s,data=x --image-opts driver=qcow2,encrypt.key-secret=s,file.filename=secret', 'convert --object secret,id=s,data=z -O raw --image-opts driver=qcow2,encrypt.key-secret=s,file.filename=secret bad',
      'convert --object secret,id=s,data=x -O raw --image-opts driver=qcow2,encrypt.key-secret=s,file.filename=secret out.raw',
    ],
  },
  {
    name: 'key slots',
    setup: [
      'img create -f qcow2 --object secret,id=s,data=x -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10 secret 1M', 'img create -f qcow2 plain 1M',
      'img create -f qcow2 --object secret,id=s,data=x -o encrypt.format=aes,encrypt.key-secret=s aes 1M',
    ],
    lines: [
      ...[
        'state=active', 'new-secret=t', 'state=bogus,encrypt.new-secret=t', 'state=active,encrypt.new-secret=nope', 'state=active,encrypt.new-secret=t,encrypt.keyslot=9', 'state=active,encrypt.new-secret=t,encrypt.keyslot=-1',
        'state=active,encrypt.new-secret=t,encrypt.old-secret=s', 'state=inactive', 'state=inactive,encrypt.new-secret=t', 'state=inactive,encrypt.keyslot=8', 'state=inactive,encrypt.keyslot=3', 'state=inactive,encrypt.iter-time=3,encrypt.keyslot=0',
        'state=inactive,encrypt.keyslot=0,encrypt.old-secret=s', 'state=inactive,encrypt.keyslot=0,encrypt.old-secret=t', 'iter-time=10', 'format=luks', 'state=inactive,encrypt.old-secret=s', 'state=active,encrypt.new-secret=t,encrypt.keyslot=0',
      ].map((options) => `amend ${secrets} ${withKey('s')} -o encrypt.${options}`),
      `amend ${secrets} -o encrypt.state=active,encrypt.new-secret=t secret`, `amend ${secrets} ${withKey('u')} -o encrypt.state=active,encrypt.new-secret=t`, `amend ${secrets} -o encrypt.state=active,encrypt.new-secret=t plain`,
      `amend ${secrets} --image-opts driver=qcow2,file.filename=aes,encrypt.key-secret=s -o encrypt.state=active,encrypt.new-secret=t`, 'create -f qcow2 -o encrypt.state=active bad 1M',
    ],
  },
  {
    name: 'convert snapshots and bitmaps',
    setup: [...disk, 'img snapshot -c snap disk', "io -c 'write -P 8 2M 1M' disk", 'img bitmap --add disk b0', "io -c 'write -P 8 3M 64k' disk"],
    lines: [
      'convert -l snap -O qcow2 disk s1', 'convert -l snapshot.name=snap -O qcow2 disk s2', 'convert -l snapshot.id=1 -O raw disk s3', 'convert -l 1 -O qcow2 disk s4',
      'convert --bitmaps -O qcow2 disk s5', 'info --output=json s5', 'convert --skip-broken-bitmaps -O qcow2 disk bad', 'convert --bitmaps -O raw disk bad',
    ],
  },
  {
    name: 'dd',
    setup: [...chain, 'img create -f raw raw.img 2M', "io -f raw -c 'write -P 9 64k 100k' raw.img"],
    lines: [
      'dd if=disk of=dd1', 'dd -f qcow2 -O qcow2 if=disk of=dd2', 'dd -O qcow2 bs=64k count=3 if=disk of=dd3', 'dd -f raw -O raw bs=1000 skip=7 if=raw.img of=dd4',
      'dd -f qcow2 if=top of=dd5 bs=1M skip=4', 'dd -U -O qcow2 if=disk of=dd6 bs=2M', 'dd if=disk of=dd7 bs=512 skip=1000000', 'dd if=disk of=dd8 count=0',
      'dd --image-opts if=driver=qcow2,file.filename=disk of=dd9', 'dd if=raw.img of=dd10 bs=512 bs=1k count=1', 'dd if=disk', 'dd of=bad', 'dd', 'dd if=disk of=bad bs=0', 'dd if=disk of=bad bs=x',
      'dd if=disk of=bad bs=3G', 'dd if=disk of=bad count=-1', 'dd if=disk of=bad count=1k', 'dd if=disk of=bad skip=x', 'dd if=disk of=bad wrong=1', 'dd if=disk of=bad extra',
      'dd -O bogus if=disk of=bad', 'dd -f bogus if=disk of=bad', 'dd if=missing of=bad', 'dd if=disk of=nodir/bad', 'info dd2',
    ],
  },
  {
    name: 'options of names',
    sameLayout: true,
    setup: [...disk, 'img create -f raw raw.img 4M', "io -f raw -c 'write -P 9 1M 1M' raw.img", 'img create -f qcow2 -o data_file=d.raw,data_file_raw=on data 1M', "io -c 'write 0 64k' data"],
    lines: [
      'convert --image-opts driver=raw,offset=1M,size=1M,file.driver=file,file.filename=raw.img part1', 'convert --image-opts -O qcow2 driver=raw,offset=1536k,file.filename=raw.img part2',
      'compare --image-opts driver=raw,size=1M,file.filename=raw.img driver=null-co,size=1M,read-zeroes=on', 'map data', 'map --output=json data', 'check --image-opts driver=qcow2,file.filename=disk,file.locking=off',
      'info --image-opts driver=raw,offset=1M,size=8M,file.filename=raw.img', 'convert --image-opts driver=raw,offset=1M,size=8M,file.filename=raw.img bad', 'convert --image-opts driver=null-co,size=64k,read-zeroes=on part3',
      'map --image-opts driver=qcow2,file.filename=disk,bogus=1', 'create -f qcow2 -o extended_l2=yes words 1M', 'create -f qcow2 -o lazy_refcounts=false words2 1M', 'create -f qcow2 -o lazy_refcounts=1 bad 1M',
    ],
  },
  {
    name: 'commit',
    setup: chain,
    lines: ['commit top', 'map --output=json top', 'commit -d mid', 'commit disk', 'commit -q mid', 'commit missing', 'commit -b nope top', 'commit -b disk top', 'commit'],
  },
  {
    name: 'rebase',
    setup: [...chain, 'img convert -O qcow2 disk copy', 'img create -f qcow2 other 8M', 'img create -f qcow2 -b disk -F qcow2 third', "io -c 'write -P 7 1M 1M' third", 'img create -f raw plain.raw 1M', 'img create -f qcow2 -b disk -F qcow2 squeezed', "io -c 'write -P 6 2M 1M' squeezed", 'img create -f qcow2 alone 8M', "io -c 'write -P 1 0 1M' alone", "io -c 'write -P 9 512k 3M' other"],
    lines: [
      'rebase -b other -F qcow2 third', 'info --output=json third', 'rebase -b disk -F qcow2 top', 'rebase -u -b copy -F qcow2 mid', 'rebase -b "" third', 'info --output=json third',
      'rebase -u -b "" mid', 'rebase -u -b nowhere -F qcow2 third', 'info --output=json third', 'rebase -u -b foo third', 'rebase -b missing -F qcow2 top', 'rebase missing', 'rebase', 'rebase -b "" disk',
      'rebase -b other -F qcow2 alone', 'map --output=json alone', 'map --output=json third', 'rebase -c -b other -F qcow2 squeezed', 'rebase -c -b "" squeezed', 'rebase -c -f raw -b "" plain.raw',
    ],
  },
  {
    name: 'resize',
    setup: [...disk, 'img create -f raw raw.img 1M', 'img create -f qcow2 -o cluster_size=4k small 1M', "io -c 'write -P 3 0 1M' small", 'img create -f qcow2 -o compat=0.10 v2 1M', 'img snapshot -c s v2'],
    lines: [
      'resize disk 16M', 'resize disk +1M', 'resize disk -1M', 'resize --shrink disk -1M', 'resize --shrink disk 4M', 'resize -f raw raw.img 2M', 'resize -f raw raw.img +1M',
      'resize -f raw --preallocation=metadata raw.img +1M', 'resize -f raw --preallocation=full raw.img +1M', 'resize -f raw --shrink raw.img 1M', 'resize --shrink disk -4M', 'resize --shrink disk -16M', 'resize --shrink disk 0', 'resize --preallocation=full raw.img 1M', 'resize -q disk 5M', 'resize --preallocation=metadata small 2M', 'resize --preallocation=full small +1M', 'resize --shrink small 512k', 'resize disk 1000',
      'resize disk 5M', 'resize disk x', 'resize disk', 'resize missing 1M', 'resize v2 2M', 'resize --preallocation=bogus disk 20M', 'resize disk +0', 'info --output=json disk', 'check small',
    ],
  },
  {
    name: 'bitmap',
    setup: [...disk, 'img create -f qcow2 -o compat=0.10 v2 1M', 'img create -f qcow2 src 8M', 'img bitmap --add src sb', "io -c 'write 1M 64k' src"],
    lines: [
      'bitmap --add disk b0', 'bitmap --add -g 32k disk b1', 'bitmap --add --disable disk b2', 'info --output=json disk', 'bitmap --add disk b0', 'bitmap --disable disk b0', 'bitmap --enable disk b2',
      'bitmap --clear disk b1', 'bitmap --merge b0 disk b1', 'bitmap --merge sb -b src -F qcow2 disk b1', 'bitmap --remove disk b0', 'bitmap --remove disk nope', 'bitmap --add -g 3 disk b9',
      'bitmap disk b1', 'bitmap --add v2 b', 'bitmap --add disk', 'bitmap --enable --disable disk b1', 'bitmap --add --merge b1 disk b5', 'info --output=json disk', 'check disk',
    ],
  },
  {
    name: 'measure',
    sameLayout: true,
    setup: [...chain, 'img create -f raw raw.img 3M', 'img create -f qcow2 bm 8M', 'img bitmap --add bm b0'],
    lines: [
      'measure --size 1G', 'measure --size 1G -O qcow2', 'measure -O qcow2 --size 100G --output=json', 'measure -O qcow2 -o cluster_size=512 --size 1G', 'measure -O qcow2 -o cluster_size=2M --size 1G',
      'measure -O qcow2 -o extended_l2=on --size 1G', 'measure -O qcow2 -o refcount_bits=64 --size 1G', 'measure -O qcow2 -o preallocation=full --size 1G', 'measure -O qcow2 disk',
      'measure -O qcow2 top', 'measure -O raw disk', 'measure -O qcow2 --output=json disk', 'measure -O qcow2 bm', 'measure -O qcow2', 'measure --size 1G disk', 'measure --size x', 'measure -O qcow2 missing', 'measure -O bogus --size 1G',
      'measure -O qcow2 --size 0', 'measure -f qcow2 -O qcow2 mid',
    ],
  },
  {
    name: 'amend to version 2: snapshots, and zero clusters over a backing file',
    setup: [
      'img create -f qcow2 base 4M', "io -c 'write -P 42 0 4M' base", 'img create -f qcow2 -b base -F qcow2 top', "io -c 'write -z 0 1M' top", 'img snapshot -c s top', "io -c 'write -z 2M 1M' -c 'write -P 7 512k 64k' top",
      'img create -f qcow2 sized 4M', "io -c 'write -P 3 0 128k' sized", 'img snapshot -c s sized', 'img resize -q sized 8M', 'img create -f qcow2 -b base -F qcow2 same',
    ],
    lines: [
      'amend -o compat=0.10 top', 'info --output=json top', 'compare top base', 'snapshot -a s top', 'check top', 'compare top base', 'amend -o compat=0.10 sized', 'info --output=json sized',
      'amend -o compat=0.10,size=4M sized', 'info --output=json sized', 'amend -o backing_file=base,backing_fmt=qcow2 same', 'amend -o backing_file=base same', 'amend -o backing_fmt=raw same', 'amend -o backing_file= same',
    ],
  },
  {
    name: 'amend',
    setup: [...disk, 'img create -f qcow2 -o lazy_refcounts=on lazy 1M', 'img create -f qcow2 -o compat=0.10 v2 1M', 'img create -f qcow2 -o data_file=ad.raw,data_file_raw=on data 1M', 'img create -f qcow2 -o extended_l2=on wide 1M', 'img create -f qcow2 -o compression_type=zstd zstd 1M', 'img convert -c -O qcow2 -o compression_type=zstd disk packed'],
    lines: [
      'amend -o lazy_refcounts=on disk', 'info --output=json disk', 'amend -o refcount_bits=64 disk', 'amend -o refcount_bits=16 disk', 'amend -o compat=0.10 disk', 'info --output=json disk',
      'amend -o compat=1.1 v2', 'amend -o lazy_refcounts=off lazy', 'amend -f qcow2 -o compat=0.10 lazy', 'amend -o cluster_size=4k disk', 'amend -o nonsense=1 disk', 'amend disk', 'amend -o refcount_bits=3 disk',
      'amend -o data_file_raw=off data', 'info --output=json data', 'amend -q -o compat=1.1 disk', 'amend -o size=16M disk', 'amend missing -o compat=1.1', 'check disk',
      'amend -o backing_file=x, disk', 'amend -o ,help disk', 'amend -o ,, disk',
      'amend -o backing_file=x,backing_fmt=raw disk', 'amend -o data_file=x disk', 'amend -o data_file_raw=on disk', 'amend -o data_file_raw=on data', 'amend -o compat=0.10 data',
      'amend -o compat=0.42 disk', 'amend -o compat=0.10,lazy_refcounts=on disk', 'amend -o compat=0.10,refcount_bits=8 disk', 'amend -o compat=0.10 wide', 'amend -o compat=0.10 zstd', 'info --output=json zstd', 'amend -o compat=0.10 packed',
      'amend -o size=4M,compat=0.10 disk', 'info --output=json disk', 'amend -o refcount_bits=8 disk', 'amend -o lazy_refcounts=on disk', 'amend -o size=1M disk', 'info --output=json disk', 'check disk',
    ],
  },
]
