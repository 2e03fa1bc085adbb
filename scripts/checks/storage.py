# SPDX-License-Identifier: GPL-2.0-or-later
"""
Kind storage: the same steps on each store of stores.py.

The steps are the methods of Stored that STEPS names; a step that fails does not
keep the next one from running. Requests are counted with the cache off, by
default, and on; the end of the output is a table of them.
"""

import contextlib
import functools
import json
import os
import random
import re
import shutil
import subprocess
import tempfile
import textwrap
import time

import patchset
from lab import (
    KIB, MIB, QEMU_IMG, Failed, Skipped, StorageDaemon, expect, make_once,
    qemu_img, wait_for)
from . import programs, runner
from .store_base import run
from .stores import STORES

FOLDER = os.path.join(os.environ.get('TEST_DIR') or runner.BUILD,
                      'check-storage')
# In MiB: an image, of which each cluster compresses to a fourth, and what is
# written to the filter
SIZE = 64 if runner.WITH == 'storage' else 32
FILTERED = 8
# Bytes a second of a backup whose server is killed
SPEED = 16 * MIB
COLUMNS = ['convert off', 'default', 'on', '-W off', '-W default', 'backup off',
           'backup default', '4 KiB writes', 'with filter', 'killed', 'full']
# {store: {column: text}}
TABLE: 'dict[str, dict[str, str]]' = {}


@functools.cache
def source():
    """The path of a raw image"""
    numbers = random.Random(1)

    def write(f):
        for i in range(SIZE * MIB // (4 * KIB)):
            f.write(numbers.randbytes(KIB) + bytes([i % 255 + 1]) * 3 * KIB)

    path = os.path.join(FOLDER, f'source-{SIZE}.raw')
    os.makedirs(FOLDER, exist_ok=True)
    make_once(path, write)
    return path


@functools.cache
def drivers():
    """What qemu-img can open"""
    return re.search(r'^Supported .*formats:\n(.*?)\n\n', qemu_img('--help'),
                     re.M | re.S)[1].split()


def qcow2(node, cache=None):
    """The options of a qcow2 node"""
    return {'driver': 'qcow2', 'file': node,
            **({} if cache is None else {'compressed-cache-size': cache})}


@functools.cache
def example(section):
    """The commands that a section of the manual page has"""
    page = runner.read(os.path.join(
        runner.TOP, 'docs/system/backup-targets.rst'))
    text = re.search(rf'^{section}\n-+\n(.*?)(?=^[^\n]+\n---)', page, re.M | re.S)[1]
    return textwrap.dedent(re.search(r'::\n\n((?:   .*\n)+)', text)[1])


def as_json(node):
    return 'json:' + json.dumps(node)


class Daemon(StorageDaemon):
    """A daemon whose node "disk" is the source; its target is in a store"""

    def __init__(self, prefix, log):
        self.log = log
        super().__init__('driver=raw,file.driver=file,read-only=on,'
                         f'file.filename={source()}')
        self.prefix = prefix

    def command(self, path):
        words = super().command(path)
        # Without the export
        return ['sh', '-c', 'log=$1; shift; exec "$@" 2>> "$log"', 'sh', self.log,
                *self.prefix, *words[:words.index('--export')]]

    def stop(self):
        with contextlib.suppress(OSError, ValueError, Failed):
            self.qmp('quit')
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(30)
        self.process.kill()

    def add_target(self, store, cache=None):
        """Returns whether it has a cache"""
        self.qmp('blockdev-add', **{'node-name': 'target',
                                    **qcow2(store.node, cache)})
        nodes = self.qmp('query-blockstats', **{'query-nodes': True})
        return any('compressed-cache' in node.get('driver-specific', {})
                   for node in nodes)

    def start_backup(self, **options):
        self.qmp('blockdev-backup', device='disk', target='target', sync='full',
                 compress=True, **{'job-id': 'job', 'auto-dismiss': False,
                                   **options})

    def job(self):
        return self.qmp('query-jobs')[0]

    def wait_for_job(self, *states):
        """Until it is in one of them; returns the job"""
        return wait_for(lambda: (job := self.job())['status'] in states and job,
                        f'a job that is {" or ".join(states)}', 300)

    def finish(self, attempts=1):
        """Resume the job as often as it stops; returns the error, if any"""
        while (job := self.wait_for_job('paused', 'concluded'))['status'] == \
                'paused' and attempts:
            attempts -= 1
            self.qmp('block-job-resume', device='job')
            time.sleep(1)
        if job['status'] == 'paused':
            return 'it stops again'
        self.qmp('job-dismiss', id='job')
        if 'error' not in job:
            self.qmp('blockdev-del', **{'node-name': 'target'})
        return job.get('error', '')


class Stored(runner.Test):
    """The steps on one store; their docstrings say what they do"""

    def __init__(self, name):
        super().__init__(name, f'storage {name}',
                         os.path.join(FOLDER, f'{name}.log'))
        self.store = None
        self.texts = {}

    # What the steps share

    def create(self, compression='zlib'):
        run(*self.store.enter, QEMU_IMG, 'create', '-q', '-f', 'qcow2', '-o',
            f'compression_type={compression}', self.store.url, f'{SIZE}M')
        self.store.created()

    def verify(self):
        """The image has the data, and is consistent"""
        image = as_json(qcow2(self.store.node))
        run(*self.store.enter, QEMU_IMG, 'compare', '-f', 'raw', '-F', 'qcow2',
            source(), image)
        run(*self.store.enter, QEMU_IMG, 'check', '-f', 'qcow2', image)

    @contextlib.contextmanager
    def counted(self):
        """A list that gets the (reads, writes) of what is done within"""
        before = self.store.so_far()
        found = []
        yield found
        found.append(tuple(now - then for now, then in
                           zip(self.store.so_far(), before)))

    def note(self, *columns, **found):
        """Put (reads, writes) into the table; returns them as text"""
        self.texts.update(zip(columns, (f'{writes}+{reads}' for reads, writes
                                        in found.values())))
        return ', '.join(f'{side} {writes} writes, {reads} reads'
                         for side, (reads, writes) in found.items())

    def judge(self, text, off, default):
        """Compare requests with what is expected of this store"""
        if not self.store.on:
            expect(abs(off[1] - default[1]) <= self.store.metadata,
                   f'not as off: {text}')
            return
        expect(sum(off) >= self.store.fewer * sum(default),
               f'not {self.store.fewer} times fewer: {text}')
        expect(default[0] <= self.store.metadata, f'data is read: {text}')

    def convert_by(self, cache, *options, compression='zlib', origin=None):
        """The requests of a conversion of the source, or of an export of it; the
        image is compared and checked"""
        self.store.fresh()
        self.create(compression)
        with self.counted() as found:
            run(*self.store.prefix, QEMU_IMG, 'convert', '-n', '-c', *options,
                '-f', 'raw', '-O', 'qcow2', origin or source(),
                as_json(qcow2(self.store.node, cache)))
        self.verify()
        return found[0]

    def backup_by(self, cache):
        """The requests of a backup, which is compared and checked"""
        self.store.fresh()
        self.create()
        with self.counted() as found, Daemon(self.store.prefix, self.log) as daemon:
            has_cache = daemon.add_target(self.store, cache)
            daemon.start_backup()
            expect(has_cache == (self.store.on if cache is None else False),
                   f'whether there is a cache: {has_cache}')
            error = daemon.finish()
            expect(not error, error)
        self.verify()
        return found[0]

    def filter_by(self, node):
        """The requests of writes of 4 KiB to a node, which are read again"""
        self.store.fresh(FILTERED)
        image = as_json(node)
        with self.counted() as found:
            run(*self.store.prefix, QEMU_IMG, 'bench', '-w', '-c',
                str(FILTERED * MIB // (4 * KIB)), '-d', '1', '-s', '4096',
                '--pattern', '165', '-t', 'none', '-f', node['driver'], image)
        out = run(*self.store.enter, os.path.join(runner.BUILD, 'qemu-io'), '-f',
                  node['driver'], '-c', f'read -P 165 0 {FILTERED - 1}M', image)
        expect('failed' not in out, out)
        return found[0]

    # The steps

    def convert(self):
        """convert -c, with the cache off, by default and on"""
        found = {side: self.convert_by(cache) for side, cache in
                 (('off', 0), ('default', None), ('on', 16 * MIB))}
        text = self.note(*COLUMNS[:3], **found)
        self.judge(text, found['off'], found['default'])
        expect(not self.store.on or abs(
            found['on'][1] - found['default'][1]) <= self.store.metadata,
               f'not as on: {text}')
        return text

    def convert_unordered(self):
        """convert -c -W with zstd, off and by default"""
        found = {side: self.convert_by(cache, '-W', compression='zstd')
                 for side, cache in (('off', 0), ('default', None))}
        text = self.note(*COLUMNS[3:5], **found)
        self.judge(text, **found)
        return text

    def convert_others(self):
        """convert -c with zstd, and convert -c -W with zlib"""
        return self.note(zstd=self.convert_by(None, compression='zstd'),
                         unordered=self.convert_by(None, '-W'))

    def backup(self):
        """blockdev-backup with compress, off and by default"""
        found = {'off': self.backup_by(0), 'default': self.backup_by(None)}
        text = self.note(*COLUMNS[5:7], **found)
        self.judge(text, **found)
        return text

    def filter(self):
        """writes of 4 KiB, without and with the filter"""
        found = {'without': self.filter_by(self.store.node),
                 'filter': self.filter_by({'driver': 'seqcache',
                                           'file': self.store.node})}
        text = self.note(*COLUMNS[7:9], **found)
        expect(sum(found['without']) >= self.store.fewer * sum(found['filter']),
               f'not {self.store.fewer} times fewer: {text}')
        return text

    def example(self):
        """what the manual page says about such a store, with this one"""
        self.store.fresh()
        text = example(self.store.section)
        for place in [('disk.raw', source()), *self.store.places()]:
            text = text.replace(*place)
        paths = os.pathsep.join([runner.BUILD, os.environ['PATH']])
        run(*self.store.enter, 'sh', '-e', '-x', '-c', text, cwd=self.store.folder,
            env={**self.store.environment(), 'PATH': paths})
        self.verify()
        return 'compared and checked'

    def restart(self):
        """the server is killed and started in the middle of a backup"""
        if not self.store.server:
            return None
        self.store.fresh()
        self.create()
        with Daemon(self.store.enter, self.log) as daemon:
            daemon.add_target(self.store)
            daemon.start_backup(speed=SPEED, **{'on-target-error': 'stop'})
            wait_for(lambda: daemon.job()['current-progress'] > SIZE * MIB // 4,
                     'a quarter of the backup')
            self.store.kill()
            time.sleep(1)
            self.store.start()
            daemon.qmp('block-job-set-speed', device='job', speed=0)
            error = daemon.finish(attempts=5)
        return self.ended('killed', error, self.store.lost)

    def full(self):
        """a full store stops a backup, and space lets it end"""
        self.store.fresh()
        self.create()
        with Daemon(self.store.enter, self.log) as daemon:
            if self.store.waits:
                daemon.add_target(self.store)
                self.store.fill()
            else:
                self.store.fill()
                daemon.add_target(self.store)
            daemon.start_backup(**{'on-target-error': 'enospc'})
            if self.store.waits:
                time.sleep(5)
                stopped = daemon.job()
                expect(stopped['status'] == 'running', 'it does not wait')
            else:
                stopped = daemon.wait_for_job('paused', 'concluded')
            if stopped['status'] == 'paused':
                expect(daemon.qmp('query-block-jobs')[0]['io-status'] ==
                       'nospace', 'io-status is not nospace')
            self.store.free()
            error = daemon.finish()
        expect(error or stopped['status'] != 'concluded', 'it was not full')
        return self.ended('full', error, self.store.full)

    def ended(self, column, error, expected):
        """How a job ended, and its image"""
        self.texts[column] = 'fails' if error else 'resumed'
        expect(expected in error and bool(error) == bool(expected),
               f'the job says "{error}", not "{expected}"')
        if not error:
            self.verify()
        return error or 'resumed, compared and checked'

    # How they run

    def run(self):
        try:
            os.makedirs(FOLDER, exist_ok=True)
            with open(self.log, 'w', encoding='utf-8'):
                pass
            with tempfile.TemporaryDirectory(dir=FOLDER) as folder, \
                 self.made(folder) as self.store:
                for step in STEPS:
                    self.run_step(step)
                TABLE[self.name] = self.texts
        except Skipped as e:
            self.add('skip', str(e))
        except (Failed, OSError) as e:
            self.add('fail', str(e))

    def made(self, folder):
        """The store, or the reason why it cannot run here"""
        if os.getuid() != 0:
            raise Skipped('not root')
        try:
            store = STORES[self.name].make(folder)
        except (Failed, OSError) as e:
            # No loop devices in a container, no such file system in the kernel
            raise Skipped(str(e)) from e
        absent = [p for p in store.programs if not shutil.which(p)] + \
            [f'driver {d}' for d in store.drivers if d not in drivers()]
        if absent:
            store.stack.close()
            raise Skipped(f'there is no {", ".join(absent)}')
        return store

    def run_step(self, step):
        title = f'{self.title} {step.__name__}'
        if runner.ENDING.is_set():
            raise Skipped('the run was ended')
        try:
            note = step(self)
            if note is not None:
                self.add('pass', note, title)
                print(f'  {title}: {note}', flush=True)
        except (Failed, OSError, KeyError, ValueError) as e:
            self.add('fail', str(e) or type(e).__name__, title)
            self.store.restore()


STEPS = [Stored.convert, Stored.convert_unordered, Stored.convert_others,
         Stored.backup, Stored.filter, Stored.example, Stored.restart,
         Stored.full]


def names():
    """Those that STORES names; else in their environment all, otherwise those
    that are quick"""
    return (os.environ.get('STORES') or '').split() or [
        name for name, store in STORES.items()
        if store.quick or runner.WITH == 'storage'
    ] + (['libvirt'] if runner.WITH == 'storage' else [])


def storage_tests():
    if runner.WITH not in ('', 'storage'):
        return []
    found = [Stored(name) for name in programs.wanted(names()) if name in STORES]
    if found:
        patchset.end_cleanly()
        source()
    return found


def print_table():
    """What was counted: writes + reads"""
    rows = [['writes+reads', *COLUMNS],
            *([name, *(texts.get(column, '-') for column in COLUMNS)]
              for name, texts in TABLE.items())]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows if TABLE else []:
        print('  '.join(map(str.ljust, row, widths)).rstrip())
