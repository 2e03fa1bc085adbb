# SPDX-License-Identifier: GPL-2.0-or-later
"""Running commands and tests, and counting results: what all kinds share."""

import concurrent.futures
import glob
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading

import patchset
from . import tests

TOP = patchset.TOP
# What the names of folders end in, for other versions than the first
SUFFIX = patchset.suffix()
# Of tests.ENVIRONMENTS
WITH = os.environ.get('WITH') or ''
if WITH not in tests.ENVIRONMENTS:
    sys.exit(f'WITH={WITH}: expected one of: {" ".join(tests.ENVIRONMENTS)}')
ENVIRONMENT = tests.ENVIRONMENTS[WITH]
JOBS = int(os.environ.get('JOBS') or os.cpu_count() or 1)
TIMEOUT = int(os.environ.get('TEST_TIMEOUT') or
              tests.TIMEOUT * ENVIRONMENT.slower)
# The names of the tests that are to run; without any: all
TESTS = (os.environ.get('TESTS') or '').split()
PROGRESS_SECONDS = 30
# Tests need mke2fs and others from there, and an ordinary user's PATH may not
# have it
os.environ['PATH'] += ':/usr/sbin:/sbin'


BUILD = os.path.join(TOP, os.environ.get('BUILD') or
                     patchset.build_folder(WITH))
UTIL = os.path.join(TOP, 'build-util')


def read(path):
    """The text of a file; nothing if there is no such file"""
    try:
        with open(path, encoding='utf-8', errors='replace') as f:
            return f.read()
    except FileNotFoundError:
        return ''


def run(command, log, timeout=TIMEOUT, **kwargs):
    """Run a command with its output in the file log.

    Returns its exit status, or None if it had to be killed after timeout
    seconds. A file and not a pipe, because a daemon that a test leaves behind
    would keep a pipe open.
    """
    os.makedirs(os.path.dirname(log), exist_ok=True)
    with open(log, 'w', encoding='utf-8') as out, \
         subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out,
                          stderr=subprocess.STDOUT, start_new_session=True,
                          **kwargs) as process:
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass


def report_variables(prefix, leaks):
    """Let sanitizers and valgrind write to files whose names begin with prefix

    What they print would else be between what tests expect. The first report of
    ASan and UBSan ends the program, ThreadSanitizer goes on. ASAN_OPTIONS,
    UBSAN_OPTIONS and TSAN_OPTIONS in the environment take precedence.
    """
    options = {
        'ASAN_OPTIONS': ['halt_on_error=1', 'abort_on_error=1',
                         f'detect_leaks={int(leaks)}'],
        'UBSAN_OPTIONS': ['halt_on_error=1', 'abort_on_error=1',
                          'print_stacktrace=1'],
        # qemu-nbd --fork starts threads after it
        'TSAN_OPTIONS': ['exitcode=0', 'die_after_fork=0', 'suppressions=' +
                         os.path.join(TOP, 'scripts', 'tsan-suppressions')],
    }
    # It turns addresses into the names that are suppressed
    if symbolizer := shutil.which('llvm-symbolizer-19'):
        options['TSAN_OPTIONS'].append(f'external_symbolizer_path={symbolizer}')
    for name, words in options.items():
        words += [f'log_path={prefix}', os.environ.get(name) or '']
    # Memory that glib hands from thread to thread would look like a race
    return {'G_SLICE': 'always-malloc', 'VALGRIND_LOG': prefix,
            **{name: ':'.join(filter(None, words))
               for name, words in options.items()}}


class Test:
    """One test.

    run() adds results: (title, result, note), where result is pass, fail or
    skip. If one is fail, log names a file whose end is shown, details are
    shown in whole, and replay is what to type to have the same again.
    """

    def __init__(self, name, title, log):
        self.name = name
        self.title = title
        self.log = log
        self.results = []
        self.details = ''
        self.replay = ''

    def add(self, result, note='', title=None):
        self.results.append((title or self.title, result, note))

    def has_failed(self):
        return any(result == 'fail' for _, result, _ in self.results)

    def run(self):
        raise NotImplementedError

    def run_command(self, command, leaks=True, env=None, **kwargs):
        """run() it; a report of a sanitizer is a failure. Returns the status."""
        prefix = f'{self.log}-report'
        for path in glob.glob(glob.escape(prefix) + '.*'):
            os.unlink(path)
        status = run(command, self.log, env={
            **os.environ, **report_variables(prefix, leaks), **(env or {})},
                     **kwargs)
        for path in sorted(glob.glob(glob.escape(prefix) + '.*')):
            text = read(path)
            # Not mere warnings
            if re.search('ERROR: |: runtime error: |WARNING: ThreadSanitizer: '
                         '|^==[0-9]+== ', text, re.M):
                self.details += text
            else:
                os.unlink(path)
        if self.details:
            self.add('fail', 'sanitizer report')
        elif status is None:
            self.add('fail', f'killed after {TIMEOUT} s')
        return status


class Known(Test):
    """A test whose result is known without running anything"""

    def __init__(self, title, result, note='', log=''):
        super().__init__(title, title, log)
        self.add(result, note)

    def run(self):
        pass


class Tally:
    """Counts results and remembers the names of what did not pass."""

    def __init__(self):
        self.passed = 0
        self.failed = []
        self.skipped = []

    def count(self, test, quiet=False):
        """Count and print what a test found; quiet: what passed is not told"""
        passed = [r for r in test.results if r[1] == 'pass']
        self.passed += len(passed)
        if passed == test.results and not quiet:
            note = f' ({len(passed)} cases)' if len(passed) != 1 else \
                passed[0][2] and f': {passed[0][2]}'
            print(f'  pass  {test.title}{note}', flush=True)
        for title, result, note in test.results:
            if result != 'pass':
                text = f'{title}: {note}' if note else title
                (self.failed if result == 'fail' else self.skipped).append(text)
                print(f'  {result}  {text}', flush=True)
        if test.has_failed():
            if test.log:
                print(f'The end of {os.path.relpath(test.log)}:',
                      *read(test.log).splitlines()[-60:], sep='\n')
            print(test.details or '', end='')
            if test.replay:
                print(f'To have it again: {test.replay}')
            print(end='', flush=True)

    def add_earlier(self, path):
        """Add what is noted in a file, and note the sum there."""
        earlier = json.loads(read(path) or '{}')
        self.passed += earlier.get('passed', 0)
        self.failed[:0] = earlier.get('failed', [])
        self.skipped[:0] = earlier.get('skipped', [])
        with open(path, 'w', encoding='utf-8') as f:
            json.dump(vars(self), f)

    def summary(self):
        for title, names in ('Skipped', self.skipped), ('Failed', self.failed):
            if names:
                print(f'\n{title}:', *names, sep='\n  ')
        line = f'{self.passed} passed, {len(self.failed)} failed'
        if self.skipped:
            line += f', {len(self.skipped)} skipped'
        print(f'\n{line}', flush=True)


# A test that takes long, and has something to clean up, looks at this
ENDING = threading.Event()


def run_tests(some, tally, quiet=False):
    """Run tests, JOBS at a time, and count them; returns those that ran."""
    def run_one(test):
        test.run()
        return test

    pending = iter(some)
    running = set()
    finished = []
    with concurrent.futures.ThreadPoolExecutor(JOBS) as pool:
        try:
            while True:
                while len(running) < JOBS and (test := next(pending, None)):
                    running.add(pool.submit(run_one, test))
                if not running:
                    return finished
                done, running = concurrent.futures.wait(
                    running, PROGRESS_SECONDS,
                    concurrent.futures.FIRST_COMPLETED)
                for future in done:
                    finished.append(future.result())
                    tally.count(finished[-1], quiet)
                if not done and quiet:
                    print(f'  {len(finished)} runs', flush=True)
        except BaseException:
            # Those that run end as soon as they can
            ENDING.set()
            raise
