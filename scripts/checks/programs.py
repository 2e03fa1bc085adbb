# SPDX-License-Identifier: GPL-2.0-or-later
"""Kinds standalone and unit: programs that are a test."""

import functools
import json
import os
import re
import subprocess
import sys

import patchset
from . import runner, tests

VALGRIND = ['valgrind', '-q', '--error-exitcode=99',
            '--log-file=%q{VALGRIND_LOG}.%p']


def tap_results(output):
    """The (name, result, reason) of each case that TAP output tells of"""
    for line in output.splitlines():
        m = re.match(r'\s*(not )?ok \d+\s*(?:- )?([^#]*)(?:# *(.*))?', line)
        if m:
            failed, name, directive = m.groups()
            if (directive or '').lower().startswith('skip'):
                yield name.strip(), 'skip', directive[4:].strip()
            else:
                yield name.strip(), 'fail' if failed else 'pass', ''


class Program(runner.Test):
    """A program. Each case that it reports counts; without TAP it is one."""

    def __init__(self, name, command, log, env=None, cwd=None, title=None):
        super().__init__(name, title or name, log)
        self.command = command
        self.env = env or {}
        self.cwd = cwd
        self.replay = ' '.join([*(f'{k}={v}' for k, v in self.env.items()),
                                *command])

    def run(self):
        status = self.run_command(self.command, env=self.env, cwd=self.cwd)
        output = runner.read(self.log)
        cases = list(tap_results(output))
        for case, result, reason in cases:
            self.add(result, reason, f'{self.name} {case}')
        plan = re.search(r'^1\.\.(\d+)', output, re.M)
        if self.has_failed():
            pass
        elif status == 77 and not cases:
            self.add('skip')
        elif status != 0:
            self.add('fail', f'exit status {status}')
        elif plan and len(cases) < int(plan[1]):
            self.add('fail', f'{len(cases)} of {plan[1]} cases')
        elif not cases:
            self.add('pass')


def wanted(names):
    """Those of the names that TESTS does not leave out"""
    return [n for n in names if not runner.TESTS or n in runner.TESTS]


def meson_tests(build):
    """{name: test} as meson describes them"""
    meson = os.path.join(build, 'pyvenv/bin/meson')
    if not os.path.exists(meson):
        meson = 'meson'
    found = json.loads(subprocess.run(
        [meson, 'introspect', '--tests', build], stdout=subprocess.PIPE,
        check=True, text=True).stdout)
    return {t['name'].split(' / ')[-1].split(':')[-1]: t for t in found}


def meson_programs(build, names, known=None, env=None):
    """A test for each name"""
    known = known or meson_tests(build)
    valgrind = VALGRIND if runner.WITH == 'valgrind' else []
    for name in names:
        test = known.get(name)
        if not test or not os.path.exists(test['cmd'][0]):
            yield runner.Known(name, 'fail',
                               f'it is not in {os.path.relpath(build)}')
            continue
        yield Program(name, [*valgrind, *test['cmd']],
                      f'{build}/check-logs/unit-{name}',
                      {**test['env'], 'MALLOC_PERTURB_': '165', **(env or {})},
                      test.get('workdir') or build)


@functools.cache
def setup_standalone():
    """Build build-util; returns what is wrong, or None."""
    # clang, because gcc has no libFuzzer
    env = {**os.environ, 'CC': os.environ.get('CC') or 'clang'}
    log = os.path.join(runner.UTIL, 'check-logs', 'build')
    for command in (['meson', 'setup', runner.UTIL, runner.TOP],
                    ['ninja', '-C', runner.UTIL]):
        if command[0] == 'meson' and os.path.exists(
                os.path.join(runner.UTIL, 'build.ninja')):
            continue
        if runner.run(command, log, env=env) != 0:
            return runner.Known(' '.join(command), 'fail', log=log)
    return None


def standalone_tests():
    names = wanted(tests.STANDALONE)
    if names and (problem := setup_standalone()):
        return [problem]
    return meson_programs(runner.UTIL, names) if names else []


@functools.cache
def our_unit_tests():
    return [os.path.basename(path)[:-2]
            for path in patchset.our_files(patchset.version_in_use())
            if re.fullmatch('tests/unit/test-.*[.]c', path)]


def unit_names():
    return our_unit_tests() + tests.UPSTREAM_UNIT_TESTS


def unit_tests():
    names = wanted(unit_names())
    more = runner.ENVIRONMENT
    for test in meson_programs(runner.BUILD, names, env=more.variables) \
            if names else []:
        if isinstance(test, Program):
            test.command += more.arguments
        yield test


def ninja(folder, targets):
    """Let ninja build these; what is wrong ends the script."""
    log = os.path.join(folder, 'check-logs', 'build')
    print(f'Building in {os.path.relpath(folder)}', flush=True)
    if runner.run(['ninja', '-C', folder, '-j', str(runner.JOBS), *targets],
                  log, timeout=None):
        sys.exit('\n'.join(runner.read(log).splitlines()[-60:]))
