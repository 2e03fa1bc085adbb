# SPDX-License-Identifier: GPL-2.0-or-later
"""
Kind random: the random tests for long. All that is random follows from SEED;
only what runs in several threads may need more than one attempt to fail again.
"""

import collections
import itertools
import json
import os
import random
import re
import subprocess
import time

from . import iotests, programs, runner, tests

LOGS = os.path.join(runner.BUILD, 'check-long-logs')
SECONDS = float(os.environ.get('LONG_SECONDS') or 60)
FIRST_SEED = int(os.environ.get('SEED') or random.getrandbits(31))
PARTS = (os.environ.get('PARTS') or ' '.join(tests.RANDOM)).split()


def log_of(title):
    return os.path.join(LOGS, re.sub(r'\W+', '-', title))


def program_path(part):
    if part.program.startswith('build-util/'):
        return os.path.join(runner.TOP, part.program)
    return os.path.join(runner.BUILD, 'tests', 'unit', part.program)


def cases_of(part):
    """The names of its program's cases that are meant"""
    listed = subprocess.run([program_path(part), '-l'], check=True, text=True,
                            stdout=subprocess.PIPE).stdout
    return [case for case in re.findall('^/.*', listed, re.M)
            if part.cases in case]


def fuzz_arguments(seed):
    """libFuzzer's; an input that fails is left in the folder of the logs"""
    corpus = os.path.join(runner.UTIL, 'fuzz-corpus')
    os.makedirs(corpus, exist_ok=True)
    os.makedirs(LOGS, exist_ok=True)
    return [f'-seed={seed or 1}', '-max_len=4096',
            f'-max_total_time={max(1, min(int(SECONDS), 300))}',
            f'-artifact_prefix={LOGS}/fuzz-', corpus]


def program_runs(name, part, seed, cases):
    """A run for each of the cases"""
    env = {}
    if part.operations:
        variable, number = part.operations
        env[variable] = str(number * len(cases))
    for case in cases:
        title = f'{name} {os.path.basename(case)} {seed}'
        yield programs.Program(
            name, [program_path(part), '-p', case, *part.arguments,
                   '--seed=R02S' + 4 * f'{seed:08x}'], log_of(title), env,
            title=title)
    if not part.cases:
        title = f'{name} {seed}'
        yield programs.Program(
            name, [program_path(part), *fuzz_arguments(seed)], log_of(title),
            title=title)


def figures_file(name):
    """Iotests add figures to it, one JSON object a line."""
    return os.path.join(LOGS, f'{name}.figures')


def iotest_runs(name, part, seed):
    """A run of each iotest in each cache mode, each with a seed of its own"""
    for number, (mode, (iotest, scale)) in enumerate(
            itertools.product(tests.CACHE_MODES, part.iotests)):
        # Some use the seeds that follow
        first = (seed * 1000 + number * 100) % (1 << 31)
        yield iotests.Iotest(
            iotest, mode, where=f'{name}-{first}-{mode}',
            env={'TEST_FIGURES': figures_file(name), 'TEST_SEED': str(first),
                 'TEST_SCALE': str(scale)})


def runs(name, part):
    """Round after round, until the time is over"""
    end = time.monotonic() + SECONDS
    cases = cases_of(part) if part.cases else []
    for number in itertools.count():
        seed = (FIRST_SEED + number) % (1 << 32)
        for test in itertools.chain(
                iotest_runs(name, part, seed),
                program_runs(name, part, seed, cases) if part.program else ()):
            if number >= part.rounds and time.monotonic() >= end:
                return
            yield test


def sum_of_figures(name):
    """Sums, for all test cases together"""
    sums = collections.Counter()
    for line in runner.read(figures_file(name)).splitlines():
        sums.update({key: value for key, value in json.loads(line).items()
                     if isinstance(value, int)})
    return [f'    {value} {key}' for key, value in sorted(sums.items())]


def run_part(name, tally):
    part = tests.RANDOM[name]
    print(f'{name}: {part.what}', flush=True)
    if os.path.exists(figures_file(name)):
        os.unlink(figures_file(name))
    if part.program.startswith('build-util/'):
        problem = programs.setup_standalone()
        if not problem and name == 'fuzz' and \
                b'max_total_time' not in program_bytes(part):
            problem = runner.Known('fuzz', 'skip', 'built without libFuzzer')
        if problem:
            tally.count(problem)
            return
    start = time.monotonic()
    done = runner.run_tests(runs(name, part), tally, quiet=True)
    print(f'  {len(done)} runs in {time.monotonic() - start:.0f} s',
          *sum_of_figures(name), sep='\n', flush=True)


def program_bytes(part):
    with open(program_path(part), 'rb') as f:
        return f.read()


def run_parts(tally):
    iotests.require_o_direct()
    print(f'SEED={FIRST_SEED} LONG_SECONDS={SECONDS:g}', flush=True)
    for name in PARTS:
        run_part(name, tally)
