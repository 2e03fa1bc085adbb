# What the tests of the seqcache filter's uses share
#
# This work is licensed under the terms of the GNU GPL, version 2 or later.
# See the COPYING file in the top-level directory.
#
# SPDX-License-Identifier: GPL-2.0-or-later

import os
import shutil
import struct
from typing import Any, Dict, List, NamedTuple, Union

from qcow2_compressed_cache import Machine, dashes
from qemu.machine import QEMUMachine
import iotests


def seqcache_node(file: Union[str, Dict[str, Any]],
                  **kwargs: Any) -> Dict[str, Any]:
    return {'driver': 'seqcache', 'file': file, **dashes(kwargs)}


def image_opts(node: Dict[str, Any]) -> str:
    '''The options of a node for --image-opts'''
    def flatten(prefix: str, value: Any) -> List[str]:
        if isinstance(value, dict):
            return [opt for key, member in value.items()
                    for opt in flatten(f'{prefix}.{key}' if prefix else key,
                                       member)]
        if isinstance(value, bool):
            value = 'on' if value else 'off'
        return [f'{prefix}={value}']

    return ','.join(flatten('', node))


def seqcache_stats(machine: Union[Machine, QEMUMachine],
                   node: str) -> Dict[str, int]:
    '''The statistics of a seqcache node'''
    nodes: Any = machine.cmd('query-blockstats', {'query-nodes': True})
    for stats in nodes:
        if stats['node-name'] == node:
            specific = dict(stats['driver-specific'])
            assert specific.pop('driver') == 'seqcache'
            return specific
    raise AssertionError(f'no node {node}')


def skip_without(case: iotests.QMPTestCase, *programs: str) -> None:
    for program in programs:
        if not shutil.which(program):
            case.case_skip(f'{case.id()}: {program} not installed')


class Write(NamedTuple):
    '''A write that reached a WriteLog'''
    offset: int
    bytes: int


class WriteLog:
    '''
    A node that has blocks of the given size, may grow, and logs what is
    written to it: blklogwrites above a file node.  Call writes() when the node
    is closed; it misses what came after the last flush.
    '''

    # Of an entry in the log
    FLUSH = 1 << 0
    DISCARD = 1 << 2

    def __init__(self, file: Dict[str, Any], block_size: int = 4096) -> None:
        self.log = os.path.join(iotests.test_dir, 'write-log')
        self.node = {
            'driver': 'blklogwrites', 'log-sector-size': block_size,
            'file': file, 'log': {'driver': 'file', 'filename': self.log}
        }
        with open(self.log, 'wb'):
            pass

    def remove(self) -> None:
        iotests.try_remove(self.log)

    def writes(self) -> List[Write]:
        '''In the order of the log; zero writes as well'''
        found = []
        with open(self.log, 'rb') as f:
            _, _, nb_entries, size = struct.unpack('<QQQI', f.read(28))
            assert nb_entries
            f.seek(size)
            for _ in range(nb_entries):
                sector, count, flags = struct.unpack('<QQQ', f.read(24))
                f.seek(size - 24, os.SEEK_CUR)
                if not flags & (self.FLUSH | self.DISCARD):
                    found.append(Write(sector * size, count * size))
                    f.seek(count * size, os.SEEK_CUR)
        return found
