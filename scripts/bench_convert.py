# SPDX-License-Identifier: GPL-2.0-or-later
"""The rows of scripts/bench about compressed conversion"""

import glob
import itertools
import os
import random

from bench_report import difference, ratio, value_of
from bench_row import DIRECT, TIMES, Row, direct_file
from lab import (
    GIB, KIB, MIB, QEMU_IMG, TOP, DirtyMemory, Failed, Profile, RequestLog,
    SlowDisk, cached_pages, image_end, make_files_image, make_once, qemu_img,
    read_whole, remove_and_sync, run_timed, verify
)


# ---- Sources ----

def make_source(bench, name, mib, chunk):
    """A file of mib MiB; chunk(i) are the bytes of each"""
    def write(f):
        for i in range(mib):
            f.write(chunk(i))

    path = bench.path(f'{name}-{mib}.raw')
    make_once(path, write)
    return path


def ff_source(bench, mib):
    return make_source(bench, 'ff', mib, lambda i: b'\xff' * MIB)


def constant_source(bench, mib):
    """Zeros and 0xff by turns"""
    return make_source(bench, 'constant', mib,
                       lambda i: (b'\0' if i % 2 else b'\xff') * MIB)


def random_source(bench, mib):
    numbers = random.Random(1)
    return make_source(bench, 'random', mib, lambda i: numbers.randbytes(MIB))


def half_random_source(bench, mib):
    """
    Clusters of 64 KiB in random order: half of them random data, the others
    compress to 40 to 60 % of their size
    """
    numbers = random.Random(1)
    chunk = 64 * KIB

    def cluster(i):
        part = chunk if i % 2 else int(chunk * numbers.uniform(0.4, 0.6))
        return numbers.randbytes(part) + bytes(chunk - part)

    clusters = [cluster(i) for i in range(MIB // chunk * mib)]
    numbers.shuffle(clusters)
    return make_source(bench, 'half-random', mib, lambda i: b''.join(
        clusters[MIB // chunk * i:MIB // chunk * (i + 1)]))


def files_source(bench, mib):
    """A file system with files of this machine"""
    path = bench.path(f'files-{mib}.raw')
    # The file system has tables of its own
    make_files_image(path, mib, mib * 5 // 4)
    return path


def sparse_source(bench, gib, mib):
    """The same mib MiB of files at the start of each GiB, nothing else"""
    def write(f):
        with open(files_source(bench, mib), 'rb') as source:
            data = source.read()
        for i in range(gib):
            f.seek(i * GIB)
            f.write(data)
        f.truncate(gib * GIB)

    path = bench.path(f'sparse-files-{gib}-{mib}.raw')
    make_once(path, write)
    return path


def text_source(bench, mib):
    """C source: QEMU's own, in the order of the names"""
    def write(f):
        left = mib * MIB
        for name in sorted(glob.glob(os.path.join(TOP, 'qemu*', '**', '*.[ch]'),
                                     recursive=True)):
            with open(name, 'rb') as source:
                left -= f.write(source.read(left))
        if left:
            raise Failed(f'QEMU has less than {mib} MiB of C source')

    path = bench.path(f'text-{mib}.raw')
    make_once(path, write)
    return path


# ---- Conversions ----

class Conversion:
    """qemu-img convert of a source to an image that was created before"""

    def __init__(self, source, compression='zstd', cluster='64k', options=()):
        self.source = source
        self.compression = compression
        self.cluster = cluster
        self.options = options

    def create(self, path):
        if os.path.exists(path):
            os.unlink(path)
        qemu_img('create', '-q', '-f', 'qcow2', '-o',
                 f'compression_type={self.compression},'
                 f'cluster_size={self.cluster}', path,
                 str(os.path.getsize(self.source)))

    def run(self, options, cache=None, mode='none', prefix=(), compress=True):
        """options are those of the file child; cache is its size, or None."""
        if cache is not None:
            options += f',compressed-cache-size={cache}'
        took = run_timed([*prefix, QEMU_IMG, 'convert', '-n',
                          *['-c'] * compress, *self.options, '-t', mode, '-f',
                          'raw', '--target-image-opts', self.source,
                          f'driver=qcow2,{options}'])
        return {m: took[m] for m in TIMES}


class ConvertRow(Row):
    """source(bench, mib) makes the source."""

    def __init__(self, name, title, figures, source, mib, quick_mib=None,
                 repeats=5, **conversion):
        super().__init__(name, title, figures, repeats)
        self.source = source
        self.mib = mib, quick_mib or mib // 8
        self.conversion_args = conversion
        self.conversion = None

    def prepare(self, bench):
        source = self.source(bench, bench.pick(*self.mib))
        self.conversion = Conversion(source, **self.conversion_args)
        read_whole(source)


class ConvertToDisk(ConvertRow):
    """To a disk with a delay, with the cache off and on"""

    sides = ['off', 'on']

    def __init__(self, *args, delay='4ms', block=4096, repeats=3, **kwargs):
        super().__init__(*args, repeats=repeats, **kwargs)
        self.delay = delay
        self.block = block

    def measure(self, bench, side):
        path = os.path.join(bench.tmpfs, 'disk.qcow2')
        source = self.conversion.source
        self.conversion.create(path)
        os.truncate(path, 2 * os.path.getsize(source))
        with SlowDisk(['file', path], self.delay, self.block) as disk:
            result = self.conversion.run(disk.options('file.'),
                                         0 if side == 'off' else None)
        verify(source, path)
        os.unlink(path)
        return dict(result, **disk.requests())


# Programs that compress the same data with as many threads as processors, from
# $0 to $1
TOOLS = {'zstd': f'exec zstd -3 -T{os.cpu_count()} -q -c "$0" > "$1"',
         'zlib': f'exec pigz -6 -p {os.cpu_count()} -c "$0" > "$1"'}


class ConvertToFile(ConvertRow):
    """To a file with O_DIRECT and otherwise, and to a tmpfs as the limit"""

    # (folder, -t, compressed-cache-size, -c)
    SETTINGS = {'off': ('folder', 'none', 0, True),
                'on': ('folder', 'none', None, True),
                'page cache': ('folder', 'writeback', 0, True),
                'tmpfs': ('tmpfs', 'writeback', 0, True),
                'tmpfs on': ('tmpfs', 'writeback', '16M', True),
                'preallocate': ('folder', 'none', None, True),
                'without -c': ('folder', 'none', None, False)}

    SIDES = ['off', 'on', 'page cache', 'tmpfs', 'without -c']

    def __init__(self, *args, sides=None, details=False, **kwargs):
        super().__init__(*args, **kwargs)
        self.sides = sides or self.SIDES
        self.details = details

    def run_tool(self, bench):
        path = bench.path('file.packed')
        took = run_timed(['sh', '-c', TOOLS[self.conversion.compression],
                          self.conversion.source, path])
        return path, {m: took[m] for m in TIMES}

    def run(self, bench, side, prefix=()):
        if side == 'tool':
            return self.run_tool(bench)
        folder, mode, cache, compress = self.SETTINGS[side]
        path = os.path.join(getattr(bench, folder), 'file.qcow2')
        options = f'file.driver=file,file.filename={path}'
        if side == 'preallocate':
            options = ('file.driver=preallocate,' +
                       direct_file(path, 'file.file.'))
        elif mode == 'none':
            options = direct_file(path, 'file.')
        self.conversion.create(path)
        return path, self.conversion.run(options, cache, mode, prefix,
                                         compress)

    def once(self, bench, side):
        result = {}
        if side == 'tool':
            return result
        if self.details and self.SETTINGS[side][0] == 'folder':
            result = self.look_closely(bench, side)
        path, _ = self.run(bench, side)
        verify(self.conversion.source, path)
        os.unlink(path)
        return result

    def look_closely(self, bench, side):
        """What needs runs of its own"""
        path = os.path.join(bench.folder, 'file.qcow2')
        with DirtyMemory(bench.folder) as dirty:
            self.run(bench, side)
        # Before anything else reads the image
        result = {'pages': cached_pages(path), 'dirty': dirty.peak}
        log = RequestLog(path)
        self.run(bench, side, log.prefix)
        result.update(log.read(), end=image_end(path))
        profile = Profile(path)
        self.run(bench, side, profile.prefix)
        result['outside'] = 1 - profile.share(
            'libzstd' if self.conversion.compression == 'zstd' else 'libz')
        return result

    def measure(self, bench, side):
        path, result = self.run(bench, side)
        result['blocks'] = os.stat(path).st_blocks * 512
        result['idle'] = 1 - result['cpu'] / result['seconds'] / os.cpu_count()
        remove_and_sync(path)
        return result


class ConvertSizes(Row):
    """Sources of several sizes, with the same data in each GiB"""

    SIZES = 1, 4, 16
    sides = [f'{size} GiB' for size in SIZES]

    def __init__(self):
        super().__init__(
            'size-convert', f'Sparse sources with 320 MiB of files in each GiB'
            f' to {DIRECT}, zstd, with the cache',
            [ratio('16 GiB', '1 GiB', 'per_gib', at_most=1.05),
             ratio('4 GiB', '1 GiB', 'per_gib', at_most=1.05),
             ratio('16 GiB', '1 GiB', 'cpu_per_gib', at_most=1.05),
             difference('16 GiB', '1 GiB', 'memory', at_most=4 * MIB)])
        self.conversions = {}

    def prepare(self, bench):
        for size, side in zip(self.SIZES, self.sides):
            source = sparse_source(bench, size, bench.pick(256, 16))
            self.conversions[side] = Conversion(source)
            read_whole(source)

    def run(self, bench, side):
        path = bench.path('file.qcow2')
        self.conversions[side].create(path)
        return path, self.conversions[side].run(direct_file(path, 'file.'))

    def once(self, bench, side):
        path, _ = self.run(bench, side)
        verify(self.conversions[side].source, path)
        return {}

    def measure(self, bench, side):
        path, result = self.run(bench, side)
        remove_and_sync(path)
        size = int(side.split()[0])
        return dict(result, per_gib=result['seconds'] / size,
                    cpu_per_gib=result['cpu'] / size)


# ---- The rows ----

def matrix_rows():
    """Each kind of data, compressed in each way"""
    # With zstd all of them take a second or so
    data = {'files': ('files', files_source, 256, 128),
            'random': ('random data', random_source, 256, 128),
            'constant': ('zeros and 0xff', constant_source, 512, 256)}
    figures = [
        ratio('on', 'tmpfs', at_most=1.05),
        ratio('on', 'without -c', at_most=1.02),
    ]
    for (key, (text, source, *sizes)), compression, cluster, option in \
            itertools.product(data.items(), ['zlib', 'zstd'], ['64k', '2M'],
                              ['', '-W']):
        mib = sizes[compression == 'zlib']
        more = {}
        extra = []
        reach = 1.02, 1.02
        if key == 'random':
            # Of the cost of normal clusters, what the file's growing is
            more = {'sides': [*ConvertToFile.SIDES, 'preallocate']}
            extra = [ratio('preallocate', 'on'),
                     ratio('on', 'off', 'blocks', at_most=1.06)]
            if (compression, cluster) == ('zstd', '64k'):
                reach = 0.6, 0.8
        yield ConvertToFile(
            '-'.join(filter(None, ['convert', key, compression, cluster,
                                   option.strip('-').lower()])),
            f'{mib} MiB of {text} to {DIRECT}, {compression}, clusters of '
            f'{cluster.replace("k", " KiB").replace("M", " MiB")}'
            f'{", -W" if option else ""}',
            [ratio('on', 'off', at_most=reach[0]),
             ratio('on', 'page cache', at_most=reach[1]), *figures, *extra],
            source, mib,
            repeats=5 if compression == 'zstd' else 3, compression=compression,
            cluster=cluster, options=[option] if option else [], **more)


def main_rows():
    """All that there is to say about the most usual case"""
    for (compression, mib), option in itertools.product(
            [('zstd', 512), ('zlib', 128)], ['', '-W']):
        yield ConvertToFile(
            f'convert-main-{compression}{option.lower()}',
            f'{mib} MiB of files to {DIRECT}, {compression}'
            f'{", -W" if option else ""}',
            [ratio('off', 'on'),
             ratio('on', 'page cache', at_most=1.02),
             ratio('on', 'tmpfs', at_most=1.05),
             ratio('on', 'tmpfs on', at_most=1.05),
             ratio('on', 'on', 'written', 'end', at_most=1.05),
             value_of('on', 'pages', at_most=64),
             value_of('on', 'dirty'),
             value_of('page cache', 'dirty'),
             value_of('on', 'outside'),
             value_of('on', 'idle', at_most=0.05),
             ratio('on', 'tool',
                   at_most=1.2 if compression == 'zstd' else 1.15),
             ratio('on', 'tool', 'cpu',
                   at_most=1.12 if compression == 'zstd' else None),
             difference('on', 'off', 'memory', at_most=20 * MIB)],
            files_source, mib, 64, repeats=5 if compression == 'zstd' else 3,
            compression=compression, options=[option] if option else [],
            sides=['off', 'on', 'page cache', 'tmpfs', 'tmpfs on', 'tool'],
            details=True)


def disk_rows():
    for compression, option in [('zstd', ''), ('zlib', ''), ('zlib', '-W')]:
        yield ConvertToDisk(
            f'disk-ff-{compression}{option.lower()}', '128 MiB of 0xff to a'
            f' disk with 4 KiB blocks and 4 ms a request, {compression}'
            f'{", -W" if option else ""}', [ratio('off', 'on', at_least=30)],
            ff_source, 128, compression=compression,
            options=[option] if option else [])
    yield ConvertToDisk(
        'disk-ff-1000', '1000 MiB of 0xff to a disk with 4 KiB blocks and 8 ms'
        ' a request, zlib', [ratio('off', 'on')], ff_source, 1000, 16,
        compression='zlib', delay='8ms', repeats=2)
    yield ConvertToDisk(
        'disk-text', '64 MiB of C source to a disk with 4 KiB blocks and 2 ms'
        ' a request, zlib',
        [ratio('off', 'on', 'requests', at_least=25), value_of('on', 'reads'),
         ratio('off', 'on')],
        text_source, 64, compression='zlib', delay='2ms')
    for key, text, source, reach in [
            ('random', 'random data', random_source,
             ratio('off', 'on', 'requests', at_least=14)),
            ('half-random', 'clusters, half of them random data, the others'
             ' compressing to 40 to 60 %', half_random_source,
             value_of('on', 'requests', at_most=100))]:
        yield ConvertToDisk(
            f'disk-{key}', f'64 MiB of {text}, to a disk with 4 KiB blocks and'
            ' 1 ms a request, zstd', [reach, ratio('off', 'on')], source, 64,
            delay='1ms')
    for block, delay in itertools.product([512, 4 * KIB],
                                          ['0.2', '1', '4', '8']):
        yield ConvertToDisk(
            f'disk-files-{block}-{delay}ms', '32 MiB of files to a disk with '
            f'{block} bytes a block and {delay} ms a request, zstd',
            [ratio('on', 'off', at_most=1.02), ratio('off', 'on')],
            files_source, 32, block=block, delay=f'{delay}ms')


ROWS = [*main_rows(), *matrix_rows(), *disk_rows(), ConvertSizes()]
