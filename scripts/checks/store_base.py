# SPDX-License-Identifier: GPL-2.0-or-later
"""
What the stores of stores.py are made of: small file systems that can be made
full, loop devices, servers, and the count of requests.
"""

import contextlib
import glob
import os
import signal
import socket
import subprocess
import time

from lab import MIB, Failed, RequestLog, wait_for

# In MiB: the file system, which xfs wants so large; the disk on it; and what is
# left when it is full
SPACE, DISK, LEFT = 352, 192, 4


def run(*command, **options):
    """The output of a command, which must succeed"""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, check=False,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, **options)
    if done.returncode:
        raise Failed(f'{" ".join(command)}: {done.stdout}')
    return done.stdout.strip()


def children(pid):
    """The processes that a process has started, and those of theirs"""
    for path in glob.glob(f'/proc/{pid}/task/*/children'):
        with contextlib.suppress(OSError), open(path, encoding='utf-8') as f:
            for child in map(int, f.read().split()):
                yield child
                yield from children(child)


def end(process):
    """Kill it and what it has started, also in sessions of their own"""
    for pid in [process.pid, *children(process.pid)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def listens(port):
    with contextlib.suppress(OSError), \
         socket.create_connection(('127.0.0.1', port), 1):
        return True
    return False


class Requests(RequestLog):
    """Counts requests of a client or server to one file, over many runs"""

    CALLS = RequestLog.CALLS + ',read,write'

    def __init__(self, log, path):
        super().__init__(path, self.CALLS)
        self.log = log
        # The program itself is the process that is started, and appends
        self.prefix[1:1] = ['-D', '-A']
        self.prefix[self.prefix.index('-o') + 1] = log
        with open(log, 'w', encoding='utf-8'):
            pass

    def so_far(self):
        # A reply can arrive a moment before the line about it
        time.sleep(0.3)
        return super().so_far()


class Space:
    """A small file system on a loop device

    kind is one of ext4, xfs, btrfs, tmpfs and overlay (above ext4); block is the
    size of the blocks of the device.
    """

    MAKE = {'ext4': ['mkfs.ext4', '-q', '-F', '-m', '0'],
            'xfs': ['mkfs.xfs', '-q', '-f'], 'btrfs': ['mkfs.btrfs', '-q', '-f']}

    def __init__(self, folder, kind='ext4', block=512):
        self.kind = kind
        self.folder = os.path.join(folder, 'space')
        self.ballast = os.path.join(self.folder, 'ballast')
        self.undo = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            if kind == 'tmpfs':
                self.mount(stack, '-t', 'tmpfs', '-o', f'size={SPACE}M', 'none')
            else:
                image = os.path.join(folder, 'space.img')
                with open(image, 'wb') as f:
                    f.truncate(SPACE * MIB)
                device = Loop(image, block)
                stack.callback(device.detach)
                make = self.MAKE['ext4' if kind == 'overlay' else kind]
                run(*make, device.path)
                self.mount(stack, device.path)
            if kind == 'overlay':
                for name in 'lower', 'upper', 'work', 'merged':
                    os.mkdir(os.path.join(self.folder, name))
                below, self.folder = (self.folder,
                                      os.path.join(self.folder, 'merged'))
                self.mount(stack, '-t', 'overlay', '-o', ','.join(
                    f'{option}={below}/{name}' for option, name in
                    (('lowerdir', 'lower'), ('upperdir', 'upper'),
                     ('workdir', 'work'))), 'none')
            self.undo = stack.pop_all()

    def mount(self, stack, *args):
        folder = self.folder
        os.makedirs(folder, exist_ok=True)
        run('mount', *args, folder)
        stack.callback(wait_for, lambda: not subprocess.call(
            ['umount', folder]), f'umount {folder}', 30)

    def fill(self):
        """Leave only a little"""
        run('sync', '-f', self.folder)
        found = os.statvfs(self.folder)
        with open(self.ballast, 'wb') as f:
            os.posix_fallocate(f.fileno(), 0, max(
                found.f_bavail * found.f_frsize - LEFT * MIB, 1))

    def free(self):
        os.unlink(self.ballast)
        run('sync', '-f', self.folder)


class Loop:
    """A loop device, which follows the size of its file as a logical volume
    follows lvextend

    The kernel detaches it when nobody has it open any more, however we end.
    """

    def __init__(self, image, block):
        self.image = image
        self.path = run('losetup', '-b', str(block), '--show', '-f', image)
        self.open = open(self.path, 'rb', 0)
        run('losetup', '-d', self.path)

    def resize(self, mib):
        os.truncate(self.image, mib * MIB)
        run('losetup', '-c', self.path)

    def detach(self):
        self.open.close()


class Store:
    """A file in a file system; the others begin with it.

    node is the protocol node for -blockdev and blockdev-add, url the same for
    qemu-img create. What is expected: fewer is how many times fewer requests
    there are with the cache, metadata how many of them may read or may be one
    way or the other, on whether the cache is on by default. A store that is
    full stops a job as ENOSPC does, unless full is a part of another error, or
    waits is true: then the job waits, as does who opens the image.

    section is that of the manual page that has its example.
    """

    section = 'Files'
    programs: tuple = ()
    drivers: tuple = ()
    fewer = 25
    metadata = 32
    on = True
    full = ''
    waits = False
    # Whether there is a server; what a job says that loses it, if not nothing
    server = False
    lost = ''
    # Whether the programs use the network of another process, and what precedes
    # their commands then
    enter: 'tuple[str, ...]' = ()

    def __init__(self, folder, kind='ext4', block=512, direct=True):
        self.folder = folder
        self.stack = contextlib.ExitStack()
        self.space = Space(folder, kind, block)
        self.stack.callback(self.space.undo.close)
        self.path = os.path.join(self.space.folder, 'disk')
        self.url = self.path
        self.direct = direct
        self.on = direct
        self.node = {'driver': 'file', 'filename': self.path,
                     'cache': {'direct': direct}}
        self.requests = Requests(os.path.join(folder, 'requests'), self.path)

    @property
    def prefix(self):
        """What precedes the command of a client"""
        return [*self.enter, *([] if self.server else self.requests.prefix)]

    def places(self):
        """(what the example calls it, what it is called here)"""
        return [('backup.qcow2', self.path)]

    def environment(self):
        """That of the programs"""
        return dict(os.environ)

    def so_far(self):
        """(reads, writes) since the beginning"""
        found = self.requests.so_far()
        return found['reads'], found['writes']

    def fresh(self, mib=0):
        """Begin with an empty disk, which has at least this size"""
        with open(self.path, 'wb') as f:
            f.truncate(mib * MIB)

    def created(self):
        """After qemu-img create"""

    def prepare(self):
        """Start what there is to start"""

    def start(self):
        """Start the server, if there is one"""

    def kill(self):
        """As a power cut would"""

    def fill(self):
        self.space.fill()

    def free(self):
        self.space.free()

    def restore(self):
        """After a step that failed"""
        if os.path.exists(self.space.ballast):
            self.space.free()
        self.kill()
        self.start()

    def __enter__(self):
        with self.stack:
            self.prepare()
            self.fresh()
            self.start()
            self.stack.callback(self.kill)
            self.stack = self.stack.pop_all()
        return self

    def __exit__(self, *exception):
        self.stack.close()


class Server(Store):
    """A program that serves the file"""

    server = True
    # When it can be used
    port = 0

    def __init__(self, folder, **kwargs):
        super().__init__(folder, **kwargs)
        self.on = True
        self.socket = os.path.join(folder, 'socket')
        self.process = None
        self.log = os.path.join(folder, 'server.log')

    def command(self):
        raise NotImplementedError

    def ready(self):
        return listens(self.port) if self.port else os.path.exists(self.socket)

    def fresh(self, mib=DISK):
        """The server keeps the file open"""
        with open(self.path, 'ab') as f:
            f.truncate(0)
            f.truncate(max(mib, DISK) * MIB)

    def spawn(self, *command):
        """A program of the server; what it prints goes into a log"""
        with open(self.log, 'ab') as out:
            return subprocess.Popen(
                [*self.enter, *command], stdin=subprocess.DEVNULL, stdout=out,
                stderr=out, start_new_session=True, env=self.environment())

    def spawn_beside(self, *command):
        """The same, until the test is over"""
        process = self.spawn(*command)
        self.stack.callback(end, process)
        return process

    def start(self):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.socket)
        name, *words = self.command()
        self.process = self.spawn(*self.requests.prefix, name, *words)

        def is_ready():
            if self.process.poll() is not None:
                with open(self.log, encoding='utf-8', errors='replace') as f:
                    raise Failed(f'{name} ended: {f.read()[-500:]}')
            return self.ready()

        wait_for(is_ready, name)

    def kill(self):
        if self.process:
            end(self.process)
            self.process = None
