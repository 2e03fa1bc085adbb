# SPDX-License-Identifier: GPL-2.0-or-later
"""The rows of scripts/bench about backup jobs while the guest works"""

import json
import os
import shutil
import signal
import statistics
import subprocess
import time

from bench_convert import files_source
from bench_report import ratio
from bench_row import DIRECT, Row, direct_file
from lab import Failed, SlowDisk, StorageDaemon, qemu_img

# Of fio's names
PERCENTILES = {'p50': '50.000000', 'p95': '95.000000', 'p99': '99.000000',
               'p999': '99.900000'}
# Requests of the guest in a second, of each kind
GUEST_IOPS = 200
# How long the guest works before the job begins
GUEST_LEAD = 1


class Guest:
    """fio as a guest: reads and writes at random, at a fixed rate"""

    def __init__(self, uri):
        # pylint: disable-next=consider-using-with
        self.process = subprocess.Popen(
            ['fio', '--name=guest', '--ioengine=nbd', f'--uri={uri}',
             '--rw=randrw', '--bs=4k', '--iodepth=8', '--randseed=1',
             f'--rate_iops={GUEST_IOPS},{GUEST_IOPS}', '--time_based',
             '--runtime=3600', f'--ramp_time={GUEST_LEAD}',
             '--output-format=json'],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True)
        time.sleep(GUEST_LEAD + 0.5)

    def stop(self):
        """Its latencies, in seconds"""
        self.process.send_signal(signal.SIGINT)
        output = self.process.communicate()[0]
        job = json.loads(output[output.index('{'):])['jobs'][0]
        result = {}
        for kind in 'read', 'write':
            times = job[kind]['clat_ns'].get('percentile')
            if not times:
                raise Failed('the job was too short for the guest')
            for name, key in PERCENTILES.items():
                result[f'{kind}_{name}'] = times[key] / 1e9
        return result


class BackupRow(Row):
    """blockdev-backup with compress, the target's cache off and on"""

    sides = ['off', 'on']

    def __init__(self, name, title, delay=None):
        super().__init__(name, title, [
            ratio('off', 'on'),
            ratio('on', 'off', 'read_p50'), ratio('on', 'off', 'read_p99'),
            ratio('on', 'off', 'write_p50'), ratio('on', 'off', 'write_p99'),
        ])
        self.delay = delay

    # Of the job in bytes a second; 0: as fast as it can
    speed = 0

    def source(self, bench):
        return files_source(bench, bench.pick(256, 64))

    def prepare(self, bench):
        self.source(bench)

    def job(self, bench, side, file_options):
        """file_options are those of the target's file child, in JSON."""
        # The guest changes it
        disk = bench.path('guest.raw')
        shutil.copyfile(self.source(bench), disk)
        subprocess.run(['sync', '-f', disk], check=True)
        target = {'driver': 'qcow2', 'node-name': 'target',
                  'file': file_options}
        if side == 'off':
            target['compressed-cache-size'] = 0
        with StorageDaemon(direct_file(disk)) as daemon:
            daemon.qmp('blockdev-add', **target)
            guest = Guest(daemon.uri)
            seconds = daemon.run_job('blockdev-backup', device='disk',
                                     target='target', sync='full',
                                     compress=True, speed=self.speed)
            latencies = guest.stop()
        os.unlink(disk)
        return {'seconds': seconds, **latencies}

    def measure(self, bench, side):
        folder = bench.tmpfs if self.delay else bench.folder
        path = os.path.join(folder, 'target.qcow2')
        size = os.path.getsize(self.source(bench))
        qemu_img('create', '-q', '-f', 'qcow2', '-o', 'compression_type=zstd',
                 path, str(size))
        if self.delay:
            os.truncate(path, 2 * size)
            with SlowDisk(['file', path], self.delay) as disk:
                result = self.job(bench, side, {
                    'driver': 'nbd',
                    'server': {'type': 'unix', 'path': disk.socket}})
            result.update(disk.requests())
        else:
            result = self.job(bench, side, {
                'driver': 'file', 'filename': path, 'cache': {'direct': True}})
        qemu_img('check', '-q', '-f', 'qcow2', path)
        os.unlink(path)
        return result


class BackupAtSpeed(BackupRow):
    """The same, both at the speed that the job reaches with the cache off"""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.figures = [
            ratio('off', 'on'),
            ratio('on', 'off', 'read_p50', at_most=1.05),
            ratio('on', 'off', 'read_p99'),
            ratio('on', 'off', 'write_p50'), ratio('on', 'off', 'write_p99'),
        ]

    def prepare(self, bench):
        super().prepare(bench)
        self.speed = 0
        took = statistics.median(self.measure(bench, 'off')['seconds']
                                 for _ in range(3))
        self.speed = int(os.path.getsize(self.source(bench)) / took)


ROWS = [
    BackupRow('backup-file', 'Backup of 320 MiB with files, while the guest'
              f' works, to {DIRECT}, zstd'),
    BackupRow('backup-disk', 'Backup of 320 MiB with files, while the guest'
              ' works, to a disk with 4 KiB blocks and 1 ms a request, zstd',
              delay='1ms'),
    BackupAtSpeed('backup-speed-file', 'Backup of 320 MiB with files at the'
                  " speed that off reaches, while the guest works, to"
                  f' {DIRECT}, zstd'),
    BackupAtSpeed('backup-speed-disk', 'Backup of 320 MiB with files at the'
                  ' speed that off reaches, while the guest works, to a disk'
                  ' with 4 KiB blocks and 1 ms a request, zstd', delay='1ms'),
]
