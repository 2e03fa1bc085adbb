# A target that answers writes when the test allows it, for tests of what waits
# for a target and what does not
#
# SPDX-License-Identifier: GPL-2.0-or-later

from contextlib import ExitStack, suppress
import os
import threading
from typing import Any, Callable, Dict, List, Optional, Tuple

from images import MiB, opts
from machines import Server, job
from nbd_server import (
    FLUSH, WRITE, Closed, Connection, Handler, Request, ScriptedNbd
)
from qemuio import QemuIo
import iotests


class SlowServer(ScriptedNbd):
    '''
    From hold() to release(), writes (and flushes, if the test wants that) are
    neither done nor answered; everything else is.
    '''
    def __init__(self, path: str, size: int) -> None:
        super().__init__(path, size)
        self.block_sizes = (4096, 65536, 32 * MiB)
        self.hold_kinds: Tuple[int, ...] = ()
        self.held: List[Tuple[Connection, Handler, Request]] = []
        self.sending = threading.Lock()

    def note(self, req: Request) -> Handler:
        handler = super().note(req)

        def handle(conn: Connection, req: Request) -> None:
            with self.changed:
                if req.type in self.hold_kinds:
                    self.held.append((conn, handler, req))
                    self.changed.notify_all()
                    return
            with self.sending:
                handler(conn, req)

        return handle

    def hold(self, *kinds: int) -> None:
        '''Do not answer requests of these types; default: writes'''
        with self.changed:
            self.hold_kinds = kinds or (WRITE,)

    def wait_held(self, number: int = 1) -> None:
        '''Until that many requests are held'''
        with self.changed:
            reached = self.changed.wait_for(lambda: len(self.held) >= number,
                                            60)
        assert reached, f'{len(self.held)} instead of {number} are held'

    def hold_larger(self, length: int) -> None:
        '''Until one that is larger is held, let the others go on'''
        large: List[Tuple[Connection, Handler, Request]] = []
        self.hold()
        while not large:
            self.wait_held()
            with self.changed:
                large = [held for held in self.held if held[2].length > length]
                others = [held for held in self.held if held not in large]
                self.held[:] = large
            for conn, handler, req in others:
                with self.sending:
                    handler(conn, req)

    def release_one(self) -> None:
        '''Go on holding all others'''
        with self.changed:
            conn, handler, req = self.held.pop(0)
        with self.sending:
            handler(conn, req)

    def release(self) -> None:
        '''Answer all'''
        with self.changed:
            self.hold_kinds = ()
        while self.held:
            # Some clients have gone
            with suppress(Closed):
                self.release_one()

    def stop(self) -> None:
        self.release()
        super().stop()


class Pulse:
    '''
    A client of an export, which the main loop serves: as long as it does, it
    is not blocked
    '''
    def __init__(self, case: iotests.QMPTestCase,
                 machine: iotests.QemuStorageDaemon) -> None:
        self.nbd = Server(case, machine)
        machine.cmd('blockdev-add', {'driver': 'null-co', 'node-name': 'pulse',
                                     'size': 65536, 'read-zeroes': True})
        machine.cmd('block-export-add', {'type': 'nbd', 'id': 'pulse',
                                         'node-name': 'pulse'})
        self.io = QemuIo(opts(driver='nbd', export='pulse',
                              server__type='unix',
                              server__path=self.nbd.sock), '-r')
        case.addCleanup(self.io.kill)

    def check(self) -> None:
        '''The main loop serves the client'''
        # Not QemuIo.cmd(), whose time limit would replace that of the test
        out = iotests.QemuIoInteractive.cmd(self.io, 'read -P 0 0 4k')
        assert 'read 4096/4096 bytes' in out, out


class Command:
    '''A QMP command whose answer is not waited for yet'''

    def __init__(self, machine: iotests.QemuStorageDaemon, name: str,
                 args: Dict[str, Any]) -> None:
        self.result: Optional[BaseException] = None

        def run() -> None:
            try:
                machine.cmd(name, args)
            except Exception as e:  # pylint: disable=broad-except
                self.result = e

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()

    @property
    def pending(self) -> bool:
        '''Whether there is no answer yet'''
        return self.thread.is_alive()

    def wait(self) -> None:
        '''For the answer; raises an exception for an error'''
        self.thread.join(60)
        assert not self.pending
        if self.result is not None:
            raise self.result


class SlowTargetTestCase(iotests.QMPTestCase):
    '''self.server is the target; subclasses start a job that writes to it'''

    size = 32 * MiB
    machine: iotests.QemuStorageDaemon

    def setUp(self) -> None:
        self.server = SlowServer(os.path.join(iotests.sock_dir, 'nbd.sock'),
                                 self.size)
        self.addCleanup(self.server.stop)
        # A command that is not answered at all is what the tests look for
        timeout = ExitStack()
        timeout.enter_context(iotests.Timeout(120, 'no answer'))
        self.addCleanup(timeout.close)
        self.machine = iotests.QemuStorageDaemon(qmp=True)
        self.addCleanup(self.stop_machine)
        self.pulse = Pulse(self, self.machine)

    def stop_machine(self) -> None:
        '''Let everything end'''
        self.server.release()
        self.machine.stop()

    def cmd(self, command: str, **kwargs: Any) -> Any:
        '''A QMP command, with underscores for dashes'''
        return self.machine.cmd(command, {key.replace('_', '-'): value
                                          for key, value in kwargs.items()})

    def status(self) -> str:
        '''Of the job'''
        return str(job(self.machine)['status'])

    def wait_status(self, *status: str) -> None:
        '''Until the job is in one of these states'''
        while self.status() not in status:
            self.machine.get_qmp().pull_event(wait=60.0)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        '''Ends with an exception when the test has taken too long'''
        while not condition():
            self.pulse.check()

    def finish(self, error: Optional[str]) -> None:
        '''The job ends as it should'''
        self.wait_status('concluded')
        found = job(self.machine).get('error')
        if error is None:
            self.assertIsNone(found)
        else:
            self.assertIn(error, str(found))
        self.cmd('job-dismiss', id='job')

    def assert_idle(self) -> None:
        '''
        The graph can be changed though nothing is written: there is nothing in
        flight
        '''
        self.server.hold(WRITE, FLUSH)
        self.cmd('blockdev-add', driver='null-co', node_name='other')
        self.cmd('blockdev-del', node_name='other')
        self.assertEqual(self.server.held, [])
        self.server.release()
