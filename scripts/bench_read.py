# SPDX-License-Identifier: GPL-2.0-or-later
"""The rows of scripts/bench about reads of compressed images"""

import os

from bench_convert import files_source
from bench_filter import fio
from bench_report import difference, ratio, value_of
from bench_row import DIRECT, TIMES, Row, direct_file
from lab import (
    KIB, MIB, QEMU_IMG, Failed, SlowDisk, StorageDaemon, qemu_img, read_whole,
    run_timed
)

DISK = 'a disk with 2 ms a request'


def compressed_image(bench, folder, mib):
    """A compressed image of files, in the order of convert -c -W"""
    source = files_source(bench, mib)
    path = os.path.join(folder, f'restore-{mib}.qcow2')
    if not os.path.exists(path):
        qemu_img('convert', '-c', '-W', '-f', 'raw', '-O', 'qcow2', '-o',
                 'compression_type=zstd', source, path)
        # Whole blocks of a disk
        os.truncate(path, -(-os.path.getsize(path) // MIB) * MIB)
    return source, path


def image_options(file, cache):
    """file(prefix) are the options of the file child; cache is its size, or None
    for the default."""
    size = '' if cache is None else f',compressed-read-cache-size={cache}'
    return f'driver=qcow2{size},{file("file.")}'


def cached_file(path):
    return lambda prefix: f'{prefix}driver=file,{prefix}filename={path}'


class ReadRow(Row):
    """Work on a compressed image of mib MiB"""

    def __init__(self, name, title, figures, sides, mib, quick_mib, repeats=3):
        super().__init__(name, title, figures, repeats)
        self.sides = sides
        self.mib = mib, quick_mib
        self.source = self.path = None

    def folder(self, bench):
        return bench.tmpfs

    def prepare(self, bench):
        self.source, self.path = compressed_image(
            bench, self.folder(bench), bench.pick(*self.mib))
        read_whole(self.path)

    def on_disk(self, side, work, block=4096):
        """work(options of the file child) with the image on a slow disk"""
        with SlowDisk(['file', self.path], '2ms', block) as disk:
            result = work(disk.options)
        return dict(result, reads=disk.reads, read=disk.read,
                    requests=disk.reads)


def restore(bench, options, source=None):
    """Convert to a raw file on a tmpfs; compare it with the source."""
    path = os.path.join(bench.tmpfs, 'restored.raw')
    took = run_timed([QEMU_IMG, 'convert', '-O', 'raw', '--image-opts',
                      options, path])
    if source:
        qemu_img('compare', '-q', '-f', 'raw', '-F', 'raw', source, path)
    os.unlink(path)
    return {m: took[m] for m in TIMES}


class RestoreFromDisk(ReadRow):
    """From a slow disk, and from a tmpfs as the limit"""

    def __init__(self, *args, block, **kwargs):
        super().__init__(*args, sides=['off', 'on', 'tmpfs'], **kwargs)
        self.block = block

    def measure(self, bench, side):
        if side == 'tmpfs':
            return restore(bench, image_options(cached_file(self.path), None))
        return self.on_disk(side, lambda file: restore(
            bench, image_options(file, 0 if side == 'off' else None),
            self.source), self.block)


class RestoreFromFile(ReadRow):
    """From a file with O_DIRECT, and through the page cache"""

    def folder(self, bench):
        return bench.folder

    def measure(self, bench, side):
        def direct(prefix):
            return direct_file(self.path, prefix)

        if side == 'page cache':
            return restore(bench, image_options(cached_file(self.path), None))
        return restore(bench, image_options(direct, 0 if side == 'off' else
                                            None))


class SmallReads(ReadRow):
    """Sequential reads of one size, one at a time, by qemu-img bench"""

    def measure(self, bench, side):
        size = 4 * KIB if '4 KiB' in side else 64 * KIB
        options = image_options(cached_file(self.path),
                                '16M' if side.startswith('on') else 0)
        took = run_timed([QEMU_IMG, 'bench', '-d', '1', '-s', str(size), '-c',
                          str(bench.pick(*self.mib) * MIB // size),
                          '--image-opts', options])
        return {m: took[m] for m in TIMES}


class RandomReads(ReadRow):
    """4 KiB reads anywhere, through an NBD export, by fio"""

    def measure(self, bench, side):
        def work(file):
            node = image_options(file, 0 if side == 'off' else None)
            with StorageDaemon(node) as daemon:
                # No two of them in order
                return fio(daemon.uri, '--rw=randread', '--ba=64k',
                           f'--size={bench.pick(*self.mib)}M',
                           f'--io_size={bench.pick(4, 1)}M')

        return self.on_disk(side, work)


class Nbdcopy(ReadRow):
    """A client with four connections, and a conversion"""

    def measure(self, bench, side):
        options = image_options(cached_file(self.path),
                                0 if 'off' in side else '16M')
        if side.startswith('convert'):
            return restore(bench, options)
        path = os.path.join(bench.tmpfs, 'restored.raw')
        with StorageDaemon(options) as daemon:
            took = run_timed(['nbdcopy', '--connections=4', daemon.uri, path])
            took['cpu'] += daemon.cpu()
            took['memory'] = daemon.peak_memory()
        if os.path.getsize(path) != os.path.getsize(self.source):
            raise Failed('nbdcopy has not copied everything')
        os.unlink(path)
        return {m: took[m] for m in TIMES}


ROWS = [
    *(RestoreFromDisk(
        f'read-restore-{block}', f'convert of a compressed image of 512 MiB of'
        f' files from {DISK} and blocks of {block} bytes, zstd',
        [ratio('off', 'on'), value_of('off', 'reads'),
         value_of('on', 'reads', at_most=300),
         ratio('on', 'tmpfs', at_most=1.15),
         difference('on', 'off', 'memory', at_most=18 * MIB)],
        mib=512, quick_mib=64, block=block) for block in (1, 4096)),
    RestoreFromFile(
        'read-restore-file', f'convert of a compressed image of 512 MiB of'
        f' files from {DIRECT}, zstd',
        [ratio('off', 'on'), ratio('on', 'page cache', at_most=1.02),
         difference('on', 'off', 'memory', at_most=18 * MIB)],
        ['off', 'on', 'page cache'], 512, 64, repeats=5),
    SmallReads(
        'read-4k', '64 MiB of a compressed image in sequential reads of 4 KiB'
        ' and of 64 KiB', [ratio('off, 4 KiB', 'on, 64 KiB', 'cpu'),
                           ratio('on, 4 KiB', 'on, 64 KiB', 'cpu',
                                 at_most=2.5)],
        ['off, 4 KiB', 'on, 4 KiB', 'on, 64 KiB'], 64, 16),
    RandomReads(
        'read-random', f'Random reads of 4 KiB of a compressed image on {DISK}',
        [ratio('on', 'off', 'reads', at_most=1.02),
         ratio('on', 'off', 'read', at_most=1.02), ratio('on', 'off')],
        ['off', 'on'], 512, 64),
    Nbdcopy(
        'read-nbdcopy', 'nbdcopy with four connections, and convert, of a'
        ' compressed image of 512 MiB of files in the page cache',
        [ratio('nbdcopy', 'convert', at_most=1.15),
         ratio('nbdcopy', 'nbdcopy, off', 'cpu'),
         ratio('nbdcopy', 'convert', 'cpu')],
        ['nbdcopy, off', 'nbdcopy', 'convert'], 512, 64, repeats=5),
]
