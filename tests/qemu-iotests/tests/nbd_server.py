# An NBD server for tests of the client, which can be told to misbehave
#
# It speaks fixed newstyle on a UNIX socket, in threads of the test's process.
# Without a script it is a sparse disk in memory.  A test changes attributes to
# describe the export, and appends functions to the scripts to take over single
# requests:
#
#     def lie(conn: Connection, req: Request) -> None:
#         conn.status(req, [(0, ZERO)])
#
#     with ScriptedNbd(path, 1024 * 1024) as server:
#         server.extents = [(65536, HOLE_ZERO), (1024 * 1024 - 65536, 0)]
#         server.scripts[BLOCK_STATUS].append(lie)
#         qemu_img('map', server.json())
#         assert server.dropped and server.count(BLOCK_STATUS) == 1
#
# SPDX-License-Identifier: GPL-2.0-or-later

import bisect
import itertools
import json
import os
import socket
import struct
import threading
from typing import (
    Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple
)


# Requests
READ = 0
WRITE = 1
DISC = 2
FLUSH = 3
TRIM = 4
WRITE_ZEROES = 6
BLOCK_STATUS = 7

# Flags of requests
FUA = 1 << 0
REQ_ONE = 1 << 3

# Flags of the export
READ_ONLY = 1 << 1
SEND_FLUSH = 1 << 2
SEND_FUA = 1 << 3
SEND_TRIM = 1 << 5
SEND_WRITE_ZEROES = 1 << 6
SEND_FAST_ZERO = 1 << 11

# Status of an extent
DATA = 0
HOLE = 1
ZERO = 2
HOLE_ZERO = HOLE | ZERO

# Chunks of a structured reply
CHUNK_NONE = 0
CHUNK_OFFSET_DATA = 1
CHUNK_OFFSET_HOLE = 2
CHUNK_BLOCK_STATUS = 5
CHUNK_BLOCK_STATUS_EXT = 6
CHUNK_ERROR = 0x8001
DONE = 1

MAX_PAYLOAD = 32 * 1024 * 1024

BLOCK = 65536

# Errors on the wire
EPERM = 1
EIO = 5
ENOMEM = 12
EINVAL = 22
ENOSPC = 28

EXPORT_NAME, ABORT, LIST, INFO, GO = 1, 2, 3, 6, 7
STRUCTURED_REPLY, LIST_META, SET_META, EXTENDED_HEADERS = 8, 9, 10, 11
REP_ACK, REP_SERVER, REP_INFO, REP_META_CONTEXT = 1, 2, 3, 4
REP_ERR_UNSUP = 1 << 31 | 1

INFO_EXPORT = 0
INFO_BLOCK_SIZE = 3

Extents = Sequence[Tuple[int, int]]  # (length, status)


class Request(NamedTuple):
    """What the client asked"""
    type: int
    flags: int
    cookie: int
    offset: int
    length: int
    data: bytes = b''


class Closed(Exception):
    """The client has closed the connection"""


class Hangup(Exception):
    """We close the connection"""


Handler = Callable[['Connection', Request], None]


class Connection:
    """One client's connection, with the means to answer it"""

    def __init__(self, server: 'ScriptedNbd', sock: socket.socket) -> None:
        self.server = server
        self.sock = sock
        self.structured = False
        self.extended = False
        self.contexts: Dict[str, int] = {}

    def recv(self, size: int) -> bytes:
        """Exactly that many bytes"""
        data = bytearray()
        while len(data) < size:
            try:
                piece = self.sock.recv(size - len(data))
            except OSError as e:
                raise Closed from e
            if not piece:
                raise Closed
            data += piece
        return bytes(data)

    def send(self, data: bytes) -> None:
        """Anything, also what is no NBD at all"""
        try:
            self.sock.sendall(data)
        except OSError as e:
            raise Closed from e

    def disconnect(self) -> None:
        """Drop the connection; what was sent before still arrives"""
        raise Hangup

    # Replies

    def simple(self, req: Request, error: int = 0, data: bytes = b'') -> None:
        """A simple reply; data only for READ"""
        self.send(struct.pack('>IIQ', 0x67446698, error, req.cookie) + data)

    def chunk(self, req: Request, kind: int, payload: bytes = b'',
              flags: int = DONE, length: Optional[int] = None) -> None:
        """
        A chunk of a structured reply, in the width that was negotiated.
        @length is what the header says, if that is not the payload's.
        """
        if length is None:
            length = len(payload)
        if self.extended:
            head = struct.pack('>IHHQQQ', 0x6e8a278c, flags, kind, req.cookie,
                               req.offset, length)
        else:
            head = struct.pack('>IHHQI', 0x668e33ef, flags, kind, req.cookie,
                               length)
        self.send(head + payload)

    def error(self, req: Request, error: int, flags: int = DONE) -> None:
        """@error is one of the protocol's, which are Linux's"""
        if self.structured:
            self.chunk(req, CHUNK_ERROR, struct.pack('>IH', error, 0), flags)
        else:
            self.simple(req, error)

    def done(self, req: Request) -> None:
        """Success without data"""
        if self.structured:
            self.chunk(req, CHUNK_NONE)
        else:
            self.simple(req)

    def status_payload(self, extents: Extents, *, count: Optional[int] = None,
                       context: Optional[int] = None) -> bytes:
        """The payload of a chunk with extents, in the negotiated width"""
        if context is None:
            context = next(iter(self.contexts.values()))
        flat = itertools.chain.from_iterable(extents)
        if not self.extended:
            return struct.pack(f'>I{2 * len(extents)}I', context, *flat)
        if count is None:
            count = len(extents)
        return struct.pack(f'>II{2 * len(extents)}Q', context, count, *flat)

    @property
    def status_chunk(self) -> int:
        """The type of a chunk with extents, in the negotiated width"""
        return CHUNK_BLOCK_STATUS_EXT if self.extended else CHUNK_BLOCK_STATUS

    def status(self, req: Request, extents: Extents, flags: int = DONE,
               **kwargs: Any) -> None:
        """A chunk with extents"""
        self.chunk(req, self.status_chunk,
                   self.status_payload(extents, **kwargs), flags)

    # The handshake

    def reply_option(self, option: int, kind: int, data: bytes = b'') -> None:
        """Answer to an option"""
        self.send(struct.pack('>QIII', 0x3e889045565a9, option, kind,
                              len(data)) + data)

    def handshake(self) -> None:
        """Until the client has chosen the export"""
        self.send(b'NBDMAGICIHAVEOPT' + struct.pack('>H', 3))
        self.recv(4)
        while True:
            _, option, length = struct.unpack('>QII', self.recv(16))
            data = self.recv(length)
            if option == EXPORT_NAME:
                self.send(struct.pack('>QH', self.server.size,
                                      self.server.flags | 1))
                return
            if option == ABORT:
                self.disconnect()
            if self.option(option, data) and option == GO:
                return

    def option(self, option: int, data: bytes) -> bool:
        """Returns whether the option was acknowledged"""
        server = self.server
        if option == STRUCTURED_REPLY and server.structured:
            self.structured = True
        elif option == EXTENDED_HEADERS and server.extended:
            self.structured = self.extended = True
        elif option == LIST:
            self.reply_option(option, REP_SERVER, struct.pack('>I', 0))
        elif option in (LIST_META, SET_META) and server.structured:
            self.meta_contexts(option, data)
        elif option in (INFO, GO):
            for info in server.infos():
                self.reply_option(option, REP_INFO, info)
            if not server.go:
                self.reply_option(option, REP_ERR_UNSUP)
                return False
        else:
            self.reply_option(option, REP_ERR_UNSUP)
            return False
        self.reply_option(option, REP_ACK)
        return True

    def meta_contexts(self, option: int, data: bytes) -> None:
        """Answer to the option about contexts"""
        pos = 4 + struct.unpack_from('>I', data)[0]
        n, = struct.unpack_from('>I', data, pos)
        pos += 4
        for _ in range(n):
            length, = struct.unpack_from('>I', data, pos)
            name = data[pos + 4:pos + 4 + length].decode()
            pos += 4 + length
            if name in self.server.contexts:
                context = self.server.contexts[name]
                if option == SET_META:
                    self.contexts[name] = context
                self.reply_option(option, REP_META_CONTEXT,
                                  struct.pack('>I', context) + name.encode())

    # Requests

    def request(self) -> Request:
        """The next one"""
        magic, = struct.unpack('>I', self.recv(4))
        if magic != (0x21e41c71 if self.extended else 0x25609513):
            # A client that does not like the handshake sends another option
            raise Closed
        req = Request(*struct.unpack('>HHQQQ' if self.extended else '>HHQQI',
                                     self.recv(28 if self.extended else 24)))
        # On the wire, the flags come first
        req = req._replace(type=req.flags, flags=req.type)
        if req.type == WRITE:
            req = req._replace(data=self.recv(req.length))
        return req

    def run(self) -> None:
        """Serve the client until either side disconnects"""
        self.handshake()
        self.server.note_connected()
        try:
            while True:
                req = self.request()
                handler = self.server.note(req)
                if req.type == DISC:
                    return
                handler(self, req)
        except Closed:
            self.server.note_dropped()


# pylint: disable=too-many-instance-attributes
class ScriptedNbd:
    """
    The server and the export.  Attributes may be changed at any time; those of
    the handshake are used by the next connection.

    :param path: of the UNIX socket
    :param size: of the export, in bytes
    """

    def __init__(self, path: str, size: int) -> None:
        self.path = path

        # Drivers of filter nodes in json(), the topmost first
        self.filters: List[str] = []

        # Handshake
        self.size = size
        self.flags = (SEND_FLUSH | SEND_FUA | SEND_TRIM | SEND_WRITE_ZEROES |
                      SEND_FAST_ZERO)
        self.structured = True
        self.extended = False
        self.go = True
        self.contexts = {'base:allocation': 0x5eed}
        # (minimum, preferred, maximum); None: say nothing about block sizes
        self.block_sizes: Optional[Tuple[int, int, int]] = None
        self.info_order = [INFO_BLOCK_SIZE, INFO_EXPORT]

        # What to do before the next handshakes, used up one by one
        self.at_connect: List[Callable[[], None]] = []

        # What block status says; an empty list: everything is data
        self.extents: Extents = []
        # Send all extents even if the client wants one
        self.ignore_req_one = False

        # Handlers of the next requests of each type, used up one by one
        self.scripts: Dict[int, List[Handler]] = {
            kind: [] for kind in HANDLERS
        }

        # What has happened: all requests, in order; how many handshakes were
        # completed; how many of these connections the client dropped, that is,
        # ended without DISC
        self.requests: List[Request] = []
        self.connections = 0
        self.dropped = 0

        # The ends of extents, computed when it is replaced
        self.ends: List[int] = []
        self.ends_of: Optional[Extents] = None

        # The disk; what is not there is zero
        self.blocks: Dict[int, bytes] = {}

        self.changed = threading.Condition()
        self.stopping = False
        self.open: List[Connection] = []
        self.threads: List[threading.Thread] = []
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(path)
        self.listener.listen()
        self.start_thread(self.accept)

    def __enter__(self) -> 'ScriptedNbd':
        return self

    def __exit__(self, *args: Any) -> None:
        self.stop()

    def wait(self) -> None:
        """Until all clients have gone, so that everything is written down"""
        with self.changed:
            gone = self.changed.wait_for(lambda: not self.open, 60)
        assert gone, 'The client did not close its connection'

    def stop(self) -> None:
        """Close all connections; nothing is left running"""
        with self.changed:
            self.stopping = True
            for conn in self.open:
                conn.sock.shutdown(socket.SHUT_RDWR)
        self.listener.shutdown(socket.SHUT_RDWR)
        while self.threads:
            self.threads.pop().join()
        self.listener.close()
        os.remove(self.path)

    def node(self, **kwargs: Any) -> Dict[str, Any]:
        """Options of a client's node"""
        return {'driver': 'nbd', 'server': {'type': 'unix', 'path': self.path},
                **{name.replace('_', '-'): v for name, v in kwargs.items()}}

    def json(self, **kwargs: Any) -> str:
        """A file name for a client's node with filters and a raw one above"""
        node = self.node(**kwargs)
        for driver in ['raw', *self.filters][::-1]:
            node = {'driver': driver, 'file': node}
        return 'json:' + json.dumps(node)

    def count(self, *kinds: int) -> int:
        """How many requests of these types there were"""
        with self.changed:
            return sum(req.type in kinds for req in self.requests)

    # Threads

    def start_thread(self, target: Callable[..., None], *args: Any) -> None:
        """Start one that stop() waits for"""
        thread = threading.Thread(target=target, args=args, daemon=True)
        self.threads.append(thread)
        thread.start()

    def accept(self) -> None:
        """In a thread: wait for clients"""
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            with self.changed:
                if self.stopping:
                    sock.close()
                    return
                conn = Connection(self, sock)
                self.open.append(conn)
                if self.at_connect:
                    self.at_connect.pop(0)()
                self.start_thread(self.serve, conn)

    def serve(self, conn: Connection) -> None:
        """In a thread: serve a client"""
        try:
            conn.run()
        except (Closed, Hangup):
            pass
        finally:
            with self.changed:
                self.open.remove(conn)
                conn.sock.close()
                self.changed.notify_all()

    def note(self, req: Request) -> Handler:
        """Write down a request; returns what will answer it"""
        with self.changed:
            self.requests.append(req)
            script = self.scripts.get(req.type)
            if script:
                return script.pop(0)
        return HANDLERS.get(req.type, handle_unknown)

    def note_connected(self) -> None:
        """Count a connection"""
        with self.changed:
            self.connections += 1

    def note_dropped(self) -> None:
        """Count a connection that the client dropped"""
        with self.changed:
            if not self.stopping:
                self.dropped += 1

    # The export

    def infos(self) -> List[bytes]:
        """What the server tells in the handshake"""
        infos = []
        for kind in self.info_order:
            if kind == INFO_EXPORT:
                infos.append(struct.pack('>HQH', kind, self.size,
                                         self.flags | 1))
            elif self.block_sizes is not None:
                minimum, preferred, maximum = self.block_sizes
                infos.append(struct.pack('>HIII', kind, minimum, preferred,
                                         maximum))
        return infos

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the disk"""
        end = offset + length
        first = offset // BLOCK
        data = b''.join(self.blocks.get(i, bytes(BLOCK))
                        for i in range(first, (end + BLOCK - 1) // BLOCK))
        return data[offset - first * BLOCK:end - first * BLOCK]

    def write(self, offset: int, data: bytes) -> None:
        """Change bytes of the disk"""
        while data:
            i, start = divmod(offset, BLOCK)
            piece = data[:BLOCK - start]
            old = self.blocks.get(i, bytes(BLOCK))
            self.blocks[i] = old[:start] + piece + old[start + len(piece):]
            offset += len(piece)
            data = data[len(piece):]

    def write_zeroes(self, offset: int, length: int) -> None:
        """Zero bytes of the disk"""
        end = offset + length
        while offset < end:
            i, start = divmod(offset, BLOCK)
            n = min(BLOCK - start, end - offset)
            if n == BLOCK:
                self.blocks.pop(i, None)
            elif i in self.blocks:
                self.write(offset, bytes(n))
            offset += n

    def status_from(self, req: Request) -> Extents:
        """The extents of a request's range, or only the first"""
        extents = self.extents or [(self.size, DATA)]
        if self.ends_of is not extents:
            self.ends = list(itertools.accumulate(e[0] for e in extents))
            self.ends_of = extents
        ends = self.ends
        end = req.offset + req.length
        first = last = bisect.bisect_right(ends, req.offset)
        if self.ignore_req_one or not req.flags & REQ_ONE:
            last = bisect.bisect_left(ends, end)
        starts = [req.offset, *ends[first:last]]
        return [(min(ends[first + i], end) - start, extents[first + i][1])
                for i, start in enumerate(starts)]


def handle_read(conn: Connection, req: Request) -> None:
    """Send what is on the disk"""
    data = conn.server.read(req.offset, req.length)
    if conn.structured:
        conn.chunk(req, CHUNK_OFFSET_DATA,
                   struct.pack('>Q', req.offset) + data)
    else:
        conn.simple(req, data=data)


def handle_write(conn: Connection, req: Request) -> None:
    """Change the disk"""
    conn.server.write(req.offset, req.data)
    conn.done(req)


def handle_flush(conn: Connection, req: Request) -> None:
    """Nothing has to be done"""
    conn.done(req)


def handle_zeroes(conn: Connection, req: Request) -> None:
    """For both kinds of requests that leave zeroes"""
    conn.server.write_zeroes(req.offset, req.length)
    conn.done(req)


def handle_block_status(conn: Connection, req: Request) -> None:
    """Send the extents of the range"""
    conn.status(req, conn.server.status_from(req))


def handle_unknown(conn: Connection, req: Request) -> None:
    """Refuse the request"""
    conn.error(req, EINVAL)


HANDLERS: Dict[int, Handler] = {
    READ: handle_read,
    WRITE: handle_write,
    FLUSH: handle_flush,
    TRIM: handle_zeroes,
    WRITE_ZEROES: handle_zeroes,
    BLOCK_STATUS: handle_block_status,
}
