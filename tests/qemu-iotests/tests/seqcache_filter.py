# What the tests of the filter node seqcache share
#
# This work is licensed under the terms of the GNU GPL, version 2 or later.
# See the COPYING file in the top-level directory.
#
# SPDX-License-Identifier: GPL-2.0-or-later

import os
from typing import Any, Dict, Iterable, List, Tuple, Union

from qcow2_compressed_cache import (
    KiB, Machine, QemuIo, assert_no_complaint, dashes, hmp_io, opts
)
import iotests
from iotests import qemu_io


NodeRef = Union[str, Dict[str, Any]]


def filter_node(name: str, file: NodeRef, **kwargs: Any) -> Dict[str, Any]:
    return {'driver': 'seqcache', 'node-name': name, 'file': file,
            **dashes(kwargs)}


def flat_opts(node: Dict[str, Any]) -> str:
    '''The options of a node, as --image-opts takes them'''
    def flatten(prefix: str, value: Any) -> List[str]:
        items: Iterable[Tuple[Any, Any]]
        if isinstance(value, dict):
            items = value.items()
        elif isinstance(value, list):
            items = enumerate(value)
        else:
            if isinstance(value, bool):
                value = 'on' if value else 'off'
            return [f'{prefix}={value}']
        return [option for key, child in items
                for option in flatten(f'{prefix}.{key}' if prefix
                                      else str(key), child)]

    return ','.join(flatten('', node))


def filter_stats(machine: Machine, node: str) -> Dict[str, int]:
    '''The statistics of the filter's cache, {} if it has none'''
    nodes: Any = machine.cmd('query-blockstats', {'query-nodes': True})
    for stats in nodes:
        if stats['node-name'] == node:
            specific = stats.get('driver-specific', {'driver': 'seqcache'})
            assert specific.pop('driver') == 'seqcache'
            return dict(specific)
    raise AssertionError(f'no node {node}')


def is_dirty(machine: Machine, node: str) -> bool:
    '''
    Whether more was accepted than was written, if nothing was overwritten or
    written twice
    '''
    stats = filter_stats(machine, node)
    return stats['accepted-bytes'] > stats['issued-bytes']


def virtual_size(machine: Machine, node: str) -> int:
    nodes: Any = machine.cmd('query-named-block-nodes')
    return next(int(n['image']['virtual-size']) for n in nodes
                if n['node-name'] == node)


class Server:
    '''The NBD server of a machine'''

    def __init__(self, case: iotests.QMPTestCase, machine: Machine,
                 name: str = 'server') -> None:
        self.case = case
        self.machine = machine
        self.sock = os.path.join(iotests.sock_dir, f'{name}.sock')
        machine.cmd('nbd-server-start', {
            'addr': {'type': 'unix', 'data': {'path': self.sock}},
            'max-connections': 0
        })

    def export(self, node: str, writable: bool = True,
               **kwargs: Any) -> 'Export':
        return Export(self, node, writable, **kwargs)


class Export:
    '''
    A parent of a node, and a client.  What the client writes stays in the
    node's cache unless somebody flushes.
    '''
    def __init__(self, server: Server, node: str, writable: bool,
                 **kwargs: Any) -> None:
        self.machine = server.machine
        self.node = node
        self.name = f'{node}-{"rw" if writable else "ro"}'
        self.machine.cmd('block-export-add', {
            'type': 'nbd', 'id': self.name, 'node-name': node,
            'name': self.name, 'writable': writable, **dashes(kwargs)
        })
        self.opts = opts(driver='nbd', export=self.name, server__type='unix',
                         server__path=server.sock)
        self.io = QemuIo(self.opts, *([] if writable else ['-r']))
        server.case.addCleanup(self.io.kill)

    def flush(self) -> bool:
        '''Whether a flush succeeds'''
        return qemu_io('-c', 'flush', '--image-opts', self.opts,
                       check=False).returncode == 0

    def specific_stats(self) -> Dict[str, Any]:
        nodes: Any = self.machine.cmd('query-blockstats',
                                      {'query-nodes': True})
        return next(stats.get('driver-specific', {}) for stats in nodes
                    if stats['node-name'] == self.node)

    def has_writer(self) -> bool:
        graph: Any = self.machine.cmd('x-debug-query-block-graph')
        ids = {n['id']: n['name'] for n in graph['nodes']}
        return any('write' in edge['perm'] for edge in graph['edges']
                   if ids[edge['child']] == self.node)

    def remove(self, wait: bool = True) -> None:
        '''
        Let go of the node without a flush.  If it is a filter and this was its
        last writer, wait until it has tried to write what it has, which it
        does in the background.
        '''
        errors = self.specific_stats().get('errors', 0)
        self.io.kill()
        self.machine.cmd('block-export-del',
                         {'id': self.name, 'mode': 'hard'})
        if isinstance(self.machine, iotests.VM):
            event = self.machine.event_wait('BLOCK_EXPORT_DELETED',
                                            timeout=60.0)
        else:
            event = self.machine.get_qmp().pull_event(wait=60.0)
        assert event is not None and event['data']['id'] == self.name

        wait = wait and not self.has_writer()
        while wait:
            stats = self.specific_stats()
            wait = stats.get('unwritten-bytes', 0) > 0 and \
                stats['errors'] == errors


class Script:
    '''
    A fixed sequence of commands for qemu-io, and what they should result in.
    The result of a command that has failed is not known until it is repeated.
    '''
    size = 256 * KiB
    steps: Tuple[Tuple[str, int, int], ...] = (
        ('write', 100, 1000), ('write', 1100, 5000), ('write', 65000, 3000),
        ('read', 50000, 20000), ('write', 500, 1000), ('write', 131072, 65536),
        ('write', 131000, 200), ('flush', 0, 0), ('write', 6100, 700),
        ('read', 4000, 4000), ('write -z', 4096, 4096),
        ('write -z -u', 65536, 8192), ('discard', 131072, 8192),
        ('write -f', 10000, 300), ('write', 10300, 70000),
        ('write', 200000, 500), ('write', 200500, 9500), ('flush', 0, 0),
        ('write', 210000, 20000), ('write', 205000, 20000),
        ('truncate', 245760, 0), ('write', 245000, 760),
        ('truncate', 262144, 0), ('write', 262000, 100),
        ('read', 195000, 8000), ('write', 0, 200), ('flush', 0, 0),
        ('write -f', 131100, 77),
    )

    def __init__(self, case: iotests.QMPTestCase, io: QemuIo) -> None:
        self.case = case
        self.io = io
        self.data = bytearray(self.size)
        self.unknown = bytearray(self.size)
        self.failed: List[int] = []

    def read(self, offset: int, length: int) -> bool:
        data = self.io.read(offset, length)
        if not data:
            return False
        unknown = self.unknown[offset:offset + length]
        expected = bytes(b if u else a for a, b, u in zip(
            self.data[offset:offset + length], data, unknown))
        self.case.assertTrue(data == expected, 'wrong data')
        return True

    def step(self, number: int) -> bool:
        command, offset, length = self.steps[number]
        if command == 'read':
            return self.read(offset, length)

        pattern = 0
        if command in ('write', 'write -f'):
            pattern = number + 1
            out = self.io.cmd(f'{command} -P {pattern} {offset} {length}')
        elif command == 'truncate':
            out = self.io.cmd(f'truncate {offset}')
        else:
            out = self.io.cmd(f'{command} {offset} {length}'
                              if length else command)
        done = all(word not in out for word in ('rror', 'ailed', 'No space'))
        if command == 'truncate':
            if done:
                self.data = self.data[:offset].ljust(self.size, b'\0')
                self.unknown = self.unknown[:offset].ljust(self.size, b'\0')
        else:
            self.data[offset:offset + length] = bytes([pattern]) * length
            self.unknown[offset:offset + length] = bytes([not done]) * length
        return done

    def run(self, start: int, end: int) -> None:
        '''Remembers what fails'''
        for number in range(start, end):
            if not self.step(number):
                self.failed.append(number)

    def repeat(self) -> None:
        '''What failed must work now'''
        for number in self.failed:
            self.case.assertTrue(self.step(number), str(self.steps[number]))


def launch_with_controller(case: iotests.QMPTestCase, *args: str,
                           may_fail: bool = False, **kwargs: Any
                           ) -> iotests.VM:
    '''As launch_vm(), but disks can be plugged in'''
    def shutdown() -> None:
        vm.shutdown()
        if not may_fail:
            assert_no_complaint(case, vm)

    vm = iotests.VM()
    vm.add_args(*args)
    vm.add_device(opts(**{'driver': 'virtio-scsi', 'id': 'scsi', **kwargs}))
    vm.launch()
    case.addCleanup(shutdown)
    return vm


class Disk:
    '''A disk of a guest; it can be unplugged'''

    def __init__(self, vm: iotests.VM, node: str, driver: str = 'scsi-hd',
                 **kwargs: Any) -> None:
        self.vm = vm
        self.name = f'disk-{node}'
        vm.cmd('device_add', {'driver': driver, 'id': self.name,
                              'drive': node, 'bus': 'scsi.0',
                              **dashes(kwargs)})

    def io(self, cmd: str) -> None:
        '''What it prints is in the log of the VM'''
        hmp_io(self.vm, self.name, cmd, qdev=True)

    def unplug(self) -> None:
        self.vm.cmd('device_del', id=self.name)
        event = self.vm.event_wait('DEVICE_DELETED', timeout=60.0)
        assert event is not None and event['data']['device'] == self.name
