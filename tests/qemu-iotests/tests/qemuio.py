# qemu-io, as a process that gets one command after the other
#
# SPDX-License-Identifier: GPL-2.0-or-later

import os
import re
from typing import List, Sequence, Tuple, Union

from images import KiB, MiB, Node, as_json
import iotests
from iotests import qemu_io


def io_output(image: Union[str, Node], *cmds: str,
              args: Sequence[str] = ()) -> str:
    '''
    What qemu-io prints for commands, which may fail, on a qcow2 image or on a
    node with these options; @args are its own options
    '''
    if not isinstance(image, str):
        args = [*args, '-f', image['driver']]
        image = as_json(image)
    out: str = qemu_io(*args, *(arg for cmd in cmds for arg in ('-c', cmd)),
                       image, check=False).stdout
    return out


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
        '''Run a command; returns what it prints'''
        with iotests.Timeout(60, f'no answer to {cmd}'):
            out: str = super().cmd(cmd)
        return out

    def kill(self) -> None:
        '''End it as a crash would; it may have ended'''
        self._p.kill()
        self._p.communicate()

    def send(self, cmds: List[str]) -> None:
        '''Send commands without waiting; only kill() is allowed afterwards'''
        self._p.stdin.write(''.join(cmd + '\n' for cmd in cmds))
        self._p.stdin.flush()

    def read(self, offset: int, size: int) -> bytes:
        '''Read these bytes; nothing if that fails'''
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
        '''Run a command that must print @message'''
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
        '''Compare; returns whether the read succeeded'''
        data = self.io.read(offset, length)
        if not data:
            return False
        unknown = self.unknown[offset:offset + length]
        expected = bytes(b if u else a for a, b, u in zip(
            self.data[offset:offset + length], data, unknown))
        self.case.assertTrue(data == expected, 'wrong data')
        return True

    def step(self, number: int) -> bool:
        '''Run one command; returns whether it succeeded'''
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
