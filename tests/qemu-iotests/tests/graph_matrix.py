# The filters seqcache and cacheextents above and below other nodes: what works
# there without them works with them
#
# SPDX-License-Identifier: GPL-2.0-or-later
# A Kind is a node that the filters can meet.  Its graph is built without them,
# and with each of them above and below the node.  In each graph, every
# operation of OPERATIONS is done, between random requests of an NBD client
# that compares all data with a model.  If an operation is refused without
# filters, it may be refused with them; otherwise it must succeed.

import os
import random
import shutil
from typing import Any, Callable, Dict, List, Optional, Tuple, Type

from images import KiB, MiB, create_qcow2, file_node, write_file
from nbd_client import Client, Writer
from storage_daemon import Daemon
from qemu.qmp.qmp_client import ExecuteError
import iotests
from iotests import qemu_img, qemu_img_create


Node = Dict[str, Any]

FILTERS = ('seqcache', 'cacheextents')
POSITIONS = ('above', 'below')
SIZE = MiB
STEPS = 40

SECRET = ('--object', 'secret,id=secret,data=secret')
THROTTLE = ('--object', 'throttle-group,id=group')


def path(name: str) -> str:
    '''In the folder of the test'''
    return os.path.join(iotests.test_dir, name)


def pattern(seed: int) -> bytes:
    '''Data, some of which is zero'''
    rand = random.Random(seed)
    return b''.join(bytes([rand.choice((0, rand.randrange(256)))]) * 8 * KiB
                    for _ in range(SIZE // (8 * KiB)))


class Refused(Exception):
    '''An operation that is not possible'''


class OnceWriter(Writer):
    '''Writes each cluster only once'''

    def __init__(self, client: Client, data: bytearray,
                 clusters: List[int]) -> None:
        super().__init__(client, data, len(clusters))
        self.clusters = clusters

    def step(self) -> None:
        if self.clusters and self.rand.random() < 0.1:
            offset = self.clusters.pop()
            data = bytes([self.rand.randrange(1, 256)]) * (64 * KiB)
            self.client.write(offset, data)
            self.data[offset:offset + len(data)] = data
        elif self.rand.random() < 0.1:
            self.client.flush()
        else:
            self.check(*self.range(self.rand.choice((512, 10000, 100000))))


class Kind:
    '''A node that the filters can meet; this one is a qcow2 image'''
    # The images, and their backing files
    files: Tuple[Tuple[str, str], ...] = (('base', ''), ('img', 'base'))
    fmt = 'qcow2'
    has_backing = True
    write_once = False
    # What does not work without filters either, and cannot be tried
    impossible: Tuple[str, ...] = ()
    left_out: Tuple[str, ...] = ()

    def __init__(self) -> None:
        self.ours: Optional[str] = None
        self.position: Optional[str] = None

    # ---- Images ----

    def create_image(self, name: str, backing: str) -> None:
        '''An empty image'''
        args = ['-b', path(backing), '-F', self.fmt] if backing else []
        qemu_img_create('-f', self.fmt, *args, path(name), str(SIZE))

    def create(self) -> None:
        '''Make the templates, which are copied for each graph'''
        write_file(path('raw'), pattern(1))
        for name, backing in self.files:
            if self.fmt != 'raw' and not backing:
                qemu_img('convert', '-f', 'raw', '-O', self.fmt, path('raw'),
                         path(name))
            else:
                self.create_image(name, backing)
            shutil.copyfile(path(name), path(name + '.template'))

    def data(self) -> bytearray:
        '''What is in the image'''
        return bytearray(pattern(1))

    # ---- Nodes ----

    def wrap(self, position: str, node: Node) -> Node:
        '''Put our filter above @node, if that is its position'''
        if not self.ours or self.position != position:
            return node
        ours: Node = {'driver': self.ours, 'file': node}
        if self.ours == 'seqcache':
            # Little, so that much is written in the background
            ours.update({'cache-size': 256 * KiB})
        return ours

    def protocol(self, name: str) -> Node:
        '''The node of the file of an image'''
        return file_node(path(name))

    def base(self) -> Node:
        '''The backing file'''
        return {'driver': self.fmt, 'node-name': 'base',
                'file': file_node(path('base'))}

    def image(self) -> Node:
        '''The image'''
        node: Node = {'driver': self.fmt, 'file': self.protocol('img')}
        if self.has_backing:
            node['backing'] = 'base'
        return node

    def root(self) -> Node:
        '''What the client uses, without a filter above'''
        return self.image()

    def nodes(self) -> List[Node]:
        '''All, those that others need first'''
        root = {**self.wrap('above', self.root()), 'node-name': 'root'}
        return [self.base(), root] if self.has_backing else [root]


class Protocol(Kind):
    '''Between an image and its file'''
    options: Node = {}

    def protocol(self, name: str) -> Node:
        node = {**self.options,
                'file': self.wrap('below', super().protocol(name))}
        return self.wrap('above', node)

    def nodes(self) -> List[Node]:
        return [self.base(), {**self.root(), 'node-name': 'root'}]


class Preallocate(Protocol):
    options = {'driver': 'preallocate'}


class Blkdebug(Protocol):
    options = {'driver': 'blkdebug', 'align': 4096}

    def protocol(self, name: str) -> Node:
        node = {'driver': 'blkdebug', 'align': 4096,
                'image': self.wrap('below', file_node(path(name)))}
        return self.wrap('above', node)


class Filter(Kind):
    '''Above an image'''
    options: Node = {}

    def root(self) -> Node:
        return {**self.options, 'file': self.wrap('below', self.image())}


class Throttle(Filter):
    options = {'driver': 'throttle', 'throttle-group': 'group'}


class CopyOnRead(Filter):
    options = {'driver': 'copy-on-read'}


class PreallocateImage(Filter):
    options = {'driver': 'preallocate'}


class Compress(Filter):
    options = {'driver': 'compress'}
    write_once = True
    # A job that inserts a node above "compress" hangs: compress asks for its
    # limits in a coroutine while the graph is locked
    impossible = ('mirror', 'commit', 'stream', 'backup_source')


class Qcow2(Kind):
    def protocol(self, name: str) -> Node:
        return self.wrap('below', super().protocol(name))


class ExtendedL2(Qcow2):
    '''With small subclusters'''

    def create_image(self, name: str, backing: str) -> None:
        create_qcow2(path(name), extended_l2='on', backing=path(backing))


class Vmdk(Qcow2):
    fmt = 'vmdk'


class CopyBeforeWrite(Kind):
    files = (*Kind.files, ('before', ''))

    def root(self) -> Node:
        return {'driver': 'copy-before-write',
                'file': self.wrap('below', self.image()),
                'target': {'driver': 'qcow2',
                           'file': file_node(path('before'))}}


class Quorum(Kind):
    files = (('img', ''), ('img2', ''))
    has_backing = False
    # It prints a warning
    left_out = ('backup_to',)

    def root(self) -> Node:
        return {'driver': 'quorum', 'vote-threshold': 1, 'children': [
            self.wrap('below', {'driver': 'qcow2',
                                'file': file_node(path(name))})
            for name in ('img', 'img2')]}


class RawOffset(Kind):
    files = (('img', ''),)
    fmt = 'raw'
    has_backing = False
    offset = 68 * KiB

    def create_image(self, name: str, backing: str) -> None:
        write_file(path(name), b'\x77' * self.offset + pattern(1) +
                   b'\x88' * 4 * KiB)

    def root(self) -> Node:
        return {'driver': 'raw', 'offset': self.offset, 'size': SIZE,
                'file': self.wrap('below', file_node(path('img')))}


class Luks(Kind):
    files = (('img', ''),)
    fmt = 'luks'
    has_backing = False

    def create(self) -> None:
        write_file(path('raw'), pattern(1))
        qemu_img('convert', '--object', SECRET[1], '-f', 'raw', '-O', 'luks',
                 '-o', 'key-secret=secret,iter-time=10', path('raw'),
                 path('img'))
        shutil.copyfile(path('img'), path('img.template'))

    def root(self) -> Node:
        return {'driver': 'luks', 'key-secret': 'secret',
                'file': self.wrap('below', file_node(path('img')))}


class OtherFilter(Kind):
    '''The other one of our filters'''

    def root(self) -> Node:
        if not self.ours:
            return self.image()
        other = FILTERS[1 - FILTERS.index(self.ours)]
        return {'driver': other, 'file': self.wrap('below', self.image())}


class SameFilter(Kind):
    '''Twice the same one of our filters'''

    def root(self) -> Node:
        if not self.ours:
            return self.image()
        return {'driver': self.ours, 'file': self.wrap('below', self.image())}


class Situation:
    '''One graph and its user, for one operation'''

    def __init__(self, daemon: Daemon, kind: Kind, seed: int) -> None:
        self.daemon = daemon
        self.kind = kind
        self.top = 'root'
        for name, _ in kind.files:
            shutil.copyfile(path(name + '.template'), path(name))
        for node in kind.nodes():
            daemon.add(node)
        self.data = kind.data()
        # Those that were not written yet
        self.clusters = list(range(0, SIZE - 128 * KiB, 64 * KiB))
        self.rand = random.Random(seed)
        self.rand.shuffle(self.clusters)
        self.connect('root')

    def connect(self, node: str) -> None:
        '''Export a node to the client that writes'''
        client = self.daemon.export(node)
        if self.kind.write_once:
            self.writer: Writer = OnceWriter(client, self.data, self.clusters)
        else:
            self.writer = Writer(client, self.data,
                                 self.rand.randrange(2 ** 32))

    def disconnect(self) -> None:
        '''Remove the export and its client'''
        self.writer.client.close()
        self.daemon.unexport(self.writer.client.export)

    def run(self) -> None:
        '''Some random requests'''
        self.writer.run(STEPS)

    def must(self, error: Optional[str]) -> None:
        '''Raise Refused for an error'''
        if error is not None:
            raise Refused(error)

    def cmd(self, cmd: str, **kwargs: Any) -> None:
        '''A QMP command that can be refused'''
        self.must(self.daemon.error(cmd, **kwargs))

    def job(self, cmd: str, ready: bool = False, cancel: bool = False,
            **kwargs: Any) -> None:
        '''Requests while a job runs, and, with @ready, when it is ready'''
        self.must(self.daemon.start_job(cmd, **kwargs))
        self.run()
        if ready:
            self.daemon.wait_ready()
            self.run()
        self.must(self.daemon.finish_job(cancel))

    def new_image(self, name: str, fmt: str = 'qcow2', **kwargs: Any) -> None:
        '''An empty image, and its node'''
        iotests.try_remove(path(name))
        qemu_img_create('-f', fmt, path(name), str(len(self.data)))
        self.daemon.add({'driver': fmt, 'node-name': name,
                         'file': file_node(path(name)), **kwargs})

    def become_target(self) -> None:
        '''The client writes to a new image, the source of a job'''
        self.disconnect()
        self.new_image('source', 'raw')
        self.data[:] = bytes(SIZE)
        self.connect('source')

    def contents(self, node: str) -> bytes:
        '''What is read from the node'''
        client = self.daemon.export(node, writable=False)
        data = client.read(0, client.size)
        client.close()
        self.daemon.unexport(f'{node}-ro')
        return data

    def snapshot(self, overlay: str) -> None:
        '''An overlay of the node on top'''
        self.new_image(overlay, backing=None)
        self.cmd('blockdev-snapshot', node=self.top, overlay=overlay)
        self.top = overlay
        self.run()

    def check(self) -> None:
        '''All data is right'''
        self.writer.client.flush()
        self.writer.check()

    def finish(self, images: bool) -> None:
        '''Remove all nodes, and look at the images without our filters'''
        self.check()
        self.disconnect()
        left = [n['node-name'] for n in
                self.daemon.cmd('query-named-block-nodes')
                if not n['node-name'].startswith('#')]
        while left:
            deleted = [n for n in left
                       if not self.daemon.error('blockdev-del', node_name=n)]
            assert deleted, f'{left} cannot be deleted'
            left = [n for n in left if n not in deleted]
        if not images:
            return
        plain = type(self.kind)()
        for node in plain.nodes():
            self.daemon.add(node)
        assert self.contents('root') == bytes(self.data), 'wrong images'
        for node in reversed(plain.nodes()):
            self.daemon.cmd('blockdev-del', node_name=node['node-name'])


# ---- Operations; each returns whether the images still make up the graph ----

def only_requests(_: Situation) -> bool:
    return True


def reopen(s: Situation) -> bool:
    s.cmd('blockdev-reopen', options=[s.kind.nodes()[-1]])
    s.run()
    if s.kind.ours == 'seqcache' and s.kind.position == 'above' and \
            not isinstance(s.kind, Protocol):
        s.cmd('blockdev-reopen', options=[{
            **s.kind.nodes()[-1], 'cluster-size': 4 * KiB}])
    return True


def resize(s: Situation) -> bool:
    for size in SIZE + 256 * KiB, SIZE + 64 * KiB, SIZE - 128 * KiB:
        s.disconnect()
        s.cmd('block_resize', node_name='root', size=size)
        assert s.daemon.size('root') == size, 'wrong size'
        old = bytes(s.data)
        s.data[:] = old[:size].ljust(size, b'\0')
        s.connect('root')
        if s.kind.fmt == 'luks':
            # It decrypts zeroes
            s.data[len(old):] = s.writer.client.read(0, size)[len(old):]
        s.check()
        s.run()
        assert s.daemon.size('root') == size, 'wrong size'
    return True


def resize_with_writer(s: Situation) -> bool:
    s.cmd('block_resize', node_name='root', size=SIZE + 256 * KiB)
    s.run()
    s.data += bytes(256 * KiB)
    assert s.daemon.size('root') == SIZE + 256 * KiB, 'wrong size'
    s.check()
    s.disconnect()
    s.connect('root')
    return True


def commit_snapshot(s: Situation) -> bool:
    s.snapshot('overlay')
    s.job('block-commit', ready=True, device='overlay', base_node='root')
    return True


def commit_cancelled(s: Situation) -> bool:
    s.snapshot('overlay')
    s.job('block-commit', ready=True, cancel=True, device='overlay',
          base_node='root')
    return False


def commit_between(s: Situation) -> bool:
    s.snapshot('overlay')
    s.snapshot('overlay2')
    s.job('block-commit', device='overlay2', top_node='overlay',
          base_node='root')
    return False


def commit_to_base(s: Situation) -> bool:
    '''Active'''
    s.job('block-commit', ready=True, device='root', base_node='base')
    return False


def commit_below(s: Situation) -> bool:
    '''Not active'''
    s.snapshot('overlay')
    s.job('block-commit', device='overlay', top_node='root', base_node='base')
    return False


def stream_root(s: Situation) -> bool:
    s.job('block-stream', device='root')
    return False


def stream_root_unused(s: Situation) -> bool:
    s.disconnect()
    s.must(s.daemon.start_job_soon('block-stream', device='root'))
    s.must(s.daemon.finish_job())
    s.connect('root')
    return False


def stream_overlay(s: Situation) -> bool:
    s.snapshot('overlay')
    s.job('block-stream', device='overlay')
    return False


def mirror(s: Situation) -> bool:
    s.new_image('target')
    s.job('blockdev-mirror', ready=True, device='root', target='target',
          sync='full')
    return False


def mirror_cancelled(s: Situation) -> bool:
    s.new_image('target', 'raw')
    s.job('blockdev-mirror', ready=True, cancel=True, device='root',
          target='target', sync='full', copy_mode='write-blocking')
    assert s.contents('target') == bytes(s.data), 'wrong copy'
    return True


def mirror_top_only(s: Situation) -> bool:
    '''To an image on the same backing file'''
    s.new_image('target', backing='base')
    s.job('blockdev-mirror', device='root', target='target', sync='top')
    return False


def mirror_to(s: Situation) -> bool:
    '''The node is the target'''
    s.become_target()
    s.job('blockdev-mirror', device='source', target='root', sync='full')
    return False


def backup(s: Situation) -> bool:
    s.new_image('target', 'raw')
    s.check()
    before = bytes(s.data)
    s.job('blockdev-backup', device='root', target='target', sync='full')
    assert s.contents('target') == before, 'wrong copy'
    return True


def backup_top_only(s: Situation) -> bool:
    s.new_image('target', backing='base')
    before = bytes(s.data)
    s.job('blockdev-backup', device='root', target='target', sync='top')
    assert s.contents('target') == before, 'wrong copy'
    return True


def backup_to(s: Situation) -> bool:
    '''The node is the target'''
    s.become_target()
    s.run()
    before = bytes(s.data)
    s.job('blockdev-backup', device='source', target='root', sync='full')
    s.check()
    s.disconnect()
    assert s.contents('root') == before, 'wrong copy'
    s.data[:] = before
    s.connect('root')
    return not s.kind.write_once


def backup_fleecing(s: Situation) -> bool:
    '''The backing file of the target is the source'''
    s.disconnect()
    s.connect('base')
    s.data[:] = s.contents('base')
    before = s.contents('root')
    s.must(s.daemon.start_job('blockdev-backup', device='base', target='root',
                              sync='none'))
    s.run()
    assert s.contents('root') == before, 'wrong data of the past'
    s.cmd('block-job-cancel', device='job')
    s.daemon.finish_job()
    return False


def internal_snapshot(s: Situation) -> bool:
    s.cmd('blockdev-snapshot-internal-sync', device='root', name='snapshot')
    s.run()
    return True


OPERATIONS: Tuple[Callable[[Situation], bool], ...] = (
    only_requests, reopen, resize, resize_with_writer, commit_snapshot,
    commit_cancelled, commit_between, commit_to_base, commit_below,
    stream_root, stream_root_unused, stream_overlay, mirror, mirror_cancelled,
    mirror_top_only, mirror_to, backup, backup_top_only, backup_to,
    backup_fleecing, internal_snapshot
)

# But every filter at the root, not only ours, makes the same difference here
REFUSED_BY_FILTERS = ('stream_root',)

NEED_BACKING = ('commit_to_base', 'commit_below', 'stream_root',
                'stream_root_unused', 'mirror_top_only', 'backup_top_only',
                'backup_fleecing')


class MatrixTestCase(iotests.QMPTestCase):
    '''Each test calls matrix() for one Kind'''
    def setUp(self) -> None:
        self.failures: List[str] = []
        self.daemon: Optional[Daemon] = None
        self.addCleanup(self.stop)

    def stop(self) -> None:
        if self.daemon:
            self.daemon.kill()
            self.daemon = None

    def attempt(self, kind: Kind, operation: Callable[[Situation], bool],
                seed: int) -> Optional[str]:
        '''What is wrong, if something is'''
        if not self.daemon:
            self.daemon = Daemon(*SECRET, *THROTTLE)
        s = Situation(self.daemon, kind, seed)
        try:
            if operation.__name__ != 'backup_fleecing':
                s.run()
            images = operation(s)
            s.run()
            s.finish(images)
            return None
        except ExecuteError as exc:
            self.stop()
            return f'Refused: {exc}'
        except OSError as exc:
            self.stop()
            # A job can have written to clusters that were not written before
            return f'{"Refused" if kind.write_once else "OSError"}: {exc}'
        except Exception as exc:  # pylint: disable=broad-except
            self.stop()
            return f'{type(exc).__name__}: {exc}'
        finally:
            s.writer.client.close()

    def matrix(self, kind_class: Type[Kind]) -> None:
        '''All operations in all graphs of this kind'''
        kind_class().create()
        left_out = kind_class.left_out
        if not kind_class.has_backing:
            left_out += NEED_BACKING
        operations = [o for o in OPERATIONS if o.__name__ not in left_out]
        for seed, operation in enumerate(operations):
            self.operation(kind_class, operation, seed)
        self.assertTrue(not self.failures, '\n'.join(self.failures))

    def operation(self, kind_class: Type[Kind],
                  operation: Callable[[Situation], bool], seed: int) -> None:
        stock: Optional[str] = 'Refused: it hangs'
        name = operation.__name__
        hangs = name.startswith(kind_class().impossible)
        if not hangs:
            stock = self.attempt(kind_class(), operation, seed)
            if stock and not stock.startswith('Refused'):
                self.failures.append(f'{name}, without filters: {stock}')
        for ours in FILTERS:
            for position in POSITIONS:
                kind = kind_class()
                kind.ours, kind.position = ours, position
                if position == 'below' and hangs:
                    continue
                result = self.attempt(kind, operation, seed)
                if not result or (result.startswith('Refused') and
                                  (stock or name in REFUSED_BY_FILTERS)):
                    continue
                self.failures.append(f'{name}, {ours} {position}: {result}')
