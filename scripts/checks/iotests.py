# SPDX-License-Identifier: GPL-2.0-or-later
"""Kind iotests: QEMU's runner "check" runs each of them, one at a time."""

import functools
import glob
import hashlib
import os
import re
import shutil
import sys
import threading

import patchset
from . import programs, runner, tests

FOLDER = 'tests/qemu-iotests/tests'

# Stands in for qemu-system in a build without one (--disable-system), and notes
# that a test wants it. Not if only a query comes, as check and iotests.py send
# before each test: for machines, devices, and block drivers, which are those of
# qemu-img.
NO_SYSTEM = """#!/bin/sh
case "$*" in
'-machine help')
    exit 0
    ;;
*'-device help')
    echo 'name "virtio-blk-pci", name "virtio-scsi-pci"'
    exit 0
    ;;
*'-drive format=help'*)
    drivers=$("$QEMU_IMG_PROG" --help |
        sed -e '1,/^Supported image formats:/d' | sed -ne 's/^  //p' |
        tr '\\n' ' ')
    echo "Supported formats: $drivers"
    echo "Supported formats (read-only): $drivers"
    exit 0
    ;;
esac
: > "$NO_SYSTEM_CALLED"
echo 'This build has no qemu-system' >&2
exit 1
"""

# Runs a tool below valgrind when it writes
VALGRIND = f"""#!/bin/sh
case $1 in
check | compare | info) exec '{{0}}' "$@" ;;
esac
exec {' '.join(programs.VALGRIND)} '{{0}}' "$@"
"""


def script(build, name, text):
    """The path of an executable file with that text"""
    path = os.path.join(build, 'check-logs', name)
    if runner.read(path) != text:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        new = f'{path}.{threading.get_ident()}'
        with open(new, 'w', encoding='utf-8') as f:
            f.write(text)
        os.chmod(new, 0o755)
        os.rename(new, path)
    return path


def source_folder(build):
    """Where the source is that build was made from"""
    path = os.path.realpath(os.path.join(build, 'tests/qemu-iotests/check'))
    return os.path.realpath(os.path.join(path, '../../..'))


class Iotest(runner.Test):
    """One iotest in one cache mode, run by QEMU's check in a build folder.

    The mode "default" leaves the mode to the test. env is added to the
    environment; where says in what folder, and so keeps two runs apart that
    differ only in that. digest is a failure's, so that two failures can be
    compared; cases_not_run are those that the test left out.
    """

    def __init__(self, name, mode, build=runner.BUILD, fmt='qcow2', env=None,
                 where=''):
        where = where or mode
        super().__init__(name, f'iotest {name} {where}',
                         f'{build}/check-logs/iotest-{name}-{where}')
        self.mode = mode
        self.build = build
        self.fmt = fmt
        self.env = env or {}
        self.digest = ''
        self.cases_not_run = []
        self.scratch = scratch_folder(build, where)
        if name in tests.HUGE_FILE_IOTESTS and \
                has_o_direct(tests.HUGE_FILE_FOLDER):
            self.scratch = os.path.join(tests.HUGE_FILE_FOLDER,
                                        f'seqcache-{os.getpid()}-{where}')
        variables = ' '.join(f'{k}={v}' for k, v in self.env.items())
        self.replay = (f'cd {build}/tests/qemu-iotests && {variables}'
                       f' ../../pyvenv/bin/python3 ./check -{fmt}'
                       f' {" ".join(self.mode_options())} {name}')

    def mode_options(self):
        return ['-c', self.mode] if self.mode != 'default' else []

    def environment(self, marker):
        """A marker is made by a test that lacks qemu-system."""
        env = {'TEST_DIR': self.scratch, 'LC_ALL': 'C'}
        if not glob.glob(os.path.join(glob.escape(self.build),
                                      'qemu-system-*')):
            env.update(NO_SYSTEM_CALLED=marker, QEMU_PROG=script(
                self.build, 'no-qemu-system', NO_SYSTEM))
        if runner.WITH == 'valgrind':
            for tool in 'qemu-img', 'qemu-io':
                env[tool.upper().replace('-', '_') + '_PROG'] = script(
                    self.build, f'valgrind-{tool}',
                    VALGRIND.format(os.path.join(self.build, tool)))
        return {**env, **self.env}

    def run(self):
        work = os.path.join(self.scratch, f'{self.fmt}-file-{self.name}')
        shutil.rmtree(work, ignore_errors=True)
        marker = f'{self.log}-wants-qemu-system'
        # QEMU exits while threads run, frees nothing of a node that turned out
        # to be corrupt, and its tools leak the migration blockers of formats:
        # leaks are for the unit tests
        status = self.run_command(
            [os.path.join(self.build, 'pyvenv/bin/python3'), './check',
             '--color', 'off', f'-{self.fmt}', *self.mode_options(),
             self.name], leaks=False, env=self.environment(marker),
            cwd=os.path.join(self.build, 'tests', 'qemu-iotests'))
        output = runner.read(self.log)
        self.cases_not_run = [
            line.replace('[case not run]', '').strip() for line in runner.read(
                os.path.join(work, f'{self.name}.casenotrun')).splitlines()
            if line.strip()]
        if self.has_failed():
            pass
        elif os.path.exists(marker):
            os.unlink(marker)
            self.add('skip', 'this build has no qemu-system'
                     ' (--disable-system)')
        elif re.search(rf'^Not run: {self.name}$', output, re.M):
            # With the time that an earlier run took, if it was not skipped
            m = re.search(rf'^{self.name} +not run +\[.*\] +\.\.\. +'
                          r'(?:\(last: .*?\) +)?(.*)$', output, re.M)
            note = m.group(1).strip() if m else ''
            never = 'not suitable for this image format' in note and \
                self.name in our_iotests()
            self.add('fail' if never else 'skip',
                     note.replace(work, 'TEST_DIR'))
        elif status == 0 and re.search(r'^Passed all 1 iotests$', output, re.M):
            self.add('pass', '; '.join(f'not run: {c}'
                                       for c in self.cases_not_run))
        else:
            self.add('fail')
            self.digest = self.make_digest(work)
        if not self.has_failed():
            shutil.rmtree(work, ignore_errors=True)
            if self.scratch.startswith(tests.HUGE_FILE_FOLDER):
                shutil.rmtree(self.scratch, ignore_errors=True)

    def bad_output(self):
        return runner.read(os.path.join(
            self.scratch, f'{self.fmt}-file-{self.name}',
            f'{self.name}.out.bad'))

    def make_digest(self, work):
        """Of what does not differ between two runs that do the same"""
        folders = {work: 'TEST_DIR', self.env.get('SOCK_DIR'): 'SOCK_DIR',
                   self.build: 'BUILD', runner.TOP: 'TOP',
                   source_folder(self.build): 'SOURCE'}
        output = '\n'.join(line.rstrip()
                           for line in self.bad_output().splitlines()
                           if not re.search(r'\d ops/sec', line))
        for folder in sorted(filter(None, folders), key=len, reverse=True):
            output = output.replace(folder, folders[folder])
        output = re.sub(r'\b\d+\.\d+s\b', 'SECONDS', output)
        output = re.sub(r'\b(pid |process:|qemu-)\d+\b', r'\1PID', output)
        return hashlib.sha256(output.encode()).hexdigest()[:16]


@functools.cache
def our_files():
    """Ours in FOLDER, by name"""
    return [os.path.basename(path)
            for path in patchset.our_files(patchset.version_in_use())
            if os.path.dirname(path) == FOLDER]


def our_iotests():
    return [name for name in our_files()
            if os.access(os.path.join(runner.TOP, FOLDER, name), os.X_OK)]


def our_modules():
    return [name for name in our_files() if name.endswith('.py')]


def scratch_folder(build, where):
    return os.path.join(
        os.environ.get('TEST_DIR')
        or os.path.join(build, 'tests/qemu-iotests/scratch'), where)


def has_o_direct(folder):
    path = os.path.join(folder, f'o_direct-{os.getpid()}')
    try:
        os.makedirs(folder, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600))
    except OSError:
        return False
    finally:
        if os.path.exists(path):
            os.unlink(path)
    return True


def require_o_direct():
    folder = scratch_folder(runner.BUILD, 'none')
    if not has_o_direct(folder):
        sys.exit(f'No O_DIRECT in {folder}; TEST_DIR=FOLDER names another'
                 ' place.')


def iotest_names():
    names = our_iotests()
    if runner.ENVIRONMENT.iotests == 'all' and not runner.SUFFIX:
        names = names + tests.UPSTREAM_IOTESTS
    if isinstance(runner.ENVIRONMENT.iotests, list):
        names = runner.ENVIRONMENT.iotests
    return names


def modes_of(name):
    """The cache modes that a test runs in here"""
    if name.startswith(tests.MODE_WRITEBACK_ONLY):
        return ['writeback']
    return ['none'] if name in tests.MODE_NONE_ONLY else tests.CACHE_MODES


def iotest_tests():
    modes = (os.environ.get('MODES') or ' '.join(tests.CACHE_MODES)).split()
    folder = scratch_folder(runner.BUILD, 'none')
    skipped = 'none' in modes and not has_o_direct(folder)
    for name in programs.wanted(iotest_names()):
        for mode in modes_of(name):
            if mode in modes and mode == 'none' and skipped:
                yield runner.Known(
                    f'iotest {name} none', 'skip', f'no O_DIRECT in {folder};'
                    ' TEST_DIR=FOLDER names another place')
            elif mode in modes:
                yield Iotest(name, mode)
