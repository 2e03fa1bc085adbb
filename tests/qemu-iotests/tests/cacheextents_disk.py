# What the tests of the filter cacheextents share
#
# This work is licensed under the terms of the GNU GPL, version 2 or later.
# See the COPYING file in the top-level directory.
#
# SPDX-License-Identifier: GPL-2.0-or-later

import re
from typing import Any, Dict, List, Union

from qcow2_compressed_cache import (
    KiB, Machine, NbdDisk, Request, dashes, random_bytes
)
import iotests


NodeRef = Union[str, Dict[str, Any]]


def cacheextents_node(file: NodeRef, **kwargs: Any) -> Dict[str, Any]:
    return {'driver': 'cacheextents', 'file': file, **dashes(kwargs)}


def raw_node(file: NodeRef, **kwargs: Any) -> Dict[str, Any]:
    return {'driver': 'raw', 'file': file, **dashes(kwargs)}


def cacheextents_stats(machine: Machine, node: str) -> Dict[str, int]:
    '''The statistics of a cacheextents node'''
    nodes: Any = machine.cmd('query-blockstats', {'query-nodes': True})
    for stats in nodes:
        if stats['node-name'] == node:
            specific = dict(stats['driver-specific'])
            assert specific.pop('driver') == 'cacheextents'
            return specific
    raise AssertionError(f'no node {node}')


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
        return [r for r in self.requests() if r.type == 'Extents']

    def data_requests(self) -> List[Request]:
        return [r for r in self.requests() if r.type != 'Extents']


def make_disk(path: str, size: int, extents: int) -> None:
    '''A file in which that many pieces of 64 KiB are data, the rest holes'''
    iotests.try_remove(path)
    with open(path, 'wb') as f:
        f.truncate(size)
    step = size // extents // (64 * KiB) * 64 * KiB
    assert step >= 128 * KiB
    for i in range(extents):
        with open(path, 'r+b') as f:
            f.seek(i * step)
            f.write(random_bytes(64 * KiB, i))
