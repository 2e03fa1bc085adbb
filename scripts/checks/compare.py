# SPDX-License-Identifier: GPL-2.0-or-later
"""
Kinds filtered and upstream: QEMU's own tests in several variants, compared test
by test.

A test that does not do the same in all variants runs again several times in
each. One whose result changes in the first variant as well shows nothing: it is
unstable, which counts as skipped. Any other difference must have a reason in
tests.DIFFERENCES. That a program crashes or hangs is never explained.

filtered    the build of the environment test-patches, without and with
            QEMU_TEST_FILTER, which puts a filter above each protocol node that
            gets a parent. $FILTER is its value, for instance
            "seqcache,cluster-size=512,cache-size=1024"
upstream    the unpatched source (stock), our default build (ours), and that of
            test-patches with QEMU_TEST_COMPRESSED_CACHE, which gives each qcow2
            node a cache for compressed clusters (cached): of 16 MiB, or with
            O_DIRECT, where that is the default, as small as it can be
"""

import collections
import os
import re
import subprocess
import sys
import tempfile

import patchset
from . import iotests, programs, runner, tests

ATTEMPTS = 3
# Paths of sockets must be short
SOCKETS = tempfile.TemporaryDirectory()
FORMATS = ['raw', 'qcow2']
STOCK = patchset.build_folder('stock')
PATCHED = patchset.build_folder('test-patches')
FILTER = 'QEMU_TEST_FILTER'
CACHE = 'QEMU_TEST_COMPRESSED_CACHE'

# What a program that crashed leaves in the output of a test
CRASH = re.compile(r'Assertion .* failed|core dumped|Sanitizer:|'
                   r'^\S*: line \d+: +\d+ (Aborted|Segmentation|Killed)|'
                   r'received signal -?(4|6|7|8|11)\b', re.M)

# The programs of a build folder, and what is added to their environment
Variant = collections.namedtuple('Variant', 'name build env')

# What one run did, as text; whether a program crashed or hung
Outcome = collections.namedtuple('Outcome', 'text crash')


def variants(kind, mode):
    if kind == 'filtered':
        return [Variant('plain', PATCHED, {}),
                Variant('filtered', PATCHED,
                        {FILTER: os.environ.get('FILTER') or 'seqcache'})]
    return [Variant('stock', STOCK, {}), Variant('ours', runner.BUILD, {}),
            Variant('cached', PATCHED,
                    {CACHE: '1' if mode == 'none' else '16M'})]


class Comparison(runner.Test):
    """One test in several variants; the others must do what the first does.

    group is a format or "unit". words has what counts in the totals, as
    (variant, word), where word is equal, explained, unexplained, unstable or
    cannot run.
    """

    def __init__(self, kind, group, name, mode):
        super().__init__(name, f'{group} {name} {mode}', '')
        self.group = group
        self.mode = mode
        self.variants = variants(kind, mode)
        self.reason = tests.DIFFERENCES[kind].get((group, name))
        self.words = []

    def run_one(self, variant):
        """Run the test; set log; return an Outcome."""
        raise NotImplementedError

    def run(self):
        first, *others = self.variants
        seen = {variant.name: {} for variant in self.variants}
        logs = {}
        pending = others
        for _ in range(ATTEMPTS):
            for variant in [first, *pending]:
                outcome = self.run_one(variant)
                seen[variant.name][outcome.text] = outcome.crash
                logs[variant.name] = self.log
            pending = [v for v in pending
                       if set(seen[v.name]) != set(seen[first.name])]
            if not pending or len(seen[first.name]) > 1:
                break
        for variant in others:
            word, note = self.judge(seen[first.name], seen[variant.name])
            self.words.append((variant.name, word))
            if word == 'unexplained':
                self.log = logs[variant.name]
            self.add({'equal': 'pass', 'explained': 'pass',
                      'unexplained': 'fail'}.get(word, 'skip'),
                     f'{word}, {note}', f'{self.title} {variant.name}')

    def judge(self, first, other):
        """Compare two dictionaries {text: crash}; return a word and a note."""
        # Digests say nothing to a reader
        notes = [' and '.join(sorted({t.split()[0] for t in texts}))
                 for texts in (first, other)]
        note = f'{notes[0]}, here {notes[1]}'
        if any(other.values()) and not any(first.values()):
            return 'unexplained', note
        if len(first) > 1:
            return 'unstable', note
        if set(first) != set(other):
            return ('explained', f'{note}: {self.reason}') if self.reason \
                else ('unexplained', note)
        text = list(first)[0]
        return ('cannot run', text) if text.startswith('skip') else \
            ('equal', notes[0])


class IotestComparison(Comparison):
    """One iotest in one cache mode; the group is the format."""

    def run_one(self, variant):
        where = f'{self.group}-{self.mode}-{variant.name}'
        test = iotests.Iotest(
            self.name, self.mode, variant.build, self.group,
            {**variant.env, 'SOCK_DIR': os.path.join(SOCKETS.name, where)},
            where)
        test.run()
        self.log = test.log
        _, result, note = test.results[0]
        if test.has_failed() and not test.digest:
            return Outcome(f'hangs {note}', True)
        if test.has_failed():
            return Outcome(f'fail {test.digest}', bool(CRASH.search(
                runner.read(test.log) + test.bad_output())))
        # What is left out inside of a test counts as well
        return Outcome(f'{result} {note}', False)


class UnitComparison(Comparison):
    """One of QEMU's unit tests"""

    def __init__(self, kind, name, known):
        super().__init__(kind, 'unit', name, '-')
        self.known = known

    def run_one(self, variant):
        [test] = programs.meson_programs(variant.build, [self.name],
                                         self.known[variant.name], variant.env)
        test.run()
        self.log = test.log
        words = sorted({result for _, result, _ in test.results},
                       key='fail pass skip'.split().index)
        notes = [f'{name} {result} {note};'
                 for name, result, note in test.results]
        text = ' '.join([words[0], *notes])
        return Outcome(text, 'killed after' in text or
                       'exit status -' in text or bool(test.details))


def upstream_iotests(build, fmt):
    """The names of all iotests but ours"""
    listed = subprocess.run(
        [os.path.join(build, 'pyvenv/bin/python3'), './check', '-n',
         f'-{fmt}'], cwd=os.path.join(build, 'tests/qemu-iotests'),
        stdout=subprocess.PIPE, check=True, text=True).stdout.split()
    ours = iotests.our_iotests()
    return [os.path.basename(name) for name in listed
            if os.path.basename(name) not in ours]


def select_iotests(kind, fmt, name, modes):
    names = upstream_iotests(variants(kind, modes[0])[0].build, fmt)
    if name and name not in names:
        sys.exit(f'{fmt}:{name}: QEMU has no iotest {name}')
    return [IotestComparison(kind, fmt, n, mode)
            for mode in modes for n in ([name] if name else names)]


def suite(known, name):
    return {n: t for n, t in known.items()
            if name in [s.split(':')[-1] for s in t['suite']]}


def select_unit(kind, name):
    """The unit tests, as make check-unit runs them"""
    known = {v.name: programs.meson_tests(v.build) for v in variants(kind, '')}
    found = suite(known['stock'], 'unit')
    if name and name not in found:
        sys.exit(f'unit:{name}: QEMU has no unit test {name}')
    names = [name] if name else list(found)
    # Scripts need nothing built
    targets = [os.path.relpath(found[n]['cmd'][0], STOCK) for n in names]
    for variant in variants(kind, ''):
        programs.ninja(variant.build, [t for t in targets
                                       if t.startswith('tests/unit/')])
    return [UnitComparison(kind, n, known) for n in names]


def select_block(kind):
    """What make check-block does beyond writeback: the iotests of qcow2 that
    choose another cache mode if none is given"""
    folder = os.path.join(iotests.source_folder(STOCK), 'tests/qemu-iotests')
    for test in suite(programs.meson_tests(STOCK), 'block').values():
        path = test['cmd'][test['cmd'].index('-qcow2') + 1]
        if re.search(r'^_default_cache_mode (?!writeback)',
                     runner.read(os.path.join(folder, path)), re.M):
            yield IotestComparison(kind, 'qcow2', os.path.basename(path),
                                   'default')


def comparisons(kind):
    """Those that TESTS names: FORMAT, FORMAT:TEST, unit, unit:TEST, block"""
    default = ['writeback'] if kind == 'filtered' else ['none', 'writeback']
    modes = (os.environ.get('MODES') or '').split() or default
    if 'none' in modes:
        iotests.require_o_direct()
    parts = FORMATS if kind == 'filtered' else [*FORMATS, 'block', 'unit']
    for argument in runner.TESTS or parts:
        part, _, name = argument.partition(':')
        if part not in parts:
            sys.exit(f'{argument}: expected one of {", ".join(parts)}, or'
                     ' PART:TEST')
        if part == 'unit':
            yield from select_unit(kind, name)
        elif part == 'block':
            yield from select_block(kind)
        else:
            yield from select_iotests(kind, part, name, modes)


def require_programs(kind):
    """Without the patch for tests the variants would be the same, and no user
    may have it."""
    for variant in variants(kind, ''):
        with open(os.path.join(variant.build, 'qemu-img'), 'rb') as f:
            has_patch = (FILTER if kind == 'filtered' else
                         CACHE).encode() in f.read()
        if has_patch != (variant.build == PATCHED):
            sys.exit(f'The programs in {variant.build} do not belong there: the'
                     f' patch for tests is for {PATCHED} only.')


def run_comparisons(kind, tally):
    require_programs(kind)
    finished = runner.run_tests(list(comparisons(kind)), tally)
    totals = collections.defaultdict(collections.Counter)
    for test in finished:
        for variant, word in test.words:
            totals[f'{test.group} {test.mode} {variant}'][word] += 1
            totals['in all'][word] += 1
    differing = {(t.group, t.name) for t in finished
                 if any('plained' in word for _, word in t.words)}
    for key in {(t.group, t.name) for t in finished} - differing:
        if key in tests.DIFFERENCES[kind]:
            print('In tests.DIFFERENCES, but equal:', *key)
    print()
    for name, counts in totals.items():
        print(f'{name}:', ', '.join(
            f'{counts[word]} {word}' for word in
            ('equal', 'explained', 'unexplained', 'unstable', 'cannot run')))
