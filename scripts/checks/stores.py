# SPDX-License-Identifier: GPL-2.0-or-later
"""
The stores of kind storage: devices, file systems and servers that hold an image.

STORES at the end is the list of them. A store is started on loopback, in a
folder of its own on a small file system that can be made full, and stopped when
the test is over. strace counts its reads and writes: of the server to the file
that it serves, or of the client to a file or device.
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
import typing
import uuid

from lab import (
    BUILD, MIB, Failed, RequestLog, Skipped, free_port, wait_for)

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
    with contextlib.suppress(OSError), \
         open(f'/proc/{pid}/task/{pid}/children', encoding='utf-8') as f:
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
        os.makedirs(self.folder, exist_ok=True)
        run('mount', *args, self.folder)
        stack.callback(run, 'umount', self.folder)

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
    follows lvextend"""

    def __init__(self, image, block):
        self.image = image
        self.path = run('losetup', '-b', str(block), '--show', '-f', image)

    def resize(self, mib):
        os.truncate(self.image, mib * MIB)
        run('losetup', '-c', self.path)

    def detach(self):
        run('losetup', '-d', self.path)


class Store:
    """A file in a file system; the others begin with it.

    node is the protocol node for -blockdev and blockdev-add, url the same for
    qemu-img create. What is expected: fewer is how many times fewer requests
    there are with the cache, metadata how many of them may read or may be one
    way or the other, on whether the cache is on by default. A store that is
    full stops a job as ENOSPC does, unless full is a part of another error, or
    waits is true: then the job waits.
    """

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

    def so_far(self):
        """(reads, writes) since the beginning"""
        found = self.requests.so_far()
        return found['reads'], found['writes']

    def fresh(self, mib=0):
        """Begin with an empty disk, which has at least this size"""
        with open(self.path, 'wb') as f:
            f.truncate(mib * MIB)

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


class Device(Store):
    """A loop device of 4096-byte blocks as a logical volume, which is grown"""

    drivers = ('host_device',)

    def __init__(self, folder, direct=True):
        super().__init__(folder, direct=direct)
        self.image = os.path.join(self.space.folder, 'device')
        self.device = None

    def prepare(self):
        with open(self.image, 'wb') as f:
            f.truncate(DISK * MIB)
        self.device = Loop(self.image, 4096)
        self.stack.callback(self.device.detach)
        self.path = self.url = self.device.path
        self.node = {'driver': 'host_device', 'filename': self.path,
                     'cache': {'direct': self.direct}}
        self.requests = Requests(os.path.join(self.folder, 'requests'),
                                 self.path)

    def fresh(self, mib=DISK):
        self.device.resize(0)
        self.device.resize(mib)

    def fill(self):
        self.device.resize(LEFT)

    def free(self):
        self.device.resize(DISK)


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

    def environment(self):
        return dict(os.environ)

    def kill(self):
        if self.process:
            end(self.process)
            self.process = None


class Nbd(Server):
    """An NBD server on a UNIX socket"""

    drivers = ('nbd',)

    def __init__(self, folder, command, programs=(), **kwargs):
        super().__init__(folder, **kwargs)
        self.words = command
        self.url = f'nbd+unix:///?socket={self.socket}'
        self.node = {'driver': 'nbd', 'reconnect-delay': 60,
                     'server': {'type': 'unix', 'path': self.socket}}

    def command(self):
        return [word.format(socket=self.socket, path=self.path, build=BUILD)
                for word in self.words]


class Fuse(Store):
    """A file that qemu-storage-daemon exports by FUSE"""

    programs = ('fusermount3',)

    def __init__(self, folder):
        super().__init__(folder)
        self.behind = self.path
        self.path = self.url = self.node['filename'] = os.path.join(folder,
                                                                    'export')
        self.requests = Requests(os.path.join(folder, 'requests'), self.path)
        self.process = None

    def fresh(self, mib=0):
        self.kill()
        with open(self.behind, 'wb') as f, open(self.path, 'wb'):
            f.truncate(mib * MIB)
        self.start()

    def start(self):
        if self.process:
            return
        program = os.path.join(BUILD, 'storage-daemon', 'qemu-storage-daemon')
        self.process = subprocess.Popen(
            [program, '--blockdev', 'driver=file,node-name=disk,cache.direct=on,'
             f'filename={self.behind}', '--export', 'fuse,id=disk,node-name='
             f'disk,mountpoint={self.path},writable=on,growable=on'],
            stdin=subprocess.DEVNULL)

        def is_ready():
            if self.process.poll() is not None:
                raise Skipped('qemu-storage-daemon has no FUSE exports, or the'
                              ' kernel does not allow any')
            return os.path.ismount(self.path)

        wait_for(is_ready, 'the FUSE export')

    def kill(self):
        if self.process:
            self.process.terminate()
            self.process.wait()
            self.process = None


class Iscsi(Server):
    """A LUN of tgt, which can be extended while tgtd is stopped"""

    programs = ('tgtd', 'tgtadm')
    drivers = ('iscsi',)
    NAME = 'iqn.2026-01.example:disk'

    def __init__(self, folder, block):
        super().__init__(folder)
        self.block = block
        # Instances of tgtd have numbers
        self.number = block // 512
        self.port = free_port()
        self.url = f'iscsi://127.0.0.1:{self.port}/{self.NAME}/1'
        self.node = {'driver': 'iscsi', 'transport': 'tcp', 'lun': 1, 'portal':
                     f'127.0.0.1:{self.port}', 'target': self.NAME}

    def environment(self):
        return {**os.environ, 'TGT_IPC_SOCKET': self.socket}

    def command(self):
        return ['tgtd', '-f', '-C', str(self.number), '--iscsi',
                f'portal=127.0.0.1:{self.port}']

    def admin(self, *words):
        return run('tgtadm', '-C', str(self.number), '--lld', 'iscsi', *words,
                   env=self.environment())

    def ready(self):
        try:
            self.admin('--mode', 'sys', '--op', 'show')
        except Failed:
            return False
        return True

    def start(self):
        super().start()
        self.admin('--mode', 'target', '--op', 'new', '--tid', '1', '-T',
                   self.NAME)
        self.admin('--mode', 'logicalunit', '--op', 'new', '--tid', '1', '--lun',
                   '1', '-b', self.path, '--blocksize', str(self.block))
        self.admin('--mode', 'logicalunit', '--op', 'update', '--tid', '1',
                   '--lun', '1', '--params', 'thin_provisioning=1')
        self.admin('--mode', 'target', '--op', 'bind', '--tid', '1', '-I', 'ALL')

    def resize(self, mib):
        self.kill()
        os.truncate(self.path, mib * MIB)
        self.start()

    def fill(self):
        self.resize(LEFT)

    def free(self):
        self.resize(DISK)


class Ssh(Server):
    """A file of an SSH server"""

    programs = ('/usr/sbin/sshd', 'ssh-keygen', 'ssh-agent', 'ssh-add')
    drivers = ('ssh',)
    # libssh cuts requests into small ones
    fewer = 0
    # SFTP has no word for it, and libssh does not connect again
    full = 'Input/output error'
    lost = 'it stops again'

    def __init__(self, folder):
        super().__init__(folder)
        self.port = free_port()
        self.url = (f'ssh://root@127.0.0.1:{self.port}{self.path}'
                    '?host_key_check=no')
        self.node = {'driver': 'ssh', 'path': self.path, 'user': 'root',
                     'server': {'host': '127.0.0.1', 'port': str(self.port)},
                     'host-key-check': {'mode': 'none'}}

    fresh = Store.fresh

    def prepare(self):
        key = os.path.join(self.folder, 'key')
        os.chmod(self.folder, 0o700)
        os.makedirs('/run/sshd', exist_ok=True)
        run('ssh-keygen', '-q', '-t', 'ed25519', '-N', '', '-f', key)
        shutil.copy(f'{key}.pub', f'{self.folder}/authorized')
        agent = run('ssh-agent', '-s', '-a', f'{self.folder}/agent')
        self.stack.callback(os.kill, int(re.search(r'PID=(\d+)', agent)[1]),
                            signal.SIGTERM)
        os.environ['SSH_AUTH_SOCK'] = f'{self.folder}/agent'
        run('ssh-add', '-q', key)
        with open(f'{self.folder}/sshd.conf', 'w', encoding='utf-8') as f:
            f.write(f'ListenAddress 127.0.0.1\nPort {self.port}\nHostKey {key}\n'
                    f'AuthorizedKeysFile {self.folder}/authorized\n'
                    'PermitRootLogin prohibit-password\nUsePAM no\n'
                    'PasswordAuthentication no\nStrictModes no\n'
                    f'PidFile none\nSubsystem sftp internal-sftp\n')

    def command(self):
        return ['/usr/sbin/sshd', '-D', '-e', '-f', f'{self.folder}/sshd.conf']


class Nfs(Server):
    """A file of nfs-ganesha, in a network of its own: QEMU's URLs name no port"""

    programs = ('ganesha.nfsd', 'rpcbind', 'unshare', 'nsenter')
    drivers = ('nfs',)
    fresh = Store.fresh

    def __init__(self, folder):
        super().__init__(folder)
        self.url = f'nfs://127.0.0.1{self.path}'
        self.node = {'driver': 'nfs', 'path': self.path,
                     'server': {'host': '127.0.0.1', 'type': 'inet'}}

    def prepare(self):
        holder = self.spawn_beside('unshare', '-n', 'sleep', 'infinity')
        network = f'/proc/{holder.pid}/ns/net'
        wait_for(lambda: os.readlink(network) != os.readlink(
            '/proc/self/ns/net'), 'a network')
        self.enter = ('nsenter', f'--net={network}')
        run(*self.enter, 'ip', 'link', 'set', 'lo', 'up')
        self.spawn_beside('rpcbind', '-f')
        os.makedirs('/var/run/ganesha', exist_ok=True)
        with open(f'{self.folder}/ganesha.conf', 'w', encoding='utf-8') as f:
            f.write('NFS_CORE_PARAM { Enable_NLM = false; Enable_RQUOTA = false;'
                    ' Protocols = 3; }\n'
                    f'EXPORT {{ Export_Id = 1; Path = {self.space.folder};'
                    ' Pseudo = /x; Access_Type = RW; Squash = No_Root_Squash;'
                    ' SecType = sys, none; Protocols = 3; Transports = TCP;'
                    ' FSAL { Name = VFS; } }\n')

    def command(self):
        return ['ganesha.nfsd', '-F', '-f', f'{self.folder}/ganesha.conf', '-L',
                f'{self.folder}/ganesha.log', '-p', f'{self.folder}/ganesha.pid']

    def ready(self):
        found = subprocess.run(
            [*self.enter, 'rpcinfo', '-t', '127.0.0.1', 'nfs', '3'],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
        return found.returncode == 0


class Ceph(Server):
    """An image of a Ceph cluster with one monitor, one manager and one OSD

    fixed: it has its size from the beginning, instead of growing.
    """

    programs = ('ceph-mon', 'ceph-mgr', 'ceph-osd', 'ceph', 'rbd', 'monmaptool',
                'ceph-authtool')
    drivers = ('rbd',)
    # With those for the header of the RBD image, as the OSD counts them
    metadata = 300
    waits = True
    CONF = """
[global]
fsid = {fsid}
mon host = {host}
mon initial members = a
auth cluster required = none
auth service required = none
auth client required = none
ms bind ipv6 = false
public addr = 127.0.0.1
cluster addr = 127.0.0.1
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd crush chooseleaf type = 0
mon allow pool size one = true
mon data avail warn = 1
mon data avail crit = 1
run dir = {folder}
log file = {folder}/$name.log
admin socket = {folder}/$name.asok
pid file = {folder}/$name.pid
keyring = {folder}/keyring
mon data = {folder}/mon
mgr data = {folder}/mgr
osd data = {folder}/osd
osd objectstore = bluestore
osd numa auto affinity = false
bluestore block size = 3221225472
bluestore block create = true
"""

    def __init__(self, folder, fixed=False, direct=False):
        super().__init__(folder)
        self.fixed = fixed
        self.conf = os.path.join(folder, 'ceph.conf')
        self.url = f'rbd:rbd/disk:conf={self.conf}'
        self.node = {'driver': 'rbd', 'pool': 'rbd', 'image': 'disk',
                     'conf': self.conf, 'cache': {'direct': direct}}
        self.requests.prefix = []
        self.host = (f'[v2:127.0.0.1:{free_port()},v1:127.0.0.1:'
                     f'{free_port()}]')

    def ceph(self, *words):
        return run('timeout', '120', *words, env=self.environment())

    def environment(self):
        return {**os.environ, 'CEPH_CONF': self.conf}

    def prepare(self):
        fsid, osd = uuid.uuid4(), uuid.uuid4()
        for name in 'mon', 'mgr', 'osd':
            os.mkdir(os.path.join(self.folder, name))
        with open(self.conf, 'w', encoding='utf-8') as f:
            f.write(self.CONF.format(fsid=fsid, folder=self.folder,
                                     host=self.host))
        keyring, monmap = (os.path.join(self.folder, name)
                           for name in ('keyring', 'monmap'))
        run('ceph-authtool', '--create-keyring', keyring, '--gen-key', '-n',
            'mon.', '--cap', 'mon', 'allow *')
        run('monmaptool', '--create', '--addv', 'a', self.host, '--fsid',
            str(fsid), monmap)
        self.ceph('ceph-mon', '--mkfs', '-i', 'a', '--monmap', monmap,
                  '--keyring', keyring)
        self.spawn_beside('ceph-mon', '-f', '-i', 'a')
        self.ceph('ceph', 'osd', 'new', str(osd))
        self.spawn_beside('ceph-mgr', '-f', '-i', 'x')
        self.ceph('ceph-osd', '-i', '0', '--mkfs', '--osd-uuid', str(osd))

    def command(self):
        return ['ceph-osd', '-f', '-i', '0']

    def ready(self):
        try:
            self.counters()
        except (Failed, ValueError):
            return False
        return ' up ' in self.ceph('ceph', 'osd', 'dump')

    def __enter__(self):
        super().__enter__()
        with self.stack:
            self.ceph('ceph', 'osd', 'pool', 'create', 'rbd', '8')
            self.ceph('rbd', 'pool', 'init', 'rbd')
            self.stack = self.stack.pop_all()
        return self

    def fresh(self, mib=0):
        if not self.process:
            return
        if 'disk' in self.ceph('rbd', 'ls').split():
            self.ceph('rbd', 'rm', '--no-progress', 'disk')
        if mib or self.fixed:
            self.ceph('rbd', 'create', '-s', f'{mib or DISK}M', 'disk')

    def counters(self):
        return json.loads(self.ceph('ceph', 'daemon', 'osd.0', 'perf', 'dump')
                          )['osd']

    def so_far(self):
        found = self.counters()
        return found['op_r'], found['op_w']

    def fill(self):
        """Beyond the quota of the pool, which the monitor notices late"""
        self.ceph('rbd', 'create', '-s', '32M', 'ballast')
        self.ceph('rbd', 'bench', '--io-type', 'write', '--io-size', '1M',
                  '--io-total', '16M', 'ballast')
        self.ceph('ceph', 'osd', 'pool', 'set-quota', 'rbd', 'max_bytes',
                  str(8 * MIB))
        wait_for(lambda: 'POOL_FULL' in self.ceph('ceph', 'health', 'detail'),
                 'a full pool')

    def free(self):
        self.ceph('ceph', 'osd', 'pool', 'set-quota', 'rbd', 'max_bytes', '0')


NBDKIT = ['nbdkit', '-f', '-U', '{socket}', '--filter=blocksize-policy', 'file',
          '{path}', 'blocksize-preferred=65536', 'blocksize-error-policy=error']
QEMU_NBD = ['{build}/qemu-nbd', '-k', '{socket}', '-t', '-f', 'raw', '-e', '8',
            '--cache=none']

@dataclasses.dataclass
class Entry:
    """How a store is made in a folder, and whether make check has it"""
    make: 'typing.Callable[[str], Store]'
    quick: bool = False


STORES = {
    'ext4': Entry(Store),
    'ext4-cached': Entry(lambda f: Store(f, direct=False)),
    'xfs': Entry(lambda f: Store(f, 'xfs'), True),
    'xfs-4k': Entry(lambda f: Store(f, 'xfs', 4096)),
    'btrfs': Entry(lambda f: Store(f, 'btrfs')),
    'tmpfs': Entry(lambda f: Store(f, 'tmpfs')),
    'overlayfs': Entry(lambda f: Store(f, 'overlay')),
    'loop-4k': Entry(Device, True),
    'qemu-nbd': Entry(lambda f: Nbd(f, [*QEMU_NBD, '{path}']), True),
    'qemu-nbd-4k': Entry(lambda f: Nbd(f, [*QEMU_NBD, '{path}'], block=4096)),
    'nbdkit-64k': Entry(lambda f: Nbd(f, [*NBDKIT, 'blocksize-minimum=65536'])),
    'fuse': Entry(Fuse),
    'iscsi': Entry(lambda f: Iscsi(f, 512)),
    'iscsi-4k': Entry(lambda f: Iscsi(f, 4096), True),
    'ssh': Entry(Ssh),
    'nfs': Entry(Nfs),
    'ceph': Entry(Ceph),
    'ceph-fixed': Entry(lambda f: Ceph(f, fixed=True)),
    'ceph-direct': Entry(lambda f: Ceph(f, direct=True)),
}
