# SPDX-License-Identifier: GPL-2.0-or-later
"""The rows of scripts/bench about the filter node seqcache"""

import json
import os

from bench_report import ratio
from bench_row import DIRECT, MANY, TIMES, Row, direct_file
from lab import (
    KIB, MIB, QEMU_IMG, Failed, SlowDisk, StorageDaemon, qemu_img, run_timed
)

SLOW = 'a disk with 4 KiB blocks and 4 ms a request'


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
    """The same bytes in one sequential stream and in eight, by fio"""

    def __init__(self, name, title, figures, sides, mib, quick_mib, delay=None):
        super().__init__(name, title, figures, repeats=3)
        self.sides = sides
        self.mib = mib, quick_mib
        self.delay = delay

    def measure(self, bench, side):
        mib = bench.pick(*self.mib)
        streams = int(side.split()[0])
        with SlowDisk(['memory', '512M'], self.delay) as disk:
            node = disk.options()
            if 'without' not in side:
                node = f'driver=seqcache,{disk.options("file.")}'
            with StorageDaemon(node) as daemon:
                times = fio(daemon.uri, '--rw=write', f'--numjobs={streams}',
                            f'--size={mib // streams}M',
                            f'--offset_increment={mib // streams}M')
        return dict(times, **disk.requests())


# ---- The rows ----

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
    FilterSteps('filter-64k-disk', f'Sequential 64 KiB writes to {SLOW}',
                [ratio('without', 'with')], 64 * KIB, 1024, 256, disk=True),
    FilterSteps('filter-1m-disk', f'Sequential 1 MiB writes to {SLOW}',
                [ratio('with', 'without', at_most=1.02)], MIB, 256, 64,
                disk=True),
    FilterSteps('filter-64k-file', f'Sequential 64 KiB writes to {DIRECT}',
                [ratio('without', 'with')], 64 * KIB, 4096, 1024),
    FilterSteps('filter-1m-file', f'Aligned 1 MiB writes to {DIRECT}',
                [ratio('with', 'without', at_most=1.02),
                 ratio('with', 'without', 'cpu')], MIB, 256, 256,
                repeats=MANY),
    FilterRandom('filter-random-file', f'Random 4 KiB writes to {DIRECT}',
                 [ratio('with', 'without')], 'randwrite', 64),
    FilterStreams('filter-streams', 'Sequential 4 KiB writes with the filter,'
                  ' to a disk without a delay',
                  [ratio('8 streams', '1 stream', 'requests', at_most=1.1)],
                  ['1 stream', '8 streams'], 256, 128),
    FilterStreams('filter-streams-disk', 'Sequential 4 KiB writes to a disk'
                  ' with 4 KiB blocks and 1 ms a request',
                  [ratio('1 stream, without', '1 stream, with'),
                   ratio('8 streams, without', '8 streams, with')],
                  [f'{streams}, {side}' for streams in ('1 stream', '8 streams')
                   for side in ('without', 'with')], 16, 8, delay='1ms'),
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
]
