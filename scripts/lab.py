# SPDX-License-Identifier: GPL-2.0-or-later
"""
What scripts that measure need: image data, disks with a delay, programs that
are timed, and what happened to a file.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time

from patchset import build_folder

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BUILD = os.path.join(TOP, os.environ.get('BUILD') or
                     build_folder(os.environ.get('WITH') or ''))
QEMU_IMG = os.path.join(BUILD, 'qemu-img')
# mke2fs is there, and an ordinary user's PATH may not be
os.environ['PATH'] += ':/usr/sbin:/sbin'

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
FOLDERS = ['/usr/bin', '/usr/sbin', '/usr/lib', '/usr/share', '/usr/include',
           '/usr/local', '/opt', '/var/lib']


# For a libvirt that runs as root, without systemd
LIBVIRT_QEMU_CONF = """security_driver = "none"
user = "root"
group = "root"
remember_owner = 0
namespaces = []
cgroup_controllers = []
stdio_handler = "file"
"""


class Failed(Exception):
    """It cannot go on, or a result is wrong; the text tells why."""


class Skipped(Exception):
    """It cannot run here; the text tells why."""


def expect(condition, text):
    if not condition:
        raise Failed(text)


def wait_for(condition, what, seconds=120):
    """What the condition returns, once that is true; bounded only so that the
    run ends"""
    end = time.monotonic() + seconds
    while not (found := condition()):
        expect(time.monotonic() < end, f'{what}: not in {seconds} s')
        time.sleep(0.05)
    return found


def free_port():
    """A TCP port of 127.0.0.1 that nobody uses now"""
    with socket.create_server(('127.0.0.1', 0)) as server:
        return server.getsockname()[1]


def libvirt_guest(name, emulator, disk):
    """The XML of a guest of libvirt with a raw disk, which need not boot"""
    return f"""<domain type='qemu'>
  <name>{name}</name>
  <memory unit='MiB'>64</memory>
  <features><acpi/></features>
  <os><type arch='x86_64' machine='pc'>hvm</type></os>
  <devices>
    <emulator>{emulator}</emulator>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw'/>
      <source file='{disk}'/>
      <target dev='vda' bus='virtio'/>
    </disk>
  </devices>
</domain>
"""


def qemu_img(*args):
    """Run qemu-img; returns what it printed."""
    done = subprocess.run([QEMU_IMG, *args], stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, check=False)
    if done.returncode != 0:
        raise Failed(f'qemu-img {" ".join(args)}\n{done.stdout}')
    return done.stdout


def verify(source, path):
    """Compare a qcow2 image with the raw one it was made of, and check it."""
    qemu_img('compare', '-q', '-f', 'raw', '-F', 'qcow2', source, path)
    qemu_img('check', '-q', '-f', 'qcow2', path)


def image_end(path):
    """Where the used clusters of a qcow2 image end, in bytes"""
    found = json.loads(qemu_img('check', '--output=json', '-f', 'qcow2', path))
    return found['image-end-offset']


def collect_files(folder, mib):
    """Copy files of this machine to folder, always the same ones."""
    left = mib * MIB
    for top in FOLDERS:
        for path, dirs, files in os.walk(top):
            dirs.sort()
            if path.startswith(TOP):
                dirs.clear()
                continue
            to = os.path.join(folder, path.lstrip('/'))
            for name in sorted(files):
                file = os.path.join(path, name)
                if os.path.islink(file) or not os.path.isfile(file) or \
                        not os.access(file, os.R_OK):
                    continue
                left -= os.path.getsize(file)
                if left < 0:
                    return
                os.makedirs(to, exist_ok=True)
                shutil.copyfile(file, os.path.join(to, name))


def make_files_image(image, files_mib, image_mib):
    """Make an ext4 image with files of this machine, if it is not there."""
    if os.path.exists(image):
        return
    print(f'Making an ext4 image of {image_mib} MiB with files of this'
          ' machine', flush=True)
    with tempfile.TemporaryDirectory(dir=os.path.dirname(image)) as folder:
        collect_files(folder, files_mib)
        new = image + '.new'
        subprocess.run(['mke2fs', '-q', '-F', '-t', 'ext4', '-d', folder,
                        new, f'{image_mib}M'],
                       stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                       check=True)
        os.rename(new, image)


def make_once(path, write):
    """Make a file, if it is not there, by what write(file) writes."""
    if not os.path.exists(path):
        with open(path + '.new', 'wb') as f:
            write(f)
        os.rename(path + '.new', path)


def read_whole(path):
    """Read a file, so that it is in the page cache."""
    with open(path, 'rb') as f:
        while f.read(MIB):
            pass


def remove_and_sync(path):
    """Remove a file; else the next run, of another side, pays for it."""
    os.unlink(path)
    subprocess.run(['sync', '-f', os.path.dirname(path)], check=True)


def cached_pages(path):
    """How many pages of a file are in the page cache"""
    done = subprocess.run(['fincore', '--json', '--bytes', '-o', 'PAGES', path],
                          stdout=subprocess.PIPE, text=True, check=True)
    return int(json.loads(done.stdout)['fincore'][0]['pages'])


class Profile:
    """Where a program spends its processor time, by perf"""

    def __init__(self, path):
        self.data = path + '.perf'
        # To be put before the command
        self.prefix = ['perf', 'record', '-q', '-F', '999', '-e', 'cpu-clock',
                       '-o', self.data, '--']

    def share(self, library):
        """Of the samples in libraries whose names begin with this"""
        report = subprocess.run(
            ['perf', 'report', '-i', self.data, '--stdio', '-s', 'dso'],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            check=True).stdout
        os.unlink(self.data)
        return sum(float(m.group(1)) / 100 for m in re.finditer(
            rf'^ +([\d.]+)% +{library}', report, re.M))


class DirtyMemory:
    """How much more memory becomes dirty meanwhile: a with statement.

    All of the machine counts; what is dirty before on the file system of folder
    is written first. self.peak is in bytes.
    """

    def __init__(self, folder):
        self.folder = folder
        self.peak = 0
        self.start = 0
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.watch)

    @staticmethod
    def now():
        with open('/proc/meminfo', encoding='utf-8') as f:
            return KIB * sum(int(line.split()[1]) for line in f
                             if line.startswith(('Dirty:', 'Writeback:')))

    def watch(self):
        while not self.done.wait(0.01):
            self.peak = max(self.peak, self.now() - self.start)

    def __enter__(self):
        subprocess.run(['sync', '-f', self.folder], check=True)
        self.start = self.now()
        self.thread.start()
        return self

    def __exit__(self, *exception):
        self.done.set()
        self.thread.join()


class RequestLog:
    """Counts the requests of a program to one file, by strace."""

    CALLS = 'pread64,preadv,preadv2,pwrite64,pwritev,pwritev2'

    def __init__(self, path, calls=CALLS):
        self.log = path + '.strace'
        # To be put before the command
        self.prefix = ['strace', '-f', '--seccomp-bpf', '-qq', '-o', self.log,
                       '-P', path, '-e', f'trace={calls}']

    def count(self, call):
        """How often a system call was made"""
        with open(self.log, encoding='utf-8', errors='replace') as f:
            found = sum(bool(re.search(rf'\b{call}(\(| resumed).* = ', line))
                        for line in f)
        os.unlink(self.log)
        return found

    def so_far(self):
        """{'reads': ..., 'writes': ..., 'written': bytes}"""
        count = {'reads': 0, 'writes': 0, 'written': 0}
        with open(self.log, encoding='utf-8', errors='replace') as f:
            for line in f:
                m = re.search(r'\bp?(read|write)\w*(?:\(| resumed).* = (\d+)$',
                              line)
                if m:
                    count[m.group(1) + 's'] += 1
                    if m.group(1) == 'write':
                        count['written'] += int(m.group(2))
        return count

    def read(self):
        """The same, and remove the log"""
        count = self.so_far()
        os.unlink(self.log)
        return count


def is_listening(pid, path):
    """Whether a process listens on a socket, which exists a moment before"""
    accepts = '00010000'
    with open(f'/proc/{pid}/net/unix', encoding='utf-8') as f:
        return any(words[3] == accepts and words[7:] == [path]
                   for words in map(str.split, f))


class Server:
    """A program that listens on a socket, to be used in a with statement.

    command(path of the socket) is the command line; or a subclass has it.
    """

    def __init__(self, command=None):
        # Paths of sockets must be short
        self.folder = tempfile.TemporaryDirectory(prefix='seqcache-')
        self.socket = os.path.join(self.folder.name, 'socket')
        self.process = None
        if command:
            self.command = command

    # pylint: disable-next=method-hidden
    def command(self, path):
        raise NotImplementedError

    def __enter__(self):
        command = self.command(self.socket)
        # pylint: disable-next=consider-using-with
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        while not is_listening(self.process.pid, self.socket):
            if self.process.poll() is not None:
                raise Failed(f'{" ".join(command)} did not start')
            time.sleep(0.01)
        return self

    def stop(self):
        self.process.send_signal(signal.SIGTERM)

    def __exit__(self, *exception):
        if self.process.poll() is None:
            self.stop()
        self.process.wait()
        self.folder.cleanup()


class SlowDisk(Server):
    """A disk on the network with blocks of 4 KiB: nbdkit.

    plugin is what it consists of, in nbdkit's words, for instance
    ['memory', '1G'] or ['file', 'PATH']. Each request takes the time delay, for
    instance '4ms', and each query for block status extents_delay. filters
    are filters before all others. self.options is the disk for QEMU, as a list
    of options of the node, with the prefix given.

    Afterwards self.reads, self.writes, self.read, self.written (in bytes, as
    nbdkit rounds them), self.queries and requests() tell what it had to do.
    """

    def __init__(self, plugin, delay=None, block=4096, extents_delay=None,
                 filters=()):
        super().__init__()
        self.stats = os.path.join(self.folder.name, 'stats')
        self.plugin = plugin
        self.delay = delay
        self.block = block
        self.extents_delay = extents_delay
        self.filters = filters
        self.reads = self.writes = self.written = self.read = 0
        self.queries = 0

    def requests(self):
        return {'requests': self.reads + self.writes, 'reads': self.reads,
                'writes': self.writes}

    def options(self, prefix=''):
        return (f'{prefix}driver=nbd,{prefix}server.type=unix,'
                f'{prefix}server.path={self.socket}')

    def command(self, path):
        command = ['nbdkit', '-f', '-U', path, *self.filters,
                   '--filter=blocksize-policy', '--filter=stats']
        options = [f'blocksize-minimum={self.block}',
                   'blocksize-preferred=65536', 'blocksize-maximum=32M',
                   'blocksize-error-policy=error', f'statsfile={self.stats}']
        if self.delay or self.extents_delay:
            command.append('--filter=delay')
        if self.delay:
            options += [f'rdelay={self.delay}', f'wdelay={self.delay}']
        if self.extents_delay:
            options.append(f'delay-extents={self.extents_delay}')
        return [*command, *self.plugin, *options]

    def __exit__(self, *exception):
        self.stop()
        self.process.wait()
        if os.path.exists(self.stats):
            self.read_stats()
        super().__exit__(*exception)

    def read_stats(self):
        unit = {'bytes': 1, 'KiB': KIB, 'MiB': MIB, 'GiB': KIB * MIB}
        seen = {}
        with open(self.stats, encoding='utf-8') as f:
            for line in f:
                m = re.match(r'(\w+): (\d+) ops, [\d.]+ s, ([\d.]+) (\w+)',
                             line)
                if m and m.group(1) not in seen:
                    ops, size, name = m.groups()[1:]
                    seen[m.group(1)] = (int(ops), float(size) * unit[name])
        self.queries = seen.get('extents', (0, 0))[0]
        self.reads, self.read = seen.get('read', (0, 0))
        self.writes, self.written = seen.get('write', (0, 0))


class StorageDaemon(Server):
    """qemu-storage-daemon with an NBD export "disk" of the node "disk".

    blockdev is the node's --blockdev argument without the node name. self.uri
    is the export.
    """

    def __init__(self, blockdev):
        super().__init__()
        self.blockdev = blockdev
        self.monitor = os.path.join(self.folder.name, 'qmp')
        self.uri = f'nbd+unix:///disk?socket={self.socket}'

    def command(self, path):
        program = os.path.join(BUILD, 'storage-daemon', 'qemu-storage-daemon')
        return [program, '--blockdev', f'node-name=disk,{self.blockdev}',
                '--chardev', f'socket,id=qmp,server=on,wait=off,path='
                f'{self.monitor}', '--monitor', 'chardev=qmp',
                '--nbd-server', f'addr.type=unix,addr.path={path},'
                'max-connections=64', '--export',
                'nbd,id=disk,node-name=disk,name=disk,writable=on']

    def qmp(self, command, **arguments):
        """What a QMP command returns"""
        with socket.socket(socket.AF_UNIX) as s:
            # So that a daemon that hangs does not keep the run
            s.settimeout(300)
            s.connect(self.monitor)
            with s.makefile('rw', encoding='utf-8') as f:
                for name, args in (('qmp_capabilities', {}),
                                   (command, arguments)):
                    json.dump({'execute': name, 'arguments': args, 'id': name},
                              f)
                    f.write('\n')
                    f.flush()
                    # The greeting and events come as well, in any order
                    answer = {}
                    while answer.get('id') != name:
                        answer = json.loads(f.readline())
                    if 'error' in answer:
                        raise Failed(f'{name}: {answer["error"]["desc"]}')
        return answer['return']

    def run_job(self, command, **arguments):
        """Run a job to its end; returns how many seconds it took."""
        start = time.monotonic()
        self.qmp(command, **arguments,
                 **{'job-id': 'job', 'auto-dismiss': False})
        while True:
            job = self.qmp('query-jobs')[0]
            if job['status'] == 'concluded':
                break
            time.sleep(0.01)
        seconds = time.monotonic() - start
        self.qmp('job-dismiss', id='job')
        if 'error' in job:
            raise Failed(f'{command}: {job["error"]}')
        return seconds

    def cpu(self):
        """The processor time of all of its threads so far, in seconds"""
        with open(f'/proc/{self.process.pid}/stat', encoding='utf-8') as f:
            fields = f.read().rpartition(')')[2].split()
        return sum(map(int, fields[11:13])) / os.sysconf('SC_CLK_TCK')

    def peak_memory(self):
        """The most that was resident so far, in bytes"""
        with open(f'/proc/{self.process.pid}/status', encoding='utf-8') as f:
            return KIB * int(re.search(r'^VmHWM:\s*(\d+) kB', f.read(),
                                       re.M).group(1))


def run_timed(command):
    """Run a program; returns a dict with what it took.

    seconds: from start to end; cpu: of all of its threads, in seconds; memory:
    the most that was resident, in bytes; output: what it printed.
    """
    with tempfile.NamedTemporaryFile('r') as peak, \
         tempfile.TemporaryFile('w+') as out:
        # What the kernel tells of memory begins with that of the process that
        # has started the program; GNU time is a small one
        command = ['time', '-q', '-f', '%M', '-o', peak.name, *command]
        start = time.monotonic()
        # pylint: disable-next=consider-using-with
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL,
                                   stdout=out, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        output = out.read()
        if process.returncode != 0:
            raise Failed(f'{" ".join(command)}\n{output}')
        return {'seconds': seconds, 'cpu': usage.ru_utime + usage.ru_stime,
                'memory': int(peak.read()) * KIB, 'output': output}
