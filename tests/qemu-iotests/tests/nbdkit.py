# nbdkit as a disk that insists on its block size, can become full, and logs
# all requests
#
# SPDX-License-Identifier: GPL-2.0-or-later

import os
import re
import subprocess
import time
from typing import Any, Dict, List, NamedTuple, Optional, Tuple, TypeVar

from images import write_file
import iotests


class Request(NamedTuple):
    '''A request that a server received'''
    type: str
    offset: int
    bytes: int


def overlaps(request: Request, ranges: List[Tuple[int, int]]) -> bool:
    '''Whether a request touches any range (start, end)'''
    return any(request.offset < end and start < request.offset + request.bytes
               for start, end in ranges)


NbdDiskT = TypeVar('NbdDiskT', bound='NbdDisk')


class NbdDisk:
    '''
    An NBD server for a raw file, whose size must be a multiple of the block
    size.  It insists on aligned requests like a disk with large blocks, and
    writes down all that it gets.  Use it as a context manager, or start() it.
    From fill() to free(), all that would change it fails with @error.
    '''

    log_re = re.compile(r' (Read|Write|Zero) id=\d+ offset=(0x[0-9a-f]+) '
                        r'count=(0x[0-9a-f]+) ')

    def __init__(self, path: str, name: str = 'nbd',
                 block_size: int = 4096, error: str = 'ENOSPC') -> None:
        self.sock = os.path.join(iotests.sock_dir, name + '.sock')
        self.log = os.path.join(iotests.test_dir, name + '.log')
        self.pid_file = os.path.join(iotests.test_dir, name + '.pid')
        self.full_file = os.path.join(iotests.test_dir, name + '.full')
        self.node: Dict[str, Any] = {
            'driver': 'nbd', 'server': {'type': 'unix', 'path': self.sock}
        }
        self.args = [
            'nbdkit', '--log=null', '--foreground', '--exit-with-parent',
            '--unix', self.sock, '--pidfile', self.pid_file, '--filter=log',
            '--filter=blocksize-policy', '--filter=error', 'file', path,
            f'logfile={self.log}', f'blocksize-minimum={block_size}',
            'blocksize-preferred=65536', 'blocksize-error-policy=error'
        ]
        for request in ('pwrite', 'zero', 'trim'):
            self.args += [f'error-{request}={error}',
                          f'error-{request}-rate=100%',
                          f'error-{request}-file={self.full_file}']
        self._p: 'Optional[subprocess.Popen[bytes]]' = None

    @property
    def uri(self) -> str:
        '''For clients'''
        return f'nbd+unix:///?socket={self.sock}'

    def run(self) -> None:
        '''Start to serve'''
        # pylint: disable=consider-using-with
        self._p = subprocess.Popen(self.args)
        while not os.path.exists(self.pid_file):
            if self._p.poll() is not None:
                raise RuntimeError(f'nbdkit exited: {self._p.returncode}')
            time.sleep(0.01)

    def stop(self) -> None:
        '''End the server, and remove its files'''
        assert self._p is not None
        self._p.terminate()
        try:
            self._p.wait(10)
        except subprocess.TimeoutExpired:
            # It waits for clients
            self._p.kill()
            self._p.wait()
        for path in (self.sock, self.log, self.pid_file, self.full_file):
            iotests.try_remove(path)

    def fill(self) -> None:
        '''From now on changes fail'''
        write_file(self.full_file, b'')

    def free(self) -> None:
        '''Changes succeed again'''
        os.remove(self.full_file)

    def __enter__(self: NbdDiskT) -> NbdDiskT:
        self.run()
        return self

    def __exit__(self, exc_type: Any, exc: Any, tb: Any) -> None:
        self.stop()

    def start(self, case: iotests.QMPTestCase) -> None:
        '''Serve until the test is over'''
        self.run()
        case.addCleanup(self.stop)

    def requests(self) -> List[Request]:
        '''All requests so far but flushes, in order'''
        with open(self.log, encoding='utf-8') as f:
            return [Request(match[1], int(match[2], 16), int(match[3], 16))
                    for match in map(self.log_re.search, f) if match]

    def nb_flushes(self) -> int:
        '''How many flushes there were'''
        with open(self.log, encoding='utf-8') as f:
            return sum(' Flush id=' in line for line in f)


class ExtentsDisk(NbdDisk):
    '''
    An NBD server for a raw file that tells what it was asked.  What it says of
    the file's extents is what the file system says.
    '''
    log_re = re.compile(r' (Read|Write|Zero|Trim|Extents) id=\d+ '
                        r'offset=(0x[0-9a-f]+) count=(0x[0-9a-f]+) ')

    def __init__(self, path: str, name: str = 'nbd',
                 block_size: int = 512) -> None:
        super().__init__(path, name, block_size)
        self.node['discard'] = 'unmap'

    def queries(self) -> List[Request]:
        '''Requests for the status of a range'''
        return [r for r in self.requests() if r.type == 'Extents']

    def data_requests(self) -> List[Request]:
        '''All others'''
        return [r for r in self.requests() if r.type != 'Extents']
