# The metadata of qcow2 images
#
# qcow2_header() and compressed_clusters() look at a file.  Qcow2Image reads
# and checks an image in memory: thousands of them in the time that a hundred
# processes take.  Its rules are those of "qemu-img check".
#
# SPDX-License-Identifier: GPL-2.0-or-later

import struct
import zlib
from typing import (
    Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple
)

from qcow2_format import QcowHeader


COPIED = 1 << 63
COMPRESSED = 1 << 62
ZERO = 1
OFFSET_MASK = 0x00fffffffffffe00
L1_RESERVED = 0x7f000000000001ff
L2_RESERVED = 0x3f000000000001fe


def qcow2_header(path: str) -> Dict[str, int]:
    '''The fields of the header, by their names in qcow2_format.py'''
    with open(path, 'rb') as f:
        return dict(vars(QcowHeader(f)))


class CompressedCluster(NamedTuple):
    '''A compressed cluster that a qcow2 file's L2 tables point to'''
    guest: int
    host: int
    # Up to the end of the last sector, the data may be shorter
    host_end: int


def compressed_clusters(path: str) -> List[CompressedCluster]:
    '''
    Read the L2 tables as they are in the file.  This needs no image lock, so
    it shows what would be left if the process that has the image open died.
    '''
    header = qcow2_header(path)
    bits = header['cluster_bits']
    size = 1 << bits
    # Extended L2 entries have 128 bits
    words = 2 if header['incompatible_features'] & 0x10 else 1
    l2_len = size // 8 // words
    shift = 62 - (bits - 8)

    clusters = []
    with open(path, 'rb') as f:
        f.seek(header['l1_table_offset'])
        l1_size = header['l1_size']
        l1 = struct.unpack(f'>{l1_size}Q', f.read(8 * l1_size))
        for i, l1_entry in enumerate(l1):
            l2_offset = l1_entry & 0x00fffffffffffe00
            if not l2_offset:
                continue
            f.seek(l2_offset)
            table = f.read(size).ljust(size, b'\0')
            l2 = struct.unpack(f'>{l2_len * words}Q', table)[::words]
            for j, entry in enumerate(l2):
                if entry & (1 << 62):
                    host = entry & ((1 << shift) - 1)
                    sectors = ((entry & ((1 << 62) - 1)) >> shift) + 1
                    clusters.append(CompressedCluster(
                        (i * l2_len + j) << bits, host,
                        (host & ~511) + sectors * 512))
    return clusters


class NotQcow2(Exception):
    '''The image does not open'''


class Snapshot(NamedTuple):
    '''An entry of the snapshot table'''
    name: str
    l1_offset: int
    l1_size: int


class Problem(NamedTuple):
    '''What qemu-img check would count as a corruption'''
    kind: str
    text: str


class Inflater:
    '''Decompresses clusters, and remembers the latest ones'''

    def __init__(self, size: int) -> None:
        self.size = size
        self.known: Dict[bytes, Optional[bytes]] = {}

    def inflate(self, data: bytes) -> Optional[bytes]:
        '''None if that is not a cluster'''
        if data not in self.known:
            if len(self.known) > 4096:
                self.known.clear()
            try:
                found: Optional[bytes] = zlib.decompressobj(-12).decompress(
                    data, self.size)
            except zlib.error:
                found = None
            if found is not None and len(found) < self.size:
                found = None
            self.known[data] = found
        return self.known[data]


# pylint: disable-next=too-many-instance-attributes
class Qcow2Image:
    '''
    An image as version 3 has it, with refcounts of 16 bits, zlib, and none of:
    backing file, encryption, bitmaps, external data file, extended L2 entries
    '''

    def __init__(self, data: bytes) -> None:
        self.data = data
        (magic, version, backing, _, bits, self.size, crypt, self.l1_size,
         self.l1_offset, self.reftable_offset, self.reftable_clusters,
         nb_snapshots, self.snapshots_offset, incompatible, _, _, order) = \
            struct.unpack_from('>IIQIIQIIQQIIQQQQI', data)
        if magic != 0x514649fb or version != 3 or not 9 <= bits <= 21:
            raise NotQcow2('header')
        # The lowest one says that refcounts may be too low
        self.dirty = bool(incompatible & 1)
        if backing or crypt or incompatible > 1 or order != 4:
            raise NotQcow2('features')
        self.cluster_size = 1 << bits
        self.bits = bits
        self.csize_shift = 62 - (bits - 8)
        self.snapshots, self.snapshots_size = self.read_snapshots(nb_snapshots)
        self.reftable = self.table(self.reftable_offset,
                                   self.reftable_clusters << (bits - 3))
        self.refblocks = {
            i: self.table(entry & OFFSET_MASK, self.cluster_size // 2, 'H')
            for i, entry in enumerate(self.reftable)
            if entry & OFFSET_MASK and entry < len(data)
        }

    def table(self, offset: int, count: int, kind: str = 'Q'
              ) -> Tuple[int, ...]:
        '''Entries of a table at @offset'''
        if offset % self.cluster_size:
            raise NotQcow2(f'table at {offset}')
        try:
            return struct.unpack_from(f'>{count}{kind}', self.data, offset)
        except struct.error as e:
            raise NotQcow2(f'table at {offset}') from e

    def read_snapshots(self, count: int) -> Tuple[List[Snapshot], int]:
        '''Returns also the size of their table'''
        snapshots = []
        pos = self.snapshots_offset
        for _ in range(count):
            l1_offset, l1_size, id_len, name_len = \
                struct.unpack_from('>QIHH', self.data, pos)
            extra, = struct.unpack_from('>I', self.data, pos + 36)
            name = pos + 40 + extra + id_len
            snapshots.append(Snapshot(
                self.data[name:name + name_len].decode('utf-8', 'replace'),
                l1_offset, l1_size))
            pos = (name + name_len + 7) & ~7
        return snapshots, pos - self.snapshots_offset

    def refcount(self, cluster: int) -> int:
        '''Of a host cluster'''
        block, i = divmod(cluster, self.cluster_size // 2)
        return self.refblocks[block][i] if block in self.refblocks else 0

    def compressed(self, entry: int) -> Tuple[int, int]:
        '''Offset and stored size'''
        offset = entry & ((1 << self.csize_shift) - 1)
        sectors = ((entry & (COMPRESSED - 1)) >> self.csize_shift) + 1
        return offset, sectors * 512 - offset % 512

    # What qemu-img check does

    def check(self) -> List[Problem]:
        '''Returns what qemu-img check would complain about'''
        counts: Dict[int, int] = {}
        problems: List[Problem] = []

        def count(offset: int, size: int) -> None:
            if offset + size > -(-len(self.data) // self.cluster_size
                                 ) * self.cluster_size:
                problems.append(Problem('beyond the end', f'{offset}'))
                return
            for i in range(offset >> self.bits,
                           (offset + size - 1 >> self.bits) + 1):
                counts[i] = counts.get(i, 0) + 1

        count(0, self.cluster_size)
        count(self.l1_offset, 8 * self.l1_size)
        if self.snapshots_size:
            count(self.snapshots_offset, self.snapshots_size)
        count(self.reftable_offset, 8 * len(self.reftable))
        for snapshot in self.snapshots:
            count(snapshot.l1_offset, 8 * snapshot.l1_size)
        for l1_offset, l1_size in [(self.l1_offset, self.l1_size)] + \
                [s[1:] for s in self.snapshots]:
            for entry in self.table(l1_offset, l1_size):
                if entry:
                    self.count_l2(entry, count, problems)
        for entry in self.reftable:
            if entry:
                if entry % self.cluster_size or entry >= len(self.data):
                    problems.append(Problem('refcount block', f'{entry}'))
                else:
                    count(entry, self.cluster_size)
        self.compare_refcounts(counts, problems)
        self.check_copied(problems)
        return problems

    def count_l2(self, l1_entry: int, count: Callable[[int, int], None],
                 problems: List[Problem]) -> None:
        '''Count the references of an L2 table'''
        offset = l1_entry & OFFSET_MASK
        if l1_entry & L1_RESERVED:
            problems.append(Problem('L1 entry', f'{l1_entry:x}'))
        count(offset, self.cluster_size)
        if offset % self.cluster_size or offset >= len(self.data):
            problems.append(Problem('L2 offset', f'{l1_entry:x}'))
            return
        for entry in self.table(offset, self.cluster_size // 8):
            if entry & COMPRESSED:
                if entry & COPIED:
                    problems.append(Problem('compressed and COPIED',
                                            f'{entry:x}'))
                count(*self.compressed(entry))
            elif entry:
                if entry & L2_RESERVED:
                    problems.append(Problem('L2 entry', f'{entry:x}'))
                host = entry & OFFSET_MASK
                if host % self.cluster_size:
                    problems.append(Problem('data offset', f'{entry:x}'))
                if host:
                    count(host, self.cluster_size)

    def compare_refcounts(self, counts: Dict[int, int],
                          problems: List[Problem]) -> None:
        '''Those that are too high are leaks, and allowed'''
        for cluster, references in counts.items():
            refcount = self.refcount(cluster)
            if refcount < references:
                problems.append(Problem(
                    'refcount', f'cluster {cluster} refcount={refcount} '
                    f'reference={references}'))
        for i, entry in enumerate(self.reftable):
            if entry and counts.get(entry >> self.bits) != 1:
                problems.append(Problem('refcount block', f'{i}'))

    def check_copied(self, problems: List[Problem]) -> None:
        '''Of the active tables; an entry says COPIED if its refcount is 1'''
        def check(entry: int, what: str) -> None:
            copied = bool(entry & COPIED)
            refcount = self.refcount((entry & OFFSET_MASK) >> self.bits)
            if copied != (refcount == 1):
                problems.append(Problem(
                    'COPIED', f'{what} entry={entry:x} refcount={refcount}'))

        for l1_entry in self.table(self.l1_offset, self.l1_size):
            offset = l1_entry & OFFSET_MASK
            if not offset:
                continue
            check(l1_entry, 'L1')
            if offset % self.cluster_size or offset >= len(self.data):
                continue
            for entry in self.table(offset, self.cluster_size // 8):
                if not entry & COMPRESSED and entry & OFFSET_MASK:
                    check(entry, 'L2')

    # What the guest sees

    def guest(self, inflater: Inflater, snapshot: Optional[str] = None
              ) -> Iterator[Optional[bytes]]:
        '''Its clusters; None for one whose data cannot be decompressed'''
        l1_offset, l1_size = self.l1_offset, self.l1_size
        if snapshot is not None:
            _, l1_offset, l1_size = [s for s in self.snapshots
                                     if s.name == snapshot][0]
        zero = bytes(self.cluster_size)
        words = self.cluster_size // 8
        left = self.size >> self.bits
        for l1_entry in self.table(l1_offset, l1_size):
            offset = l1_entry & OFFSET_MASK
            count = min(words, left)
            left -= count
            for entry in self.table(offset, count) if offset else (0,) * count:
                if entry & COMPRESSED:
                    start, size = self.compressed(entry)
                    yield inflater.inflate(self.data[start:start + size])
                elif entry & ZERO or not entry & OFFSET_MASK:
                    yield zero
                else:
                    start = entry & OFFSET_MASK
                    yield self.data[start:start + self.cluster_size]
