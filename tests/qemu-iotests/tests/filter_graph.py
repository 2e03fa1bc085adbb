# What the tests share that put the filters seqcache and cacheextents anywhere
# in a graph: a storage daemon, its jobs, and a client that keeps a model
#
# This work is licensed under the terms of the GNU GPL, version 2 or later.
# See the COPYING file in the top-level directory.
#
# SPDX-License-Identifier: GPL-2.0-or-later

import os
import random
import socket
import struct
import time
from typing import Any, Dict, Optional

from qcow2_compressed_cache import dashes
import iotests


# Seconds that anything may take at most
TIMEOUT = 20.0


def minimum_block(path: str, export: str) -> int:
    '''The block size that an NBD server tells its clients'''
    name = export.encode()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(TIMEOUT)
        sock.connect(path)
        reader = sock.makefile('rb')
        reader.read(18)
        # NBD_OPT_INFO, with a request for NBD_INFO_BLOCK_SIZE
        data = struct.pack('>I', len(name)) + name + struct.pack('>HH', 1, 3)
        sock.sendall(struct.pack('>I8sII', 3, b'IHAVEOPT', 6, len(data)) +
                     data)
        while True:
            _, _, kind, size = struct.unpack('>QIII', reader.read(20))
            reply = reader.read(size)
            assert kind == 3, 'no block size'
            if struct.unpack('>H', reply[:2])[0] == 3:
                # The end of the answer, and a proper end
                reader.read(20)
                sock.sendall(struct.pack('>8sII', b'IHAVEOPT', 2, 0))
                reader.read(20)
                return int(struct.unpack('>I', reply[2:6])[0])


class Client:
    '''
    An NBD client.  It knows what the disk must contain, and makes requests of
    any size and alignment.  It sees no block size.
    '''
    READ, WRITE, DISCONNECT, FLUSH, TRIM, ZEROES = 0, 1, 2, 3, 4, 6

    def __init__(self, path: str, export: str) -> None:
        self.export = export
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(TIMEOUT)
        self.sock.connect(path)
        assert self._recv(18)[:8] == b'NBDMAGIC'
        name = export.encode()
        # No zeroes after the answer; the option to take the export
        self.sock.sendall(struct.pack('>I8sII', 3, b'IHAVEOPT', 1, len(name)) +
                          name)
        self.size, _ = struct.unpack('>QH', self._recv(10))
        self.handle = 0

    def _recv(self, size: int) -> bytes:
        data = b''
        while len(data) < size:
            more = self.sock.recv(size - len(data))
            if not more:
                raise EOFError('the NBD server has gone')
            data += more
        return data

    def request(self, kind: int, offset: int, size: int, data: bytes = b'',
                flags: int = 0) -> bytes:
        self.handle += 1
        self.sock.sendall(struct.pack('>IHHQQI', 0x25609513, flags, kind,
                                      self.handle, offset, size) + data)
        magic, error, handle = struct.unpack('>IIQ', self._recv(16))
        assert magic == 0x67446698 and handle == self.handle
        if error:
            raise OSError(error, os.strerror(error))
        return self._recv(size) if kind == self.READ else b''

    def read(self, offset: int, size: int) -> bytes:
        return self.request(self.READ, offset, size)

    def write(self, offset: int, data: bytes, fua: bool = False) -> None:
        self.request(self.WRITE, offset, len(data), data, int(fua))

    def zero(self, offset: int, size: int, unmap: bool) -> None:
        self.request(self.ZEROES, offset, size, flags=0 if unmap else 2)

    def trim(self, offset: int, size: int) -> None:
        self.request(self.TRIM, offset, size)

    def flush(self) -> None:
        self.request(self.FLUSH, 0, 0)

    def close(self) -> None:
        try:
            self.sock.sendall(struct.pack('>IHHQQI', 0x25609513, 0,
                                          self.DISCONNECT, 0, 0, 0))
        except OSError:
            pass
        self.sock.close()


class Writer:
    '''A client that makes random requests and knows what they result in'''

    def __init__(self, client: Client, data: bytearray, seed: int,
                 block: int = 1) -> None:
        self.client = client
        self.data = data
        self.rand = random.Random(seed)
        self.block = block
        self.pos = 0

    def range(self, size: int) -> Any:
        '''Where a request goes: where the last one ended, or anywhere'''
        size = max(size - size % self.block, self.block)
        if self.rand.random() < 0.4 or self.pos + size > len(self.data):
            self.pos = self.rand.randrange(max(len(self.data) - size, 1))
            self.pos -= self.pos % self.rand.choice((self.block,
                                                     max(self.block, 4096)))
        offset = self.pos
        self.pos += size
        return offset, min(size, len(self.data) - offset)

    def step(self) -> None:
        kind = self.rand.choices(('write', 'read', 'zero', 'trim', 'flush'),
                                 (70, 16, 5, 5, 4))[0]
        size = self.rand.choice((512, 512, 1000, 4096, 4096, 13000, 65536,
                                 100000))
        offset, size = self.range(size)
        end = offset + size
        if kind == 'write':
            data = bytes([self.rand.randrange(1, 256)]) * size
            self.client.write(offset, data, fua=self.rand.random() < 0.03)
            self.data[offset:end] = data
        elif kind == 'read':
            self.check(offset, size)
        elif kind == 'zero':
            self.client.zero(offset, size, self.rand.random() < 0.5)
            self.data[offset:end] = bytes(size)
        elif kind == 'trim':
            self.client.trim(offset, size)
            # It may do nothing, or only a part
            self.data[offset:end] = self.client.read(offset, size)
        else:
            self.client.flush()

    def check(self, offset: int = 0, size: Optional[int] = None) -> None:
        size = len(self.data) - offset if size is None else size
        data = self.client.read(offset, size)
        if data != self.data[offset:offset + size]:
            first = next(i for i in range(size)
                         if data[i] != self.data[offset + i])
            wrong = sum(data[i] != self.data[offset + i] for i in range(size))
            raise AssertionError(
                f'{wrong} wrong bytes from {offset + first} on: '
                f'{data[first]}, not {self.data[offset + first]}')

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.step()


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
        return self.qsd.cmd(cmd, dashes(kwargs))

    def add(self, node: Dict[str, Any]) -> None:
        self.qsd.cmd('blockdev-add', node)

    def export(self, node: str, writable: bool = True) -> Client:
        name = node if writable else f'{node}-ro'
        self.cmd('block-export-add', type='nbd', id=name, node_name=node,
                 name=name, writable=writable)
        return Client(self.path, name)

    def unexport(self, name: str) -> None:
        self.cmd('block-export-del', id=name, mode='hard')
        self.wait(lambda: all(e['id'] != name
                              for e in self.cmd('query-block-exports')))

    @staticmethod
    def wait(condition: Any) -> None:
        end = time.monotonic() + TIMEOUT
        while not condition():
            assert time.monotonic() < end, 'took too long'
            time.sleep(0.005)

    def state(self, job: str) -> Dict[str, Any]:
        jobs = self.cmd('query-jobs')
        return next(dict(j) for j in jobs if j['id'] == job)

    def start_job(self, cmd: str, **kwargs: Any) -> Optional[str]:
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
        return self.start_job(cmd, **kwargs) or self.finish_job()

    def size(self, node: str) -> int:
        nodes: Any = self.cmd('query-named-block-nodes')
        return next(int(n['image']['virtual-size']) for n in nodes
                    if n['node-name'] == node)

    def dirty(self, node: str) -> bool:
        '''Whether the filter seqcache has something that it did not write'''
        nodes: Any = self.cmd('query-blockstats', query_nodes=True)
        stats = next(n for n in nodes if n['node-name'] == node)
        return bool(stats['driver-specific']['cached-bytes'])

    def stop(self) -> None:
        self.qsd.stop()
        self.running = False

    def kill(self) -> None:
        if self.running:
            self.running = False
            try:
                self.qsd.stop(kill_signal=9)
            except (EOFError, OSError):
                # It had crashed
                pass


def small_writes(client: Client, data: bytearray, offset: int, count: int,
                 size: int = 512, byte: int = 1) -> None:
    '''Sequential writes that the filter seqcache keeps'''
    for _ in range(count):
        client.write(offset, bytes([byte]) * size)
        data[offset:offset + size] = bytes([byte]) * size
        offset += size
