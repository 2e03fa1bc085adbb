# A disk that records what reaches it, and what can be left on it when its
# power fails
#
# The disk is an NBD server with a volatile write cache.  It answers concurrent
# requests in random order.  A write is safe only if it was answered before a
# flush arrived that was answered, too (or if it had FUA).  When the power
# fails, of all other writes any may be there, wholly or some of their sectors,
# or not.  A discard leaves anything.
#
# Each test case of PowerCuts goes through the logs of random work until it has
# seen 60 different images, and at least one whole log: what is there at each
# request, and a random one for every other.  With TEST_SCALE, there are more,
# and the same work is done with the cache off as well.
#
# SPDX-License-Identifier: GPL-2.0-or-later

import collections
import random
import select
from typing import (
    Any, Counter, Dict, Iterator, List, NamedTuple, Optional, Set, Tuple
)

from nbd_server import (
    FLUSH, READ, TRIM, WRITE, WRITE_ZEROES, Connection, Handler, Request,
    ScriptedNbd, handle_read
)
from suite import add_figures, first_seed, scale
import iotests


nb_images = 60 * scale


SECTOR = 512

REQ_FUA = 1 << 0

# What a discarded sector may contain
GARBAGE = b'\xa5' * SECTOR


class Arrived(NamedTuple):
    '''A request that changes the disk, or a flush, has arrived'''
    id: int
    req: Request


class Answered(NamedTuple):
    '''The disk has answered the request'''
    id: int


class Issued(NamedTuple):
    '''
    Somebody above began to write this; @data is None for a discard after which
    there may be anything
    '''
    id: int
    offset: int
    size: int
    data: Optional[bytes]


class Safe(NamedTuple):
    '''
    A flush above was successful: @size bytes that must be there from now on
    (@data is None: any).  @ids tells what was Issued, and cannot come back.
    '''
    offset: int
    size: int
    data: Optional[bytes]
    ids: Tuple[int, ...] = ()


class Note(NamedTuple):
    '''Something else that a test wants to know about this moment'''
    what: Any


class RecordingDisk(ScriptedNbd):
    '''A disk full of @data; @rand decides in what order it answers'''

    def __init__(self, path: str, data: bytes, block_size: int,
                 rand: random.Random) -> None:
        self.content = bytearray(data)
        self.initial = bytes(data)
        self.rand = rand
        self.log: List[Any] = []
        self.pending: List[Tuple[int, Request]] = []
        self.nb_arrived = 0
        super().__init__(path, len(data))
        self.block_sizes = (block_size, 65536, 32 * 1024 * 1024)

    def __enter__(self) -> 'RecordingDisk':
        return self

    def note(self, req: Request) -> Handler:
        return RecordingDisk.handle

    def read(self, offset: int, length: int) -> bytes:
        return bytes(self.content[offset:offset + length])

    @staticmethod
    def handle(conn: Connection, req: Request) -> None:
        '''Record the request, and answer some'''
        disk = conn.server
        assert isinstance(disk, RecordingDisk)
        if req.type == READ:
            handle_read(conn, req)
        elif req.type in (WRITE, WRITE_ZEROES, TRIM, FLUSH):
            disk.log.append(Arrived(disk.nb_arrived, req))
            disk.pending.append((disk.nb_arrived, req))
            disk.nb_arrived += 1
        else:
            ScriptedNbd.note(disk, req)(conn, req)
        # Answer when nothing more comes, at once or within some time
        while disk.pending:
            wait = disk.rand.choice((0, 0, 0, 0, 0.0005, 0.0005, 0.0005, 0.01))
            if select.select([conn.sock], [], [], wait)[0]:
                return
            disk.answer(conn, disk.pending.pop(
                disk.rand.randrange(len(disk.pending))))

    def answer(self, conn: Connection, pending: Tuple[int, Request]) -> None:
        '''Do one of those that are pending'''
        number, req = pending
        if req.type == WRITE:
            self.content[req.offset:req.offset + req.length] = req.data
        elif req.type in (WRITE_ZEROES, TRIM):
            self.content[req.offset:req.offset + req.length] = \
                bytes(req.length)
        self.log.append(Answered(number))
        conn.done(req)


class Promise:
    '''
    What somebody above the disk may rely on: what was there at the last flush,
    and sector by sector what was written since
    '''

    def __init__(self, data: bytes) -> None:
        self.content = bytearray(data)
        # Sectors for which nothing is promised
        self.unknown: Set[int] = set()
        # What else sectors may contain, by the number of who wrote it; None
        # allows everything
        self.newer: Dict[int, Dict[int, Optional[bytes]]] = {}

    def issued(self, op: Issued) -> None:
        '''From now on it may be there'''
        for i in range(0, op.size, SECTOR):
            self.newer.setdefault((op.offset + i) // SECTOR, {})[op.id] = \
                None if op.data is None else op.data[i:i + SECTOR]

    def safe(self, op: Safe) -> None:
        '''From now on it must be there'''
        sectors = range(op.offset // SECTOR, (op.offset + op.size) // SECTOR)
        if op.data is None:
            self.unknown.update(sectors)
        else:
            self.content[op.offset:op.offset + op.size] = op.data
            self.unknown.difference_update(sectors)
        for sector in sectors:
            newer = self.newer.get(sector, {})
            for number in op.ids:
                newer.pop(number, None)
            if not newer:
                self.newer.pop(sector, None)

    def is_written(self, offset: int, size: int) -> bool:
        '''Whether any of these sectors was written since the last flush'''
        return any(sector in self.newer for sector in
                   range(offset // SECTOR, (offset + size) // SECTOR))

    def broken(self, offset: int, data: Optional[bytes], size: int
               ) -> Tuple[List[int], List[int]]:
        '''
        Compare what was read (None: it cannot be read).  Returns the sectors
        that lost what a flush made safe, and those that were written since and
        have neither the old nor any of the new contents
        '''
        lost: List[int] = []
        mixed: List[int] = []
        if data == self.content[offset:offset + size]:
            return lost, mixed
        for i in range(0, size, SECTOR):
            sector = (offset + i) // SECTOR
            found = None if data is None else data[i:i + SECTOR]
            if found is not None and (
                    sector in self.unknown or
                    found == self.content[offset + i:offset + i + SECTOR]):
                continue
            newer = self.newer.get(sector)
            if newer is None:
                lost.append(sector)
            elif found is None or (None not in newer.values() and
                                   found not in newer.values()):
                mixed.append(sector)
        return lost, mixed


class Recorder:
    '''Writes into the log of a disk what happens above it'''

    def __init__(self, log: List[Any]) -> None:
        self.log = log
        self.nb_issued = 0
        # What no flush has covered yet
        self.accepted: List[Issued] = []

    def issue(self, offset: int, size: int, data: Optional[bytes]) -> Issued:
        '''@data is about to be written; None: a discard'''
        op = Issued(self.nb_issued, offset, size, data)
        self.nb_issued += 1
        self.log.append(op)
        return op

    def accept(self, op: Issued) -> None:
        '''The write was successful'''
        self.accepted.append(op)

    def accept_fua(self, op: Issued) -> None:
        '''It is safe, and what was written before does not come back'''
        self.accept(op)
        self.log.append(Safe(op.offset, op.size, op.data,
                                  tuple(a.id for a in self.accepted)))

    def flush_begins(self) -> List[Issued]:
        '''Returns what it will cover, for flush_ends()'''
        accepted, self.accepted = self.accepted, []
        return accepted

    def flush_ends(self, accepted: List[Issued]) -> None:
        '''It was successful'''
        for op in sorted(accepted):
            self.log.append(Safe(op.offset, op.size, op.data, (op.id,)))

    def note(self, what: Any) -> None:
        '''Remember this for Cut.notes'''
        self.log.append(Note(what))


class Cut(NamedTuple):
    '''What is left on the disk when the power fails'''
    data: bytes
    # How many entries of the log come before
    position: int
    # Whether all that was answered is there, and nothing else
    in_order: bool
    promise: Promise
    # How often something had become safe
    nb_promises: int
    # Of Note, so far
    notes: List[Any]


# pylint: disable-next=too-many-instance-attributes
class Replay:
    '''
    Goes through the log of a disk, and cuts the power

    :param promised: what is promised in the beginning, above the disk
    '''

    def __init__(self, disk: RecordingDisk, promised: bytes,
                 rand: random.Random) -> None:
        self.log = disk.log
        self.rand = rand
        self.base = bytearray(disk.initial)
        # Everything that may or may not be there, in the order of arrival,
        # and which of that was answered, in this order
        self.volatile: Dict[int, Request] = {}
        self.answered: List[int] = []
        # Those of them that are certainly there: they had FUA
        self.fua: Set[int] = set()
        # What a flush that has arrived will cover
        self.covered: Dict[int, Set[int]] = {}
        self.promise = Promise(promised)
        self.notes: List[Any] = []
        self.seen: Set[Tuple[int, int]] = set()
        self.nb_promises = 0

    def cuts(self) -> Iterator[Cut]:
        '''All of them differ, in the image or in what is promised'''
        for i, event in enumerate(self.log):
            self.step(event)
            if isinstance(event, (Arrived, Answered)):
                yield from self.distinct(i, self.apply(self.answered, 1, 0),
                                         True)
                count = self.rand.getrandbits(1)
                for _ in range(count if self.volatile else 0):
                    yield from self.distinct(i, self.random_image(), False)
            elif isinstance(event, Safe) and (
                    i + 1 == len(self.log) or
                    not isinstance(self.log[i + 1], Safe)):
                yield from self.distinct(i, self.apply(self.answered, 0, 0),
                                         False)

    def distinct(self, i: int, data: bytes, in_order: bool) -> Iterator[Cut]:
        '''The cut, if there was no such image yet'''
        key = (hash(data), self.nb_promises)
        if key not in self.seen:
            self.seen.add(key)
            yield Cut(data, i + 1, in_order, self.promise, self.nb_promises,
                      self.notes)

    def step(self, event: Any) -> None:
        '''Do what the log says next'''
        if isinstance(event, Arrived):
            if event.req.type == FLUSH:
                self.covered[event.id] = set(self.answered)
            else:
                self.volatile[event.id] = event.req
        elif isinstance(event, Answered):
            if event.id in self.covered:
                self.persist(self.covered.pop(event.id))
            else:
                self.answered.append(event.id)
                if self.volatile[event.id].flags & REQ_FUA:
                    self.fua.add(event.id)
        elif isinstance(event, Issued):
            self.promise.issued(event)
        elif isinstance(event, Safe):
            self.promise.safe(event)
            self.nb_promises += 1
        elif isinstance(event, Note):
            self.notes.append(event.what)

    def persist(self, ids: Set[int]) -> None:
        '''A flush has made these safe'''
        for number in self.answered:
            if number in ids:
                self.change(self.base, self.volatile.pop(number), 1, 0)
        self.answered = [n for n in self.answered if n not in ids]

    def random_image(self) -> bytes:
        '''Of what is not safe, some is there'''
        order = list(self.answered)
        for number in self.volatile:
            if number not in self.answered:
                order.insert(self.rand.randrange(len(order) + 1), number)
        return self.apply(order, self.rand.choice((0.1, 0.5, 0.5, 0.9)),
                          self.rand.choice((0, 0.3)))

    def apply(self, order: List[int], keep: float, tear: float) -> bytes:
        '''What is safe, and these with the probability @keep'''
        data = bytearray(self.base)
        for number in order:
            if number in self.fua:
                self.change(data, self.volatile[number], 1, 0)
            elif self.rand.random() < keep:
                self.change(data, self.volatile[number], keep, tear)
        return bytes(data)

    def change(self, data: bytearray, req: Request, keep: float,
               tear: float) -> None:
        '''Do a request, wholly or some of its sectors'''
        torn = tear and self.rand.random() < tear
        if not torn and req.type != TRIM:
            data[req.offset:req.offset + req.length] = \
                req.data or bytes(req.length)
            return
        for i in range(0, req.length, SECTOR):
            if req.type == TRIM:
                piece = self.rand.choice((None, bytes(SECTOR), GARBAGE))
            elif self.rand.random() < keep:
                piece = req.data[i:i + SECTOR] or bytes(SECTOR)
            else:
                piece = None
            if piece is not None:
                start = req.offset + i
                data[start:start + SECTOR] = piece


class PowerCuts(iotests.QMPTestCase):
    '''Subclasses say what the work is, and what is wrong with an image'''
    # In the beginning
    promised: bytes

    def setUp(self) -> None:
        self.seed = first_seed()
        self.rand = random.Random()
        self.tally: Counter[str] = collections.Counter()
        # Units that were written since a flush and came out as a mixture
        self.mixed: Set[Tuple[Any, ...]] = set()

    def tearDown(self) -> None:
        for kind, order, *_ in self.mixed:
            self.tally[f'{kind} mixed units {order}'] += 1
        add_figures(self, self.tally)

    def record(self, cache: bool) -> RecordingDisk:
        '''Do some work, which depends on self.rand'''
        raise NotImplementedError

    def look_at(self, cut: Cut, kind: str) -> None:
        '''Call count(); fail if something is wrong'''
        raise NotImplementedError

    def count(self, cut: Cut, kind: str, lost: bool, mixed: List[int]) -> int:
        '''
        @lost is what must never be.  @mixed are units of which the same may be
        said for a disk, but not for a qcow2 image.
        '''
        order = 'in order' if cut.in_order else 'reordered'
        self.tally[f'{kind} images'] += 1
        self.tally[f'{kind} images {order}'] += 1
        self.tally[f'{kind} lost'] += lost
        self.tally[f'{kind} mixed {order}'] += bool(mixed)
        self.mixed.update((kind, order, self.seed, cut.nb_promises, unit)
                          for unit in mixed)
        return self.tally[f'{kind} images']

    def do_test(self) -> None:
        '''Go through the work until there were enough images'''
        images = 0
        while images < nb_images:
            for cache in (True, False) if scale > 1 else (True,):
                with self.subTest(seed=self.seed, cache=cache):
                    self.rand = random.Random(self.seed)
                    disk = self.record(cache)
                    replay = Replay(disk, self.promised,
                                    random.Random(self.seed))
                    kind = 'cache' if cache else 'stock'
                    self.tally[f'{kind} requests'] += disk.nb_arrived
                    for cut in replay.cuts():
                        images += cache
                        self.look_at(cut, kind)
            self.seed += 1
        for order in ('in order', 'reordered'):
            self.assertGreater(self.tally[f'cache images {order}'],
                               nb_images // 10)
