# SPDX-License-Identifier: GPL-2.0-or-later
"""
The rows of scripts/bench. A row is an object with

name, title    for the user; the name begins with the name of its group
sides          the names of the ways in which the same work is done
figures        what is made of the medians
repeats        how often each side is measured, unless it is a quick run
prepare()      makes what all sides need
once()         what is measured (or verified) only once; a dict as below
measure()      does the work in one way; returns a dict with values for some of
               bench_report.METRICS, 'seconds' always among them
"""

import glob
import json
import os
import subprocess

from bench_report import difference, ratio, value_of
from lab import (
    KIB, MIB, QEMU_IMG, TOP, Failed, RequestLog, SlowDisk, StorageDaemon,
    cached_pages, image_end, make_files_image, qemu_img, run_timed, verify
)

TIMES = 'seconds', 'cpu', 'memory'


class Row:
    def __init__(self, name, title, figures, repeats=5):
        self.name = name
        self.title = title
        self.figures = figures
        self.repeats = repeats

    def prepare(self, bench):
        pass

    def once(self, _bench, _side):
        return {}


# ---- The filter ----

def direct_file(path, prefix=''):
    return (f'{prefix}driver=file,{prefix}filename={path},'
            f'{prefix}cache.direct=on')


class FilterRow(Row):
    """Work on a disk, or a file with O_DIRECT, without and with the filter"""

    sides = ['without', 'with']

    @staticmethod
    def node(side, options):
        """options(prefix) are the options of the node without the filter."""
        return (f'driver=seqcache,{options("file.")}' if side == 'with'
                else options(''))


class FilterSteps(FilterRow):
    """Sequential requests of one size, one at a time, by qemu-img bench"""

    def __init__(self, name, title, figures, size, count, quick_count,
                 disk=False, write=True, repeats=5):
        super().__init__(name, title, figures, repeats)
        self.size = size
        self.count = count
        self.quick_count = quick_count
        self.disk = disk
        self.write = write

    def run(self, bench, side, options):
        count = bench.pick(self.count, self.quick_count)
        took = run_timed([QEMU_IMG, 'bench', *['-w'] * self.write, '-t', 'none',
                          '-d', '1', '-s', str(self.size), '-c', str(count),
                          '--image-opts', self.node(side, options)])
        return {m: took[m] for m in TIMES}

    def prepare(self, bench):
        if not self.disk:
            make_direct_file(bench)

    def measure(self, bench, side):
        if not self.disk:
            path = bench.path(DIRECT_FILE)
            return self.run(bench, side, lambda p: direct_file(path, p))
        with SlowDisk(['memory', '512M'], '4ms') as disk:
            result = self.run(bench, side, disk.options)
        return dict(result, **disk.requests())


DIRECT_FILE = 'direct.raw'
DIRECT_FILE_MIB = 512


def make_direct_file(bench):
    """A file of which every block was written"""
    path = bench.path(DIRECT_FILE)
    size = DIRECT_FILE_MIB * MIB
    if not os.path.exists(path) or os.path.getsize(path) != size:
        qemu_img('create', '-q', '-f', 'raw', path, str(size))
    if os.stat(path).st_blocks * 512 < size:
        qemu_img('bench', '-q', '-w', '-t', 'none', '-s', '1M', '-c',
                 str(DIRECT_FILE_MIB), '-f', 'raw', path)


def fio(uri, *options):
    """Run fio on an export; returns its times."""
    took = run_timed(['fio', '--name=job', '--ioengine=nbd', f'--uri={uri}',
                      '--output-format=json', '--randseed=1', '--bs=4k',
                      *options])
    output = took['output']
    job = json.loads(output[output.index('{'):])['jobs'][0]
    # Without the time that fio itself needs to begin and to end
    return {'seconds': job['job_runtime'] / 1000}


class FilterRandom(FilterRow):
    """4 KiB requests anywhere, through an NBD export, by fio"""

    def __init__(self, name, title, figures, rw, mib, repeats=5):
        super().__init__(name, title, figures, repeats)
        self.rw = rw
        self.mib = mib

    def prepare(self, bench):
        make_direct_file(bench)

    def measure(self, bench, side):
        path = bench.path(DIRECT_FILE)
        node = self.node(side, lambda p: direct_file(path, p))
        with StorageDaemon(node) as daemon:
            return fio(daemon.uri, f'--rw={self.rw}', '--end_fsync=1',
                       f'--size={DIRECT_FILE_MIB}M',
                       f'--io_size={bench.pick(self.mib, 8)}M')


class FilterReadCached(FilterRow):
    """Reads of what the cache holds, which is not on the disk"""

    def prepare(self, bench):
        make_direct_file(bench)

    def measure(self, bench, side):
        path = bench.path(DIRECT_FILE)
        reads = bench.pick(128, 16) * MIB // 4096
        node = self.node(side, lambda p: direct_file(path, p))
        with StorageDaemon(node) as daemon:
            # Less than what is worth a request to the disk
            fio(daemon.uri, '--rw=write', '--size=900k')
            times = fio(daemon.uri, '--rw=randread', '--norandommap',
                        '--offset=64k', '--size=768k',
                        f'--io_size={reads * 4}k')
            stats = daemon.qmp('query-blockstats', **{'query-nodes': True})
        for node in stats:
            if node['node-name'] == 'disk' and side == 'with' and \
                    node['driver-specific']['read-hits'] < reads:
                raise Failed('the data was not cached')
        return times


class FilterStreams(Row):
    """The same bytes in one sequential stream and in eight, with the filter"""

    sides = ['1 stream', '8 streams']

    def measure(self, bench, side):
        mib = bench.pick(256, 128)
        streams = int(side.split()[0])
        with SlowDisk(['memory', '512M']) as disk:
            with StorageDaemon(f'driver=seqcache,{disk.options("file.")}') as \
                    daemon:
                times = fio(daemon.uri, '--rw=write', f'--numjobs={streams}',
                            f'--size={mib // streams}M',
                            f'--offset_increment={mib // streams}M')
        return dict(times, **disk.requests())


# ---- Compressed conversion ----

def text_source(bench):
    """64 MiB of C source: QEMU's own, in the order of the names"""
    path = bench.path('text.raw')
    left = 64 * MIB
    if os.path.exists(path):
        return path
    with open(path + '.new', 'wb') as out:
        for name in sorted(glob.glob(os.path.join(TOP, 'qemu', '**', '*.[ch]'),
                                     recursive=True)):
            with open(name, 'rb') as f:
                left -= out.write(f.read(left))
    if left:
        raise Failed('QEMU has less than 64 MiB of C source')
    os.rename(path + '.new', path)
    return path


def ff_source(bench):
    path = bench.path(f'ff-{bench.pick(128, 16)}.raw')
    if not os.path.exists(path):
        with open(path, 'wb') as f:
            for _ in range(bench.pick(128, 16)):
                f.write(b'\xff' * MIB)
    return path


def files_source(bench):
    mib = bench.pick(512, 64)
    path = bench.path(f'files-{mib}.raw')
    # The file system has tables of its own
    make_files_image(path, mib, mib * 5 // 4)
    return path


class ConvertRow(Row):
    """qemu-img convert -c of a source to an image that was created before"""

    def __init__(self, name, title, figures, source, compression='zstd',
                 options=(), repeats=5):
        super().__init__(name, title, figures, repeats)
        self.source = source
        self.compression = compression
        self.options = options

    def prepare(self, bench):
        with open(self.source(bench), 'rb') as f:
            while f.read(MIB):
                pass    # into the page cache

    def create(self, bench, path):
        if os.path.exists(path):
            os.unlink(path)
        qemu_img('create', '-q', '-f', 'qcow2', '-o',
                 f'compression_type={self.compression}', path,
                 str(os.path.getsize(self.source(bench))))

    def convert(self, bench, options, cache=None, mode='none', prefix=()):
        if cache is not None:
            options += f',compressed-cache-size={cache}'
        took = run_timed([*prefix, QEMU_IMG, 'convert', '-n', '-c',
                          *self.options, '-t', mode, '-f', 'raw',
                          '--target-image-opts', self.source(bench),
                          f'driver=qcow2,{options}'])
        return {m: took[m] for m in TIMES}


class ConvertToDisk(ConvertRow):
    """To a disk with a delay, with the cache off and on"""

    sides = ['off', 'on']

    def __init__(self, *args, delay='4ms', **kwargs):
        super().__init__(*args, **kwargs, repeats=3)
        self.delay = delay

    def measure(self, bench, side):
        path = os.path.join(bench.tmpfs, 'disk.qcow2')
        self.create(bench, path)
        os.truncate(path, 2 * os.path.getsize(self.source(bench)))
        with SlowDisk(['file', path], self.delay) as disk:
            result = self.convert(bench, disk.options('file.'),
                                  0 if side == 'off' else None)
        verify(self.source(bench), path)
        os.unlink(path)
        return dict(result, **disk.requests())


class ConvertToFile(ConvertRow):
    """To a file with O_DIRECT; and to a tmpfs, which has no O_DIRECT"""

    # (folder, compressed-cache-size)
    SETTINGS = {'off': ('folder', 0), 'on': ('folder', None),
                'tmpfs off': ('tmpfs', 0), 'tmpfs on': ('tmpfs', '16M')}
    sides = list(SETTINGS)

    def run(self, bench, side, prefix=lambda path: ()):
        folder, cache = self.SETTINGS[side]
        direct = folder == 'folder'
        path = os.path.join(getattr(bench, folder), 'file.qcow2')
        options = f'file.driver=file,file.filename={path}'
        if direct:
            options = direct_file(path, 'file.')
        self.create(bench, path)
        return path, self.convert(bench, options, cache,
                                  'none' if direct else 'writeback',
                                  prefix(path))

    def once(self, bench, side):
        if self.SETTINGS[side][0] != 'folder':
            return {}
        log = None

        def prefix(path):
            nonlocal log
            log = RequestLog(path)
            return log.prefix

        path, _ = self.run(bench, side, prefix)
        # Before anything else reads the image
        result = dict(log.read(), pages=cached_pages(path))
        result['end'] = image_end(path)
        verify(self.source(bench), path)
        os.unlink(path)
        return result

    def measure(self, bench, side):
        path, result = self.run(bench, side)
        os.unlink(path)
        # Else the next run, of another side, pays for it
        subprocess.run(['sync', '-f', os.path.dirname(path)], check=True)
        return result


def figures_of_convert_to_file():
    return [
        ratio('on', 'tmpfs off', at_most=1.05),
        ratio('off', 'on'),
        ratio('on', 'on', 'written', 'end', at_most=1.05),
        value_of('on', 'pages', at_most=64),
        difference('on', 'off', 'memory', at_most=20 * MIB),
    ]


# ---- Questions for block status ----

def sparse_file(bench, extents, mib=2048):
    """A file with that many extents, half of them holes of the same size"""
    path = bench.path(f'sparse-{extents}.raw')
    step = mib * MIB // (extents // 2)
    if not os.path.exists(path):
        with open(path + '.new', 'wb') as f:
            f.truncate(mib * MIB)
            for i in range(extents // 2):
                f.seek(i * step // (64 * KIB) * 64 * KIB)
                f.write(b'x' * 64 * KIB)
        os.rename(path + '.new', path)
    return path


class ExtentsRow(Row):
    """qemu-img map or convert of a sparse disk"""

    def __init__(self, name, title, figures, command, extents, repeats=3):
        super().__init__(name, title, figures, repeats)
        self.command = command
        self.extents = extents

    def prepare(self, bench):
        sparse_file(bench, self.extents)

    def run(self, bench, options, prefix=()):
        """What it takes, with the options of a node below a raw node"""
        target = os.path.join(bench.tmpfs, 'copy.raw')
        command = {'map': ['map', '--output=json'],
                   'convert': ['convert', '-T', 'none', '-O', 'raw']}
        took = run_timed([*prefix, QEMU_IMG, *command[self.command],
                          '--image-opts', f'driver=raw,{options}',
                          *[target] * (self.command == 'convert')])
        self.verify(bench, took['output'], target)
        return {m: took[m] for m in TIMES}

    def verify(self, bench, output, target):
        path = sparse_file(bench, self.extents)
        if self.command == 'convert':
            qemu_img('compare', '-q', '-f', 'raw', '-F', 'raw', path, target)
            os.unlink(target)
            return
        expected = json.loads(qemu_img('map', '--output=json', '-f', 'raw',
                                       path))
        if json.loads(output) != expected:
            raise Failed('qemu-img map does not print the same')


class ExtentsOfServer(ExtentsRow):
    """Where each question takes some time"""

    sides = ['stock', 'with', "the server's"]

    def __init__(self, *args, delay=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.delay = delay

    def measure(self, bench, side):
        plugin = ['file', sparse_file(bench, self.extents)]
        filters = ['--filter=cacheextents'] * (side == "the server's")
        with SlowDisk(plugin, extents_delay=self.delay, block=512,
                      filters=filters) as disk:
            if side == 'with':
                options = ('file.driver=cacheextents,' +
                           disk.options('file.file.'))
            else:
                options = disk.options('file.')
            result = self.run(bench, options)
        return dict(result, questions=disk.questions)


class ExtentsOfFile(ExtentsRow):
    """Where asking is cheap"""

    sides = ['stock', 'with']

    def options(self, bench, side):
        path = sparse_file(bench, self.extents)
        if side == 'with':
            return ('file.driver=cacheextents,' +
                    direct_file(path, 'file.file.'))
        return direct_file(path, 'file.')

    def once(self, bench, side):
        log = RequestLog(sparse_file(bench, self.extents), 'lseek')
        self.run(bench, self.options(bench, side), log.prefix)
        return {'lseeks': log.count('lseek')}

    def measure(self, bench, side):
        return self.run(bench, self.options(bench, side))


def extents_rows():
    for command in 'map', 'convert':
        yield ExtentsOfServer(
            f'extents-22-{command}', f'{command} of a 2 GiB disk with 22'
            ' extents',
            [value_of('with', 'questions', at_most=2),
             value_of('stock', 'questions'),
             value_of("the server's", 'questions')], command, 22)
        yield ExtentsOfServer(
            f'extents-5000-{command}', f'{command} of a 2 GiB disk with 5000'
            ' extents, 5 ms a question',
            [value_of('with', 'questions', at_most=2),
             ratio('stock', 'with'), ratio("the server's", 'with'),
             difference('with', 'stock', 'memory', at_most=4 * MIB)],
            command, 5000, repeats=2, delay='5ms')
    yield ExtentsOfFile(
        'extents-file-convert', 'convert of a local file with 5000 extents',
        [ratio('with', 'stock', 'lseeks', at_most=1), ratio('with', 'stock')],
        'convert', 5000, repeats=MANY)


SLOW = 'a disk with 4 KiB blocks and 4 ms a request'
DIRECT = 'a file with O_DIRECT'

# For differences that are small: short runs that follow each other closely
MANY = 21

ROWS = [
    FilterSteps('filter-4k-disk', f'Sequential 4 KiB writes to {SLOW}',
                [ratio('without', 'with', at_least=10)],
                4 * KIB, 2048, 512, disk=True),
    FilterSteps('filter-512-disk', f'Sequential 512-byte writes to {SLOW}',
                [ratio('without', 'with', at_least=10)],
                512, 1024, 256, disk=True),
    FilterSteps('filter-4k-file', f'Sequential 4 KiB writes to {DIRECT}',
                [ratio('without', 'with')], 4 * KIB, 32768, 8192),
    FilterSteps('filter-512-file', f'Sequential 512-byte writes to {DIRECT}',
                [ratio('without', 'with')], 512, 32768, 8192),
    FilterSteps('filter-1m-file', f'Aligned 1 MiB writes to {DIRECT}',
                [ratio('with', 'without', at_most=1.02),
                 ratio('with', 'without', 'cpu')], MIB, 256, 256,
                repeats=MANY),
    FilterRandom('filter-random-file', f'Random 4 KiB writes to {DIRECT}',
                 [ratio('with', 'without')], 'randwrite', 64),
    FilterStreams('filter-streams', 'Sequential 4 KiB writes with the filter,'
                  ' to a disk without a delay',
                  [ratio('8 streams', '1 stream', 'requests', at_most=1.1)]),
    FilterSteps('filter-read-file', f'Sequential 4 KiB reads of {DIRECT}',
                [ratio('with', 'without', at_most=1.02),
                 ratio('with', 'without', 'cpu')], 4 * KIB, 8192, 8192,
                write=False, repeats=MANY),
    FilterRandom('filter-randread-file', f'Random 4 KiB reads of {DIRECT}',
                 [ratio('with', 'without', at_most=1.02)], 'randread', 16,
                 repeats=MANY),
    FilterReadCached('filter-read-cached', 'Random 4 KiB reads of what was'
                     f' just written to {DIRECT}',
                     [ratio('with', 'without', at_most=1.02)]),

    ConvertToDisk('convert-ff-disk-zstd', f'128 MiB of 0xff to {SLOW}, zstd',
                  [ratio('off', 'on', at_least=30)], ff_source),
    ConvertToDisk('convert-ff-disk-zlib', f'128 MiB of 0xff to {SLOW}, zlib',
                  [ratio('off', 'on', at_least=30)], ff_source, 'zlib'),
    ConvertToDisk('convert-ff-disk-zlib-w', f'128 MiB of 0xff to {SLOW}, zlib,'
                  ' -W', [ratio('off', 'on', at_least=30)], ff_source, 'zlib',
                  ['-W']),
    ConvertToDisk('convert-text-disk', '64 MiB of C source to a disk with 4 KiB'
                  ' blocks and 2 ms a request, zlib',
                  [ratio('off', 'on', 'requests', at_least=25),
                   value_of('on', 'reads'), ratio('off', 'on')],
                  text_source, 'zlib', delay='2ms'),
    ConvertToFile('convert-files-file', f'512 MiB of files to {DIRECT}, zstd',
                  figures_of_convert_to_file(), files_source),
    ConvertToFile('convert-files-file-w', f'512 MiB of files to {DIRECT}, zstd,'
                  ' -W', figures_of_convert_to_file(), files_source,
                  options=['-W']),

    *extents_rows(),
]
