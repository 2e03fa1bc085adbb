# The filter blklogwrites, and what its log says
#
# SPDX-License-Identifier: GPL-2.0-or-later

import os
import struct
from typing import Iterator, List, NamedTuple

from images import Node
from iotests import file_path


# Flags of entries
FLUSH = 1 << 0
DISCARD = 1 << 2


class Entry(NamedTuple):
    '''An entry of the log'''
    offset: int
    bytes: int
    flags: int


class WriteLog:
    '''
    A node that has blocks of @block_size, may grow, and logs what is written
    to it.  Read the log when the node is closed; it misses what came after the
    last flush.
    '''

    def __init__(self, file: Node, block_size: int = 4096) -> None:
        self.log = file_path('write-log')
        self.node: Node = {
            'driver': 'blklogwrites', 'log-sector-size': block_size,
            'file': file, 'log': {'driver': 'file', 'filename': self.log}
        }
        with open(self.log, 'wb'):
            pass

    def entries(self) -> Iterator[Entry]:
        '''All of them, in the order of the log'''
        with open(self.log, 'rb') as f:
            # Empty before the first flush
            _, _, nb_entries, size = struct.unpack('<QQQI', f.read(28) or
                                                   bytes(28))
            f.seek(size)
            for _ in range(nb_entries):
                sector, count, flags = struct.unpack('<QQQ', f.read(24))
                f.seek(size - 24, os.SEEK_CUR)
                yield Entry(sector * size, count * size, flags)
                if not flags & DISCARD:
                    f.seek(count * size, os.SEEK_CUR)

    def writes(self) -> List[Entry]:
        '''Without flushes and discards, but with zero writes'''
        return [e for e in self.entries() if not e.flags & (FLUSH | DISCARD)]
