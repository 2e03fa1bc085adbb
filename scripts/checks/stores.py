# SPDX-License-Identifier: GPL-2.0-or-later
"""
The stores of kind storage: devices, file systems and servers that hold an image.

STORES at the end is the list of them. A store is started on loopback, in a
folder of its own on a small file system that can be made full, and stopped when
the test is over. strace counts its reads and writes: of the server to the file
that it serves, or of the client to a file or device.
"""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import typing
import uuid

from lab import BUILD, MIB, Failed, Skipped, free_port, wait_for
from .store_base import DISK, LEFT, Loop, Requests, Server, Store, run


class Device(Store):
    """A loop device of 4096-byte blocks as a logical volume, which is grown"""

    section = 'Disks'
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

    def places(self):
        return [('/dev/vg/backup', self.path)]

    def fresh(self, mib=DISK):
        self.device.resize(0)
        self.device.resize(mib)

    def fill(self):
        self.device.resize(LEFT)

    def free(self):
        self.device.resize(DISK)


class Nbd(Server):
    """An NBD server on a UNIX socket"""

    section = 'NBD'
    drivers = ('nbd',)

    def __init__(self, folder, command, **kwargs):
        super().__init__(folder, **kwargs)
        self.programs = (command[0].format(build=BUILD),)
        self.words = command
        self.url = f'nbd+unix:///?socket={self.socket}'
        self.node = {'driver': 'nbd', 'reconnect-delay': 60,
                     'server': {'type': 'unix', 'path': self.socket}}

    def places(self):
        return [('/run/backup.sock', self.socket)]

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

    section = 'iSCSI'
    programs = ('tgtd', 'tgtadm')
    drivers = ('iscsi',)
    NAME = 'iqn.2026-01.example:backup'

    def __init__(self, folder, block):
        super().__init__(folder)
        self.block = block
        # Instances of tgtd have numbers
        self.number = block // 512
        self.port = free_port()
        self.url = f'iscsi://127.0.0.1:{self.port}/{self.NAME}/1'
        self.node = {'driver': 'iscsi', 'transport': 'tcp', 'lun': 1, 'portal':
                     f'127.0.0.1:{self.port}', 'target': self.NAME}

    def places(self):
        return [('192.0.2.1', f'127.0.0.1:{self.port}')]

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

    section = 'SSH'
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

    def places(self):
        """With the server's key unknown"""
        return [('ssh://backup@192.0.2.1/srv/backup.qcow2', self.url),
                ('192.0.2.1', '127.0.0.1'), ('=22', f'={self.port}'),
                ('=backup,', '=root,file.host-key-check.mode=none,'),
                ('/srv/backup.qcow2', self.path)]

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
    """A file of nfs-ganesha, in a network of its own, as QEMU's URLs name no
    port, and with a /run of its own"""

    section = 'NFS'
    programs = ('ganesha.nfsd', 'rpcbind', 'unshare', 'nsenter')
    drivers = ('nfs',)
    fresh = Store.fresh

    def __init__(self, folder):
        super().__init__(folder)
        self.url = f'nfs://127.0.0.1{self.path}'
        self.node = {'driver': 'nfs', 'path': self.path,
                     'server': {'host': '127.0.0.1', 'type': 'inet'}}

    def prepare(self):
        ready = os.path.join(self.folder, 'ready')
        holder = self.spawn_beside(
            'unshare', '-n', '-m', 'sh', '-e', '-c', 'mount -t tmpfs none /run;'
            ' mkdir /run/ganesha; ip link set lo up; touch "$1";'
            ' exec sleep infinity', 'sh', ready)
        wait_for(lambda: os.path.exists(ready), 'a network')
        self.enter = ('nsenter', '-n', '-m', '-t', str(holder.pid))
        self.spawn_beside('rpcbind', '-f')
        with open(f'{self.folder}/ganesha.conf', 'w', encoding='utf-8') as f:
            f.write('NFS_CORE_PARAM { Enable_NLM = false; Enable_RQUOTA = false;'
                    ' Protocols = 3; }\n'
                    f'EXPORT {{ Export_Id = 1; Path = {self.space.folder};'
                    ' Pseudo = /x; Access_Type = RW; Squash = No_Root_Squash;'
                    ' SecType = sys, none; Protocols = 3; Transports = TCP;'
                    ' FSAL { Name = VFS; } }\n')

    def places(self):
        return [('192.0.2.1', '127.0.0.1'), ('/exports/backup.qcow2', self.path)]

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

    fixed: it gets its size before it is written, instead of growing.
    """

    section = 'Ceph'
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
        if fixed:
            # librbd merges adjacent writes as well
            self.fewer = 1
        self.conf = os.path.join(folder, 'ceph.conf')
        self.url = f'rbd:rbd/backup:conf={self.conf}'
        self.node = {'driver': 'rbd', 'pool': 'rbd', 'image': 'backup',
                     'conf': self.conf, 'cache': {'direct': direct}}
        self.requests.prefix = []
        self.host = (f'[v2:127.0.0.1:{free_port()},v1:127.0.0.1:'
                     f'{free_port()}]')

    def places(self):
        return []

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
        except (Failed, KeyError, ValueError):
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
        if 'backup' in self.ceph('rbd', 'ls').split():
            self.ceph('rbd', 'rm', '--no-progress', 'backup')
        if mib:
            self.ceph('rbd', 'create', '-s', f'{mib}M', 'backup')

    def created(self):
        if self.fixed:
            self.ceph('rbd', 'resize', '--no-progress', '-s', f'{DISK}M',
                      'backup')

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

    def restore(self):
        self.free()
        super().restore()


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
    'ceph-fixed-direct': Entry(lambda f: Ceph(f, fixed=True, direct=True)),
}
