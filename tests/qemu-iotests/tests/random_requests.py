# Random requests to a seqcache filter on a raw disk, with flushes, and notes
# of what they promise
#
# SPDX-License-Identifier: GPL-2.0-or-later

import random
from typing import List, Optional, Tuple

from images import KiB
from power_cut import SECTOR, Issued, Recorder
from qemuio import QemuIo


# The filter's
cluster = 16 * KiB


class Requests:
    '''Writes to @recorder what is done with @io, a disk of @size bytes'''
    kinds = [('stream', 12), ('burst', 3), ('overwrite', 3), ('large', 1),
             ('anywhere', 2), ('fua', 2), ('zero', 2), ('discard', 2),
             ('flush', 2), ('flush of some', 1)]

    def __init__(self, io: QemuIo, recorder: Recorder, size: int,
                 rand: random.Random) -> None:
        self.io = io
        self.recorder = recorder
        self.size = size
        self.rand = rand
        self.streams = [self.place(SECTOR) for _ in range(4)]
        self.latest = [(0, SECTOR)]

    def place(self, align: int, size: int = 0) -> int:
        '''A random offset; with @size, within the disk'''
        return self.rand.randrange((self.size - size) // align + 1) * align \
            if size else self.rand.randrange(self.size // align) * align

    def sectors(self, most: int) -> int:
        '''A random size of at most @most bytes'''
        return self.rand.randrange(1, most // SECTOR + 1) * SECTOR

    def where(self, kind: str) -> Tuple[int, int]:
        '''Offset and size'''
        if kind == 'overwrite':
            offset, size = self.rand.choice(self.latest)
            offset += self.sectors(size) - SECTOR
            size = self.sectors(8 * KiB)
        elif kind == 'large':
            size = cluster * self.rand.randrange(1, 9)
            offset = self.place(cluster)
        elif kind in ('anywhere', 'zero', 'discard'):
            offset, size = self.place(SECTOR), self.sectors(2 * cluster)
        else:
            i = self.rand.randrange(len(self.streams))
            offset, size = self.streams[i], self.sectors(8 * KiB)
            size = min(size, self.size - offset)
            end = offset + size
            self.streams[i] = end if end < self.size and \
                self.rand.randrange(20) else self.place(SECTOR)
        size = min(size, self.size - offset)
        self.latest = self.latest[-7:] + [(offset, size)]
        return offset, size

    def change(self, kind: str, aio: str = '',
               place: Optional[Tuple[int, int]] = None) -> Tuple[Issued, str]:
        '''Returns what is about to be issued, and the command for it'''
        offset, size = place or self.where(kind)
        data: Optional[bytes] = None
        if kind == 'discard':
            cmd = 'discard'
        elif kind == 'zero':
            data = bytes(size)
            cmd = f'{aio}write -z {self.rand.choice(("", "-u"))}'
        else:
            pattern = self.rand.randrange(1, 256)
            data = bytes([pattern]) * size
            cmd = f'{aio}write {"-f" * (kind == "fua")} -P {pattern}'
        return (self.recorder.issue(offset, size, data),
                f'{cmd} {offset} {size}')

    def burst(self) -> List[Tuple[Issued, str]]:
        '''Concurrent requests that do not overlap'''
        places: List[Tuple[int, int]] = []
        for _ in range(self.rand.randrange(2, 9)):
            offset, size = self.where('stream')
            if all(offset + size <= o or o + s <= offset for o, s in places):
                places.append((offset, size))
        return [self.change('stream', 'aio_', place) for place in places]

    def run(self, count: int) -> None:
        '''Make @count requests'''
        names, weights = zip(*self.kinds)
        for kind in self.rand.choices(names, weights, k=count):
            if kind == 'flush':
                accepted = self.recorder.flush_begins()
                self.io.ok('flush')
                self.recorder.flush_ends(accepted)
            elif kind in ('burst', 'flush of some'):
                self.run_burst(kind == 'flush of some')
            else:
                op, cmd = self.change(kind)
                self.io.ok(cmd)
                if kind == 'fua':
                    self.recorder.accept_fua(op)
                else:
                    self.recorder.accept(op)

    def run_burst(self, flush: bool) -> None:
        '''A flush meanwhile covers only what was accepted before'''
        accepted = self.recorder.flush_begins() if flush else []
        ops = self.burst()
        # The prompt comes at once, the results later
        for _, cmd in ops:
            self.io.cmd(cmd)
        if flush:
            self.io.cmd('flush')
            self.recorder.flush_ends(accepted)
        self.io.ok('aio_flush')
        for op, _ in ops:
            self.recorder.accept(op)

    def commands(self, count: int) -> List[str]:
        '''
        Requests that are about to be issued; nobody waits for their results.
        In between there are flushes.
        '''
        cmds = []
        for _ in range(count):
            kind = self.rand.choice(('stream', 'stream', 'overwrite', 'zero',
                                     'discard', 'flush'))
            cmds.append('flush' if kind == 'flush' else self.change(kind)[1])
        return cmds
