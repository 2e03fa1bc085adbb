# Machines, virtual or storage daemons, and what QMP does with them: jobs,
# statistics, disks of guests, and exports
#
# SPDX-License-Identifier: GPL-2.0-or-later

import os
import re
from typing import Any, Dict, Optional, Sequence, Union

from images import Node, dashes, file_node, opts, qcow2_node
from nbd_client import Client
from qemuio import QemuIo
from qemu.machine import QEMUMachine
import iotests
from iotests import qemu_io


# All of them answer to cmd(), which raises an exception for an error
Machine = Union[iotests.VM, iotests.QemuStorageDaemon, QEMUMachine]


def assert_no_complaint(case: iotests.QMPTestCase, vm: iotests.VM) -> None:
    '''
    After the end of @vm: neither QEMU nor its HMP qemu-io commands reported a
    problem.  What the symbolizer of a sanitizer cannot find does not count.
    '''
    case.assertEqual([line for line in (vm.get_log() or '').splitlines()
                      if re.search('failed|rror|Lost', line)
                      and 'llvm-symbolizer' not in line], [])


def launch_vm(case: iotests.QMPTestCase, *args: str, may_fail: bool = False,
              scsi: Optional[Node] = None) -> iotests.VM:
    '''
    A VM that is shut down after the test.  Unless @may_fail, what its HMP
    qemu-io commands print must not report any problem.  With @scsi, the
    options of a controller, a Disk can be plugged in.
    '''
    def shutdown() -> None:
        vm.shutdown()
        if not may_fail:
            assert_no_complaint(case, vm)

    vm = iotests.VM()
    vm.add_args(*args)
    if scsi is not None:
        vm.add_device(opts(**{'driver': 'virtio-scsi', 'id': 'scsi', **scsi}))
    vm.launch()
    case.addCleanup(shutdown)
    return vm


def hmp_io(vm: iotests.VM, device: str, cmd: str, qdev: bool = False) -> None:
    '''An HMP qemu-io command; see launch_vm() for its output'''
    result = vm.hmp_qemu_io(device, cmd, qdev=qdev)
    assert result['return'] == '', result['return']


# Nodes

def add_node(machine: Machine, node: Node) -> None:
    '''Add a node with these options'''
    machine.cmd('blockdev-add', node)


def del_node(machine: Machine, name: str) -> None:
    '''Delete the node'''
    machine.cmd('blockdev-del', {'node-name': name})


def _of_node(machine: Machine, command: str, node: str, **kwargs: Any) -> Node:
    nodes: Any = machine.cmd(command, kwargs)
    return next(dict(n) for n in nodes if n.get('node-name') == node)


def _specific_stats(machine: Machine, node: str) -> Dict[str, Any]:
    return dict(_of_node(machine, 'query-blockstats', node,
                         **{'query-nodes': True}).get('driver-specific', {}))


def cache_stats(machine: Machine, node: str) -> Dict[str, Any]:
    '''
    The statistics of the cache that a qcow2, seqcache or cacheextents node
    has, {} if it has none
    '''
    stats = _specific_stats(machine, node)
    stats.pop('driver', None)
    reads = stats.pop('compressed-read-cache', {})
    cache = stats.pop('compressed-cache', {})
    return {} if reads and not cache else {**stats, **cache}


def read_stats(machine: Machine, node: str) -> Dict[str, Any]:
    '''
    The statistics of the cache for reads of compressed clusters that a qcow2
    node has, {} if it has none
    '''
    stats = _specific_stats(machine, node)
    return dict(stats.get('compressed-read-cache', {}))


def is_dirty(machine: Machine, node: str) -> bool:
    '''
    Whether a seqcache node accepted more than it wrote, if nothing was
    overwritten or written twice
    '''
    stats = cache_stats(machine, node)
    return bool(stats['accepted-bytes'] > stats['issued-bytes'])


def virtual_size(machine: Machine, node: str) -> int:
    '''The length of a node in bytes'''
    found = _of_node(machine, 'query-named-block-nodes', node)
    return int(found['image']['virtual-size'])


# Jobs

def job(machine: Machine) -> Dict[str, Any]:
    '''The only job'''
    jobs: Any = machine.cmd('query-jobs')
    assert len(jobs) == 1
    return dict(jobs[0])


def start_job(machine: Machine, command: str, **kwargs: Any) -> None:
    '''
    Start a job with the name "job", which is not dismissed when it ends; the
    options of the command have underscores for dashes
    '''
    machine.cmd(command, dashes({'job_id': 'job', 'auto_dismiss': False,
                                 **kwargs}))


def start_backup(machine: Machine, **kwargs: Any) -> None:
    '''Start a full backup of the node "source" to the node "target"'''
    start_job(machine, 'blockdev-backup', **{
        'device': 'source', 'target': 'target', 'sync': 'full', **kwargs})


def wait_job(machine: Machine, *status: str) -> Node:
    '''Wait until the only job is in one of these states; returns the job'''
    with iotests.Timeout(60, f'the job does not become {status}'):
        while True:
            found = job(machine)
            if found['status'] in status:
                return found
            if isinstance(machine, QEMUMachine):
                machine.event_wait('JOB_STATUS_CHANGE')
            else:
                machine.get_qmp().pull_event(wait=60.0)


def finish_job(machine: Machine, error: Optional[str] = None) -> None:
    '''
    Wait for the only job, which must end without an error, or with one that
    has @error in its text; dismiss it
    '''
    found = wait_job(machine, 'concluded')
    assert ('error' in found) == (error is not None) and \
        (error or '') in found.get('error', ''), found
    machine.cmd('job-dismiss', {'id': found['id']})


# Disks of guests

class Disk:
    '''A SCSI disk of a guest; it can be unplugged'''

    def __init__(self, vm: iotests.VM, node: str, driver: str = 'scsi-hd',
                 **kwargs: Any) -> None:
        self.vm = vm
        self.name = f'disk-{node}'
        vm.cmd('device_add', {'driver': driver, 'id': self.name,
                              'drive': node, 'bus': 'scsi.0',
                              **dashes(kwargs)})

    def io(self, cmd: str) -> None:
        '''A qemu-io command; what it prints is in the log of the VM'''
        hmp_io(self.vm, self.name, cmd, qdev=True)

    def unplug(self) -> None:
        '''Wait until the guest has let go of the disk'''
        self.vm.cmd('device_del', id=self.name)
        event = self.vm.event_wait('DEVICE_DELETED', timeout=60.0)
        assert event is not None and event['data']['device'] == self.name


# Exports

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
        '''Export a node, and connect a client; @kwargs as in QMP'''
        return Export(self, node, writable, **kwargs)


def remove_export(machine: Machine, name: str) -> None:
    '''End an export, and wait until it has gone'''
    machine.cmd('block-export-del', {'id': name, 'mode': 'hard'})
    if isinstance(machine, QEMUMachine):
        event = machine.event_wait('BLOCK_EXPORT_DELETED', timeout=60.0)
    else:
        event = machine.get_qmp().pull_event(wait=60.0)
    assert event is not None and event['data']['id'] == name


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
        '''What the driver of the node counts'''
        nodes: Any = self.machine.cmd('query-blockstats',
                                      {'query-nodes': True})
        return next(stats.get('driver-specific', {}) for stats in nodes
                    if stats['node-name'] == self.node)

    def has_writer(self) -> bool:
        '''Whether the node has a parent that may write'''
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
        remove_export(self.machine, self.name)

        wait = wait and not self.has_writer()
        while wait:
            stats = self.specific_stats()
            wait = stats.get('unwritten-bytes', 0) > 0 and \
                stats['errors'] == errors


class HeldImage:
    '''
    A qcow2 image that NBD clients of a VM write to: normal data with @normal,
    compressed data with @packed.  A request can be held where blkdebug has an
    event.  @errors are what blkdebug injects.
    '''
    def __init__(self, case: iotests.QMPTestCase, path: str,
                 errors: Sequence[Node] = (), **kwargs: Any) -> None:
        vm = launch_vm(case, scsi={})
        add_node(vm, qcow2_node('disk', {
            'driver': 'blkdebug', 'image': file_node(path),
            **({'inject-error': list(errors)} if errors else {})
        }, **kwargs))
        add_node(vm, {'driver': 'compress', 'node-name': 'packed',
                      'file': 'disk'})
        # A command for a node would wait for all of its requests
        self.disk = Disk(vm, 'disk', share_rw=True)
        self.case = case
        self.vm = vm
        self.sock = Server(case, vm).sock
        for node in ('disk', 'packed'):
            vm.cmd('block-export-add', {
                'type': 'nbd', 'id': node, 'node-name': node, 'name': node,
                'writable': True})
        self.normal = self.client('disk')
        self.packed = self.client('packed')

    def client(self, name: str) -> Client:
        '''Another one; "disk" or "packed"'''
        client = Client(self.sock, name)
        self.case.addCleanup(client.close)
        return client

    def hold(self, event: str) -> None:
        '''The next request that comes to this event'''
        self.disk.io(f'break {event} {event}')

    def release(self, event: str) -> None:
        '''It goes on'''
        self.disk.io(f'resume {event}')

    def wait_held(self, event: str) -> None:
        '''Until there is such a request'''
        self.disk.io(f'wait_break {event}')

    def hold_one_of_two(self, data: bytes) -> int:
        '''
        Begin a compressed write of two clusters from the start of the disk on;
        one of them is held.  Returns where the other one is, when it is there.
        '''
        cluster = len(data) // 2
        offset = 0

        def is_seen() -> bool:
            try:
                return (self.normal.read(offset, cluster) ==
                        data[offset:offset + cluster])
            except OSError:
                # It is being written
                return False

        self.hold('write_compressed')
        self.packed.send(Client.WRITE, 0, len(data), data)
        with iotests.Timeout(20, 'nothing is seen of the write'):
            while not is_seen():
                offset = cluster - offset
        return offset


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
