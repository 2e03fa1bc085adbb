# What the tests of qcow2's compressed cache share
#
# This work is licensed under the terms of the GNU GPL, version 2 or later.
# See the COPYING file in the top-level directory.
#
# SPDX-License-Identifier: GPL-2.0-or-later

import json
import os
import random
import re
import shutil
import struct
import subprocess
import time
from typing import (
    Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Tuple, TypeVar,
    Union
)

import iotests
from qcow2_format import QcowHeader


KiB = 1024
MiB = 1024 * KiB

# Options for image creation from the command line of check that the tests
# would contradict
unsupported_imgopts = ['cluster_size', 'compat', 'data_file', 'encrypt',
                       'extended_l2', 'preallocation', 'refcount_bits']

# Either of them answers to cmd(), which raises an exception for an error
Machine = Union[iotests.VM, iotests.QemuStorageDaemon]


# How much a random test does, as a multiple of what it does in "make check"
scale = int(os.environ.get('TEST_SCALE', 1))


def first_seed() -> int:
    '''Of a random test: TEST_SEED, to repeat what failed, or another one'''
    return int(os.environ.get('TEST_SEED', random.getrandbits(31)))


def random_bytes(size: int, seed: int) -> bytes:
    '''Data that does not compress'''
    return random.Random(seed).getrandbits(8 * size).to_bytes(size, 'little')


def half_random_bytes(size: int, seed: int) -> bytes:
    '''Data that compresses to a little more than half of its size'''
    return random_bytes((size + 1) // 2, seed).hex().encode('ascii')[:size]


def mixed_bytes(size: int, seed: int) -> bytes:
    '''Pieces of very different lengths that compress very differently'''
    rand = random.Random(seed)
    kinds: List[Callable[[int], bytes]] = [
        lambda n: b'\0' * n,
        lambda n: b'\xff' * n,
        lambda n: (b'All work and no play. ' * (n // 22 + 1))[:n],
        lambda n: random_bytes(n, rand.getrandbits(32)),
        lambda n: half_random_bytes(n, rand.getrandbits(32)),
    ]
    data = bytearray()
    while len(data) < size:
        data += rand.choice(kinds)(rand.randrange(1, 200 * KiB))
    return bytes(data[:size])


def write_file(path: str, data: Union[bytes, bytearray],
               offset: int = 0) -> None:
    mode = 'r+b' if offset else 'wb'
    with open(path, mode) as f:
        f.seek(offset)
        f.write(data)


def read_file(path: str) -> bytes:
    with open(path, 'rb') as f:
        return f.read()


def supports_o_direct() -> bool:
    path = os.path.join(iotests.test_dir, 'o_direct')
    try:
        os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_DIRECT))
    except OSError:
        return False
    finally:
        iotests.try_remove(path)
    return True


def skip_without_o_direct(case: iotests.QMPTestCase) -> None:
    if not supports_o_direct():
        case.case_skip(f'{case.id()}: TEST_DIR does not support O_DIRECT')


def skip_without_zstd(case: iotests.QMPTestCase) -> None:
    if not iotests.supports_qcow2_zstd_compression():
        case.case_skip(f'{case.id()}: zstd compression not supported')


def opts(**kwargs: Any) -> str:
    '''Options for --image-opts; "__" stands for "." and "_" for "-"'''
    return ','.join(key.replace('__', '.').replace('_', '-') + '=' +
                    str(value) for key, value in kwargs.items())


def dashes(kwargs: Dict[str, Any]) -> Dict[str, Any]:
    return {key.replace('_', '-'): value for key, value in kwargs.items()}


def file_node(path: str, direct: Optional[bool] = None,
              **kwargs: Any) -> Dict[str, Any]:
    '''A file node; uses the cache mode of the test run unless told'''
    if direct is None:
        direct = iotests.cachemode in ('none', 'directsync')
    return {'driver': 'file', 'filename': path, 'aio': iotests.aiomode,
            'cache': {'direct': direct}, **dashes(kwargs)}


def qcow2_node(name: str, file: Union[str, Dict[str, Any]],
               cache: Optional[Any] = None, **kwargs: Any) -> Dict[str, Any]:
    '''@cache: compressed-cache-size; None leaves it to the default'''
    node = {'driver': 'qcow2', 'node-name': name, 'file': file,
            **dashes(kwargs)}
    if cache is not None:
        node['compressed-cache-size'] = cache
    return node


def cache_stats(machine: Machine, node: str) -> Dict[str, int]:
    '''The statistics of the node's compressed cache, {} if it has none'''
    nodes: Any = machine.cmd('query-blockstats', {'query-nodes': True})
    for stats in nodes:
        if stats['node-name'] == node:
            if 'driver-specific' not in stats:
                return {}
            assert stats['driver-specific']['driver'] == 'qcow2'
            return dict(stats['driver-specific']['compressed-cache'])
    raise AssertionError(f'no node {node}')


def job(machine: Machine) -> Dict[str, Any]:
    '''The only job'''
    jobs: Any = machine.cmd('query-jobs')
    assert len(jobs) == 1
    return dict(jobs[0])


def finish_job(machine: Machine) -> None:
    '''Wait for the only job, which must end without an error; dismiss it'''
    while job(machine)['status'] != 'concluded':
        if isinstance(machine, iotests.VM):
            machine.event_wait('JOB_STATUS_CHANGE')
        else:
            machine.get_qmp().pull_event(wait=60.0)
    assert 'error' not in job(machine), job(machine)['error']
    machine.cmd('job-dismiss', {'id': job(machine)['id']})


def export_nbd(machine: Machine, node: str, writable: bool = False) -> str:
    '''Let NBD clients read the node, or write as well; returns the URI'''
    sock = os.path.join(iotests.sock_dir, f'export-{node}.sock')
    machine.cmd('nbd-server-start', {
        'addr': {'type': 'unix', 'data': {'path': sock}}
    })
    machine.cmd('block-export-add', {
        'type': 'nbd', 'id': f'export-{node}', 'node-name': node, 'name': node,
        'writable': writable
    })
    return f'nbd+unix:///{node}?socket={sock}'


def guest_bytes(image: str, *args: str, offset: int = 0,
                size: int = -1) -> bytes:
    '''What the guest sees; @args are for qemu-img convert'''
    path = os.path.join(iotests.test_dir, 'guest-bytes')
    iotests.qemu_img('convert', '-f', 'qcow2', '-O', 'raw', *args, image, path)
    with open(path, 'rb') as f:
        f.seek(offset)
        data = f.read(size)
    os.remove(path)
    return data


def check_clean(path: str) -> None:
    '''qemu-img check finds neither errors nor leaks'''
    result = iotests.qemu_img_check('-f', 'qcow2', path)
    problems = {key: value for key, value in result.items()
                if key in ('leaks', 'corruptions', 'check-errors') and value}
    assert not problems, f'{path}: {problems}'


def check_no_corruption(path: str) -> None:
    '''qemu-img check finds no errors; there may be leaks'''
    result = iotests.qemu_img_check('-f', 'qcow2', path)
    problems = {key: value for key, value in result.items()
                if key in ('corruptions', 'check-errors') and value}
    assert not problems, f'{path}: {problems}'


def qcow2_header(path: str) -> Dict[str, int]:
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


class QemuIo(iotests.QemuIoInteractive):
    '''An interactive qemu-io on one qcow2 image'''

    # A line of what read -v prints: offset, up to 16 bytes, text
    dump_re = re.compile(r'^[0-9a-f]+: ((?: [0-9a-f]{2})+)', re.M)

    def __init__(self, image_opts: str, *args: str) -> None:
        super().__init__(*args, '--image-opts', image_opts)
        self._output = ''

    def _read_output(self) -> str:
        # What the base class does takes seconds for a dump
        prompt = 'qemu-io> '
        while prompt not in self._output:
            piece = os.read(self._p.stdout.fileno(), MiB)
            assert piece, f'qemu-io ended: {self._output}'
            self._output += piece.decode('ascii', 'replace')
        out, self._output = self._output.split(prompt, 1)
        return out

    def cmd(self, cmd: str) -> str:
        with iotests.Timeout(60, f'no answer to {cmd}'):
            out: str = super().cmd(cmd)
        return out

    def kill(self) -> None:
        self._p.kill()
        self._p.communicate()

    def send(self, cmds: List[str]) -> None:
        '''Send commands without waiting; only kill() is allowed afterwards'''
        self._p.stdin.write(''.join(cmd + '\n' for cmd in cmds))
        self._p.stdin.flush()

    def read(self, offset: int, size: int) -> bytes:
        out = self.cmd(f'read -v {offset} {size}')
        return b''.join(bytes.fromhex(match[1])
                        for match in self.dump_re.finditer(out))

    def ok(self, cmd: str) -> str:
        '''Run a command that must not report any problem'''
        out = self.cmd(cmd)
        for word in ('failed', 'rror', 'ttern', 'nvalid', 'not '):
            assert word not in out, f'{cmd}: {out}'
        return out

    def fails(self, cmd: str, message: str) -> None:
        out = self.cmd(cmd)
        assert message in out, f'{cmd}: {out}'

    def flush_fails(self, message: str) -> None:
        '''A flush is refused; the flush command itself would not say so'''
        self.fails('write -f -P 1 0 512', message)

    def close(self) -> str:
        '''Quit; returns what was printed meanwhile'''
        out: str = self._output + self._p.communicate('q\n', timeout=60)[0]
        assert self._p.returncode >= 0, out
        return out

    @property
    def returncode(self) -> int:
        '''After close(): 1 if any command has failed, else 0'''
        code: int = self._p.returncode
        return code


def assert_no_complaint(case: iotests.QMPTestCase, vm: iotests.VM) -> None:
    '''
    After the end of @vm: neither QEMU nor its HMP qemu-io commands reported a
    problem.  What the symbolizer of a sanitizer cannot find does not count.
    '''
    case.assertEqual([line for line in (vm.get_log() or '').splitlines()
                      if re.search('failed|rror|Lost', line)
                      and 'llvm-symbolizer' not in line], [])


def launch_vm(case: iotests.QMPTestCase, may_fail: bool = False) -> iotests.VM:
    '''
    A VM that is shut down after the test.  Unless @may_fail, what its HMP
    qemu-io commands print must not report any problem.
    '''
    def shutdown() -> None:
        vm.shutdown()
        if not may_fail:
            assert_no_complaint(case, vm)

    vm = iotests.VM()
    vm.launch()
    case.addCleanup(shutdown)
    return vm


def hmp_io(vm: iotests.VM, device: str, cmd: str, qdev: bool = False) -> None:
    '''An HMP qemu-io command; see launch_vm() for its output'''
    result = vm.hmp_qemu_io(device, cmd, qdev=qdev)
    assert result['return'] == '', result['return']


class Request(NamedTuple):
    '''A request that a server received'''
    type: str
    offset: int
    bytes: int


NbdDiskT = TypeVar('NbdDiskT', bound='NbdDisk')


class NbdDisk:
    '''
    An NBD server for a raw file, whose size must be a multiple of the block
    size.  It insists on aligned requests like a disk with large blocks, and
    writes down all that it gets.  Use it as a context manager, or start() it.
    From fill() to free(), all that would change it fails with @error.
    '''

    log_re = re.compile(r' (Read|Write|Zero) id=\d+ offset=(0x[0-9a-f]+) '
                        r'count=(0x[0-9a-f]+) ')

    def __init__(self, path: str, name: str = 'nbd',
                 block_size: int = 4096, error: str = 'ENOSPC') -> None:
        self.sock = os.path.join(iotests.sock_dir, name + '.sock')
        self.log = os.path.join(iotests.test_dir, name + '.log')
        self.pid_file = os.path.join(iotests.test_dir, name + '.pid')
        self.full_file = os.path.join(iotests.test_dir, name + '.full')
        self.node: Dict[str, Any] = {
            'driver': 'nbd', 'server': {'type': 'unix', 'path': self.sock}
        }
        self.args = [
            'nbdkit', '--log=null', '--foreground', '--exit-with-parent',
            '--unix', self.sock, '--pidfile', self.pid_file, '--filter=log',
            '--filter=blocksize-policy', '--filter=error', 'file', path,
            f'logfile={self.log}', f'blocksize-minimum={block_size}',
            'blocksize-preferred=65536', 'blocksize-error-policy=error'
        ]
        for request in ('pwrite', 'zero', 'trim'):
            self.args += [f'error-{request}={error}',
                          f'error-{request}-rate=100%',
                          f'error-{request}-file={self.full_file}']
        self._p: 'Optional[subprocess.Popen[bytes]]' = None

    @property
    def uri(self) -> str:
        return f'nbd+unix:///?socket={self.sock}'

    def run(self) -> None:
        # pylint: disable=consider-using-with
        self._p = subprocess.Popen(self.args)
        while not os.path.exists(self.pid_file):
            if self._p.poll() is not None:
                raise RuntimeError(f'nbdkit exited: {self._p.returncode}')
            time.sleep(0.01)

    def stop(self) -> None:
        assert self._p is not None
        self._p.terminate()
        try:
            self._p.wait(10)
        except subprocess.TimeoutExpired:
            # It waits for clients
            self._p.kill()
            self._p.wait()
        for path in (self.sock, self.log, self.pid_file, self.full_file):
            iotests.try_remove(path)

    def fill(self) -> None:
        write_file(self.full_file, b'')

    def free(self) -> None:
        os.remove(self.full_file)

    def __enter__(self: NbdDiskT) -> NbdDiskT:
        self.run()
        return self

    def __exit__(self, exc_type: Any, exc: Any, tb: Any) -> None:
        self.stop()

    def start(self, case: iotests.QMPTestCase) -> None:
        '''Serve until the test is over'''
        self.run()
        case.addCleanup(self.stop)

    @staticmethod
    def skip_if_missing(case: iotests.QMPTestCase) -> None:
        if not shutil.which('nbdkit'):
            case.case_skip(f'{case.id()}: nbdkit not installed')

    def requests(self) -> List[Request]:
        with open(self.log, encoding='utf-8') as f:
            return [Request(match[1], int(match[2], 16), int(match[3], 16))
                    for match in map(self.log_re.search, f) if match]

    def nb_flushes(self) -> int:
        with open(self.log, encoding='utf-8') as f:
            return sum(' Flush id=' in line for line in f)


def add_figures(case: iotests.QMPTestCase, figures: Mapping[str, int]) -> None:
    '''Append to the file that TEST_FIGURES names what a test case counted'''
    path = os.environ.get('TEST_FIGURES')
    if path:
        with open(path, 'a', encoding='utf-8') as f:
            f.write(json.dumps({'case': case.id(), **figures}) + '\n')


def overlaps(request: Request, ranges: List[Tuple[int, int]]) -> bool:
    return any(request.offset < end and start < request.offset + request.bytes
               for start, end in ranges)
