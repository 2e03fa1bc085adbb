# NBD clients in the process of the test: one whose requests are what the test
# says, and one with random requests that keeps a model of the disk
#
# SPDX-License-Identifier: GPL-2.0-or-later

import os
import random
import socket
import struct
from typing import Optional, Tuple


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

    def __init__(self, path: str, export: str = '') -> None:
        '''Without @export, choose() must come before the first request'''
        self.export = export
        self.size = 0
        self.handle = 0
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(TIMEOUT)
        self.sock.connect(path)
        assert self._recv(18)[:8] == b'NBDMAGIC'
        if export:
            self.choose(export)

    def choose(self, export: str) -> None:
        '''End the handshake'''
        name = export.encode()
        # No zeroes after the answer; the option to take the export
        self.sock.sendall(struct.pack('>I8sII', 3, b'IHAVEOPT', 1, len(name)) +
                          name)
        self.size, _ = struct.unpack('>QH', self._recv(10))

    def _recv(self, size: int) -> bytes:
        data = b''
        while len(data) < size:
            more = self.sock.recv(size - len(data))
            if not more:
                raise EOFError('the NBD server has gone')
            data += more
        return data

    def send(self, kind: int, offset: int, size: int, data: bytes = b'',
             flags: int = 0) -> None:
        '''A request, whose reply is not waited for'''
        self.handle += 1
        self.sock.sendall(struct.pack('>IHHQQI', 0x25609513, flags, kind,
                                      self.handle, offset, size) + data)

    def reply(self, size: int = 0) -> bytes:
        '''Of the last request, with @size bytes of data; raises its error'''
        magic, error, handle = struct.unpack('>IIQ', self._recv(16))
        assert magic == 0x67446698 and handle == self.handle
        if error:
            raise OSError(error, os.strerror(error))
        return self._recv(size)

    def read(self, offset: int, size: int) -> bytes:
        '''Returns the data'''
        self.send(self.READ, offset, size)
        return self.reply(size)

    def write(self, offset: int, data: bytes, fua: bool = False) -> None:
        '''@fua: the data must be stable when the request is done'''
        self.send(self.WRITE, offset, len(data), data, int(fua))
        self.reply()

    def zero(self, offset: int, size: int, unmap: bool) -> None:
        '''@unmap: the server may make a hole'''
        self.send(self.ZEROES, offset, size, flags=0 if unmap else 2)
        self.reply()

    def trim(self, offset: int, size: int) -> None:
        '''The server may discard that'''
        self.send(self.TRIM, offset, size)
        self.reply()

    def flush(self) -> None:
        '''What was written before must be stable when it is done'''
        self.send(self.FLUSH, 0, 0)
        self.reply()

    def close(self) -> None:
        '''Disconnect'''
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

    def range(self, size: int) -> Tuple[int, int]:
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
        '''A random request'''
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
        '''Compare a range with the model, or all of the disk'''
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
        '''That many random requests'''
        for _ in range(steps):
            self.step()


def small_writes(client: Client, data: bytearray, offset: int, count: int,
                 size: int = 512, byte: int = 1) -> None:
    '''Sequential writes that the filter seqcache keeps'''
    for _ in range(count):
        client.write(offset, bytes([byte]) * size)
        data[offset:offset + size] = bytes([byte]) * size
        offset += size
