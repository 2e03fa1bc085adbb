# SPDX-License-Identifier: GPL-2.0-or-later
"""
QEMU's own tests in several variants, compared test by test. Used by
check-filtered and check-upstream, which say what the variants are.

A test that does not do the same in all variants is run again several times in
each. One whose result changes in the first variant as well shows nothing and
counts as unstable. Any other difference must have a reason in the file
expected-differences. That a program crashes or hangs is never explained.
"""

import collections
import concurrent.futures
import os
import re
import subprocess
import sys
import tempfile

from check_module import check

FORMATS = ['raw', 'qcow2']
ATTEMPTS = 3
DIFFERENCES = os.path.join(check.TOP, 'scripts', 'expected-differences')

check.IOTEST_TIMEOUT = 600

# Paths of sockets must be short
SOCKETS = tempfile.TemporaryDirectory()

# What a program that crashed leaves in the output of a test
CRASH = re.compile(r'Assertion .* failed|core dumped|Sanitizer:|'
                   r'^\S*: line \d+: +\d+ (Aborted|Segmentation|Killed)|'
                   r'received signal -?(4|6|7|8|11)\b', re.M)

# The programs of a build folder, and what is added to their environment
Variant = collections.namedtuple('Variant', 'name build env')

# What one run did, as text; whether a program crashed or hung
Outcome = collections.namedtuple('Outcome', 'text crash')


class Comparison:
    """One test in several variants; the others must do what the first does.

    group, name and mode together name it. results is {variant: (word, note)},
    where word is equal, skip, unstable, different or crash. logs is
    {variant: path}.
    """

    def __init__(self, group, name, mode, variants):
        self.group = group
        self.name = name
        self.mode = mode
        self.variants = variants
        self.results = {}
        self.logs = {}

    def run_one(self, variant):
        """Run the test; set logs; return an Outcome."""
        raise NotImplementedError

    def run(self):
        first, *others = self.variants
        seen = {variant: {} for variant in self.variants}
        pending = others
        for _ in range(ATTEMPTS):
            for variant in [first, *pending]:
                outcome = self.run_one(variant)
                seen[variant][outcome.text] = outcome.crash
            pending = [v for v in pending if set(seen[v]) != set(seen[first])]
            if not pending or len(seen[first]) > 1:
                break
        for variant in others:
            self.results[variant] = self.judge(seen[first], seen[variant])
        return self

    @staticmethod
    def judge(first, other):
        """Compare two dictionaries {text: crash}; return a word and a note."""
        if any(other.values()) and not any(first.values()):
            word = 'crash'
        elif len(first) > 1:
            word = 'unstable'
        elif set(first) != set(other):
            word = 'different'
        else:
            text = list(first)[0]
            return ('skip', text) if text.startswith('skip') else \
                ('equal', text.split()[0])
        # Digests say nothing to a reader
        notes = [' and '.join(sorted({t.split()[0] for t in texts}))
                 for texts in (first, other)]
        return word, f'{notes[0]}, here {notes[1]}'


class IotestComparison(Comparison):
    """One iotest in one cache mode; the group is the format."""

    def run_one(self, variant):
        where = f'{self.group}-{self.mode}-{variant.name}'
        env = dict(variant.env, SOCK_DIR=os.path.join(SOCKETS.name, where))
        test = check.Iotest(variant.build, self.name, self.mode, self.group,
                            env, where)
        test.run()
        self.logs[variant] = test.log
        output = check.read(test.log) + check.read(os.path.join(
            test.scratch, f'{self.group}-file-{self.name}',
            f'{self.name}.out.bad'))
        if test.timed_out:
            return Outcome('hangs', True)
        if test.result == 'fail':
            return Outcome(f'fail {test.detail}', bool(CRASH.search(output)))
        # What is left out inside of a test counts as well
        return Outcome(' '.join([test.result, test.detail,
                                 *test.cases_not_run]).strip(), False)


def upstream_iotests(build, fmt):
    """The names of all iotests but ours"""
    listed = subprocess.run(
        [os.path.join(build, 'pyvenv/bin/python3'), './check', '-n',
         f'-{fmt}'], cwd=os.path.join(build, 'tests/qemu-iotests'),
        stdout=subprocess.PIPE, check=True, text=True).stdout.split()
    ours = check.our_iotests()
    return [os.path.basename(name) for name in listed
            if os.path.basename(name) not in ours]


def select_iotests(argument, modes, variants):
    """The comparisons that FORMAT or FORMAT:TEST asks for, mode by mode.

    variants(mode) are the variants in that cache mode.
    """
    fmt, _, name = argument.partition(':')
    if fmt not in FORMATS:
        sys.exit(f'{argument}: expected FORMAT or FORMAT:TEST with a format'
                 f' of {", ".join(FORMATS)}')
    names = upstream_iotests(variants(modes[0])[0].build, fmt)
    if name and name not in names:
        sys.exit(f'{argument}: QEMU has no iotest {name}')
    return [IotestComparison(fmt, n, mode, variants(mode))
            for mode in modes for n in ([name] if name else names)]


def explanations(script):
    """{(group, test): reason}, of one of the scripts that compare"""
    reasons = {}
    for line in check.read(DIFFERENCES).splitlines():
        if line and not line.startswith('#'):
            of, group, test, reason = line.split(maxsplit=3)
            if of == script:
                reasons[group, test] = reason
    return reasons


def totals(counts):
    return (f'{counts["equal"]} equal, {counts["explained"]} explained,'
            f' {counts["UNEXPLAINED"]} unexplained,'
            f' {counts["unstable"]} unstable, {counts["skip"]} cannot run')


def compare(comparisons, script):
    """Run them all, $JOBS at a time; return how many are not explained."""
    reasons = explanations(script)
    counts = collections.defaultdict(collections.Counter)
    unexplained = []
    differing = set()

    def count(c, variant):
        word, note = c.results[variant]
        title = f'{c.group} {c.name} {c.mode} {variant.name}'
        if word in ('different', 'crash'):
            differing.add((c.group, c.name))
            reason = reasons.get((c.group, c.name))
            if reason and word == 'different':
                word = 'explained'
                note += f': {reason}'
            else:
                unexplained.append(f'{title}: {word} ({note}; see'
                                   f' {os.path.relpath(c.logs[variant])})')
                word = 'UNEXPLAINED'
        counts[c.group, c.mode, variant.name][word] += 1
        print(f'  {word}  {title}: {note}', flush=True)

    with concurrent.futures.ThreadPoolExecutor(check.JOBS) as pool:
        futures = [pool.submit(c.run) for c in comparisons]
        for future in concurrent.futures.as_completed(futures):
            c = future.result()
            for variant in c.variants[1:]:
                count(c, variant)
    for key in sorted({(c.group, c.name) for c in comparisons} & set(reasons)):
        if key not in differing:
            print('Listed, but equal:', *key)
    if unexplained:
        print('\nUnexplained:', *unexplained, sep='\n  ')
    print()
    for key, counter in counts.items():
        print(*key, end=f': {totals(counter)}\n')
    print(f'\n{totals(sum(counts.values(), collections.Counter()))}',
          flush=True)
    return len(unexplained)


def has_patch(build, variable):
    """Whether the programs in build know an environment variable"""
    with open(os.path.join(build, 'qemu-img'), 'rb') as f:
        return variable.encode() in f.read()
