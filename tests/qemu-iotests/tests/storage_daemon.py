# qemu-storage-daemon with an NBD server, and its jobs
#
# SPDX-License-Identifier: GPL-2.0-or-later

import os
import time
from typing import Any, Dict, Optional, Tuple

from images import Node, dashes
from machines import cache_stats, virtual_size
from nbd_client import TIMEOUT, Client
import iotests


class Daemon:
    '''qemu-storage-daemon with an NBD server'''
    count = 0

    def __init__(self, *args: str) -> None:
        Daemon.count += 1
        name = f'd{os.getpid()}-{Daemon.count}'
        self.path = os.path.join(iotests.sock_dir, f'{name}-nbd')
        self.qsd = iotests.QemuStorageDaemon(
            '--nbd-server', f'addr.type=unix,addr.path={self.path}'
            ',max-connections=0', *args, instance_id=name, qmp=True)
        self.qsd.get_qmp().settimeout(TIMEOUT)
        self.running = True

    def error(self, cmd: str, **kwargs: Any) -> Optional[str]:
        '''The message if a command fails'''
        reply: Any = self.qsd.qmp(cmd, dashes(kwargs))
        return reply['error']['desc'] if 'error' in reply else None

    def cmd(self, cmd: str, **kwargs: Any) -> Any:
        '''A QMP command, with underscores for dashes'''
        return self.qsd.cmd(cmd, dashes(kwargs))

    def add(self, node: Node) -> None:
        '''Add a node'''
        self.qsd.cmd('blockdev-add', node)

    def export(self, node: str, writable: bool = True) -> Client:
        '''Export a node, and connect a client'''
        name = node if writable else f'{node}-ro'
        self.cmd('block-export-add', type='nbd', id=name, node_name=node,
                 name=name, writable=writable)
        return Client(self.path, name)

    def export_packed(self, node: Node) -> Tuple[Client, Client]:
        '''
        Add a node, and one above it that compresses what is written; connect
        a client to each
        '''
        self.add(node)
        self.add({'driver': 'compress', 'node-name': 'packed',
                  'file': node['node-name']})
        return self.export(node['node-name']), self.export('packed')

    def unexport(self, name: str) -> None:
        '''End an export, and wait until it has gone'''
        self.cmd('block-export-del', id=name, mode='hard')
        self.wait(lambda: all(e['id'] != name
                              for e in self.cmd('query-block-exports')))

    @staticmethod
    def wait(condition: Any) -> None:
        '''Until the condition is true'''
        end = time.monotonic() + TIMEOUT
        while not condition():
            assert time.monotonic() < end, 'took too long'
            time.sleep(0.005)

    def state(self, job: str) -> Dict[str, Any]:
        '''What query-jobs says of a job'''
        jobs = self.cmd('query-jobs')
        return next(dict(j) for j in jobs if j['id'] == job)

    def start_job(self, cmd: str, **kwargs: Any) -> Optional[str]:
        '''Start the job "job"; returns the error'''
        return self.error(cmd, job_id='job', auto_dismiss=False, **kwargs)

    def start_job_soon(self, cmd: str, **kwargs: Any) -> Optional[str]:
        '''Until cached data is written, seqcache keeps its permissions'''
        error = self.start_job(cmd, **kwargs)
        end = time.monotonic() + 3
        while error and 'Permission conflict' in error and \
                time.monotonic() < end:
            time.sleep(0.02)
            error = self.start_job(cmd, **kwargs)
        return error

    def wait_ready(self) -> None:
        '''Until the job is ready, or has ended'''
        self.wait(lambda: self.state('job')['status'] in ('ready',
                                                          'concluded'))

    def finish_job(self, cancel: bool = False) -> Optional[str]:
        '''Returns the message if it failed'''
        self.wait_ready()
        if self.state('job')['status'] == 'ready':
            self.cmd('block-job-cancel' if cancel else 'job-complete',
                     **{'device' if cancel else 'id': 'job'})
        self.wait(lambda: self.state('job')['status'] == 'concluded')
        error = self.state('job').get('error')
        self.cmd('job-dismiss', id='job')
        return error

    def job(self, cmd: str, **kwargs: Any) -> Optional[str]:
        '''Run a job to its end; returns the error'''
        return self.start_job(cmd, **kwargs) or self.finish_job()

    def size(self, node: str) -> int:
        '''The length of a node'''
        return virtual_size(self.qsd, node)

    def dirty(self, node: str) -> bool:
        '''Whether the filter seqcache has something that it did not write'''
        return bool(cache_stats(self.qsd, node)['cached-bytes'])

    def stop(self) -> None:
        '''Quit'''
        self.qsd.stop()
        self.running = False

    def kill(self) -> None:
        '''End it at once'''
        if self.running:
            self.running = False
            try:
                self.qsd.stop(kill_signal=9)
            except (EOFError, OSError):
                # It had crashed
                pass
