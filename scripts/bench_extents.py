# SPDX-License-Identifier: GPL-2.0-or-later
"""The rows of scripts/bench about the filter node cacheextents"""

import json
import os

from bench_report import difference, ratio, value_of
from bench_row import MANY, TIMES, Row, direct_file
from lab import (
    KIB, MIB, QEMU_IMG, Failed, RequestLog, SlowDisk, StorageDaemon, make_once,
    qemu_img, read_whole, run_timed
)

DATA = 64 * KIB


def sparse_file(bench, extents):
    """A file with that many extents, half of them holes of the same size"""
    path = bench.path(f'sparse-{extents}.raw')
    count = extents // 2
    size = max(2048 * MIB, count * 2 * DATA)

    def write(f):
        f.truncate(size)
        for i in range(count):
            f.seek(i * (size // count) // DATA * DATA)
            f.write(b'x' * DATA)

    make_once(path, write)
    return path


class ExtentsRow(Row):
    """Something that asks which parts of a sparse disk have data"""

    def __init__(self, name, title, figures, command, extents, repeats):
        super().__init__(name, title, figures, repeats)
        self.command = command
        self.extents = extents

    def target(self, bench):
        return os.path.join(bench.tmpfs, 'copy.raw')

    def prepare(self, bench):
        read_whole(sparse_file(bench, self.extents))

    def run(self, bench, options, prefix=(), check=False):
        """What it takes, with the options of a node below a raw node"""
        if self.command == 'backup':
            took = self.backup(bench, options)
        else:
            command = ['map', '--output=json']
            if self.command == 'convert':
                command = ['convert', '-T', 'none', '-O', 'raw']
            took = run_timed([*prefix, QEMU_IMG, *command, '--image-opts',
                              f'driver=raw,{options}',
                              *[self.target(bench)] *
                              (self.command == 'convert')])
        if check:
            self.verify(bench, took['output'])
        if self.command != 'map':
            os.unlink(self.target(bench))
        return {m: took[m] for m in TIMES if m in took}

    def backup(self, bench, options):
        target = self.target(bench)
        size = os.path.getsize(sparse_file(bench, self.extents))
        qemu_img('create', '-q', '-f', 'raw', target, str(size))
        with StorageDaemon(f'driver=raw,{options}') as daemon:
            daemon.qmp('blockdev-add', driver='file', filename=target,
                       **{'node-name': 'target'})
            seconds = daemon.run_job('blockdev-backup', device='disk',
                                     target='target', sync='full')
            memory = daemon.peak_memory()
        return {'seconds': seconds, 'memory': memory, 'output': ''}

    def verify(self, bench, output):
        path = sparse_file(bench, self.extents)
        if self.command != 'map':
            qemu_img('compare', '-q', '-f', 'raw', '-F', 'raw', path,
                     self.target(bench))
            return
        expected = json.loads(qemu_img('map', '--output=json', '-f', 'raw',
                                       path))
        if json.loads(output) != expected:
            raise Failed('qemu-img map does not print the same')


class ExtentsOfServer(ExtentsRow):
    """Where each query takes some time"""

    def __init__(self, *args, delay, sides, **kwargs):
        super().__init__(*args, **kwargs)
        self.delay = delay
        self.sides = sides

    def ask(self, bench, side, check=False):
        plugin = ['file', sparse_file(bench, self.extents)]
        filters = ['--filter=cacheextents'] * (side == "the server's")
        with SlowDisk(plugin, extents_delay=self.delay, block=512,
                      filters=filters) as disk:
            if side == 'with':
                options = ('file.driver=cacheextents,' +
                           disk.options('file.file.'))
            else:
                options = disk.options('file.')
            result = self.run(bench, options, check=check)
        return dict(result, queries=disk.queries)

    def once(self, bench, side):
        if side != 'stock':
            self.ask(bench, side, check=True)
        return {}

    def measure(self, bench, side):
        return self.ask(bench, side)


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
        self.run(bench, self.options(bench, side), log.prefix, check=True)
        return {'lseeks': log.count('lseek')}

    def measure(self, bench, side):
        return self.run(bench, self.options(bench, side))


def server_rows():
    for extents in 22, 1000, 100000:
        for delay in 0, 5, 20:
            for command in 'map', 'convert', 'backup':
                # Stock would take up to an hour for each of the others
                stock = extents < 100000 or not delay
                queries = 2 if extents <= 1000 else None
                figures = [
                    value_of('with', 'queries', at_most=queries),
                    ratio("the server's", 'with'),
                ]
                if stock:
                    figures += [
                        ratio('stock', 'with'),
                        value_of('stock', 'queries'),
                        difference('with', 'stock', 'memory', at_most=4 * MIB)
                    ]
                yield ExtentsOfServer(
                    f'extents-{extents}-{delay}ms-{command}',
                    f'{command} of a disk with {extents} extents, {delay} ms'
                    ' a query', figures, command, extents,
                    repeats=2 if extents * delay >= 20000 else 3,
                    delay=f'{delay}ms' if delay else None,
                    sides=[*['stock'] * stock, 'with', "the server's"])


ROWS = [
    *server_rows(),
    ExtentsOfFile(
        'extents-file-convert', 'convert of a local file with 5000 extents',
        [ratio('with', 'stock', 'lseeks', at_most=1), ratio('with', 'stock')],
        'convert', 5000, repeats=MANY),
]
