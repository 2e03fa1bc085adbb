# Test cases of the NBD client: a server, clients, and how they reconnect
#
# SPDX-License-Identifier: GPL-2.0-or-later

import itertools
import json
import os
import subprocess
from typing import Any, Callable, Dict, List, Tuple

from nbd_server import (
    READ, TRIM, WRITE, WRITE_ZEROES, Connection, Request, ScriptedNbd
)
import iotests


class NbdTestCase(iotests.QMPTestCase):
    """What tests of the client have in common: self.server, and clients"""

    size = 1024 * 1024
    extended = False
    filters: List[str] = []

    def setUp(self) -> None:
        self.server = ScriptedNbd(os.path.join(iotests.sock_dir, 'nbd.sock'),
                                  self.size)
        self.server.extended = self.extended
        self.server.filters = self.filters

    def tearDown(self) -> None:
        self.server.stop()

    def run_client(self, *args: str) -> 'subprocess.CompletedProcess[str]':
        """Run a program that uses the server; it must not crash or hang"""
        res = subprocess.run(args, stdin=subprocess.DEVNULL,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             universal_newlines=True, timeout=120, check=False)
        self.assertIn(res.returncode, (0, 1), res.stdout + res.stderr)
        self.server.wait()
        return res

    def qemu_io(self, *commands: str, **kwargs: Any) -> str:
        """What qemu-io says to these commands; @kwargs are node options"""
        args = [arg for command in commands for arg in ('-c', command)]
        res = self.run_client(*iotests.qemu_io_args_no_fmt, *args,
                              self.server.json(**kwargs))
        return res.stdout + res.stderr

    def map(self, **kwargs: Any) -> List[Tuple[int, int, str]]:
        """
        The map of the export as (start, length, kind).  @kwargs are node
        options.
        """
        res = self.run_client(*iotests.qemu_img_args, 'map', '--output=json',
                              self.server.json(**kwargs))
        self.assertEqual(res.returncode, 0, res.stderr)
        return [(e['start'], e['length'], describe(e))
                for e in json.loads(res.stdout)]

    def assert_map_fails(self, error: str, **kwargs: Any) -> None:
        """Nor may it have told anything about any extent"""
        res = self.run_client(*iotests.qemu_img_args, 'map', '--output=json',
                              self.server.json(**kwargs))
        self.assertEqual((res.returncode, res.stdout.strip()), (1, '['))
        self.assertIn(error, res.stderr)


def disconnect(conn: Connection, _req: Request) -> None:
    """A handler that drops the connection instead of answering"""
    conn.disconnect()


class ReconnectTestCase(NbdTestCase):
    """
    What tests have in common in which the client connects again, and finds
    the export changed
    """

    output = ''  # Of the last qemu-io, with warnings

    @staticmethod
    def results(output: str) -> List[str]:
        """
        What qemu-io says, without how fast it was, warnings, and what
        sanitizers say
        """
        return [line for line in output.splitlines()
                if ' ops; ' not in line and ' warning: ' not in line and
                not line.startswith('==')]

    def run_io(self, *commands: str) -> List[str]:
        """What qemu-io prints if it may reconnect"""
        self.output = self.qemu_io(*commands, reconnect_delay=30)
        return self.results(self.output)

    def reconnect(self, change: Callable[[], None], *commands: str
                  ) -> List[str]:
        """
        Make a change and disconnect while the client reads.  Returns what
        qemu-io prints for that read and for the commands that come then.
        """
        self.server.at_connect += [lambda: None, change]
        self.server.scripts[READ].append(disconnect)
        return self.run_io('read 0 512', *commands)

    def check_refused(self, change: Callable[[], None], warning: str,
                      *commands: str) -> None:
        """No request gets through, and a message says why, once"""
        lines = self.reconnect(change, *commands)
        self.assertEqual(len(lines), 1 + len(commands), lines)
        for line in lines:
            self.assertIn('Input/output error', line)
        self.assertEqual(self.output.count(' warning: '), 1)
        self.assertIn(warning, self.output)
        self.assertEqual(self.server.count(WRITE, TRIM, WRITE_ZEROES), 0)
        self.assertEqual(self.server.count(READ), 1)

    def set(self, **kwargs: object) -> Callable[[], None]:
        """Returns a change of attributes of the server"""
        def change() -> None:
            for name, value in kwargs.items():
                setattr(self.server, name, value)

        return change

    def lose(self, flag: int) -> Callable[[], None]:
        """Returns a change: the export has that flag no more"""
        return self.set(flags=self.server.flags & ~flag)

    def change_during(self, kind: int, change: Callable[[], None]) -> None:
        """The next request of this kind has to be sent again"""
        def handle(conn: Connection, _req: Request) -> None:
            change()
            conn.disconnect()

        self.server.scripts[kind].append(handle)

    def lose_during(self, kind: int, flag: int) -> None:
        """As change_during(); the flag is lost"""
        self.change_during(kind, self.lose(flag))

    def kinds(self) -> List[int]:
        """The types of all requests"""
        return [req.type for req in self.server.requests]

    def check_fixed(self, *changes: Callable[[], None]) -> None:
        """When the old export is back, the node works again"""
        self.server.at_connect += [lambda: None, *changes]
        self.server.scripts[READ].append(disconnect)
        tries = itertools.repeat(['read 0 512', 'sleep 100'], 20)
        lines = self.run_io(*itertools.chain.from_iterable(tries))
        self.assertIn('Input/output error', lines[0])
        self.assertEqual(lines[-1], 'read 512/512 bytes at offset 0')
        self.assertEqual(self.server.connections, 3)


def describe(extent: Dict[str, Any]) -> str:
    """In words, what qemu-img map says about an extent"""
    return ('data' if extent['data'] else 'hole') + \
        (' zero' if extent['zero'] else '')
