# SPDX-License-Identifier: GPL-2.0-or-later
"""Run the tests and count them.

The last line of the output is "N passed, N failed", followed by
", N skipped" if there are any. The exit status is 1 if something failed.

The environment, besides what "make help" names: WITH is the environment of the
tests, one of "scripts/check --list environments"; TESTS are the names of those
that are to run, MODES the cache modes of the iotests. If CHECK_TALLY names a
file, what is counted is added to what earlier runs have noted there: the last
line is the sum of all of them.
"""

import argparse
import os
import signal
import sys

from . import compare, coverage, iotests, libvirt, lint, long, programs, repository, \
    runner, storage, tests

RUN = {
    'scripts': repository.check_tests,
    'standalone': programs.standalone_tests,
    'unit': programs.unit_tests,
    'iotests': iotests.iotest_tests,
    'lint': lint.lint_tests,
    'storage': lambda: [*storage.storage_tests(), *libvirt.libvirt_tests()],
    'coverage': coverage.coverage_tests,
}


def names(kind):
    """[(name, remark)] of the tests of a kind"""
    if kind == 'iotests':
        return [(n, ' '.join(iotests.modes_of(n)))
                for n in iotests.iotest_names()]
    if kind == 'environments':
        return [(name or 'default', env.what)
                for name, env in tests.ENVIRONMENTS.items()]
    return {
        'scripts': [(n, c.function.__doc__)
                    for n, c in repository.CHECKS.items()],
        'standalone': [(n, '') for n in tests.STANDALONE],
        'unit': [(n, '') for n in programs.unit_names()],
        'coverage': [(n, f'{p} %') for n, p in tests.COVERAGE.items()],
        'lint': [(n, '') for n in tests.LINTERS],
        'storage': [(n, 'quick' if store.quick else '')
                    for n, store in storage.STORES.items()] +
        [('libvirt', '')],
        'random': [(n, part.what) for n, part in tests.RANDOM.items()],
    }.get(kind, [])


def list_tests(kinds):
    """Print kind, name, and what is to be said."""
    for kind in kinds or [*tests.KINDS, 'environments']:
        if not kinds:
            print(f'\n{kind}: {tests.KINDS.get(kind, "what WITH names")}')
        for name, remark in names(kind):
            print(f'{kind}  {name}  {remark}'.rstrip())


def run_kind(kind, tally):
    print(f'{kind}: {tests.KINDS[kind]}', flush=True)
    if kind == 'random':
        long.run_parts(tally)
    elif kind in tests.DIFFERENCES:
        compare.run_comparisons(kind, tally)
    else:
        runner.run_tests(RUN[kind](), tally)
    if kind == 'storage':
        storage.print_table()


def main():
    parser = argparse.ArgumentParser(
        prog='scripts/check', description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--list', action='store_true',
                        help='print the tests, and run nothing')
    parser.add_argument(
        'kinds', nargs='*', metavar='KIND', help='; '.join(
            f'{kind}: {what}' for kind, what in tests.KINDS.items()))
    args = parser.parse_args()
    known = [*tests.KINDS, *(['environments'] if args.list else [])]
    if not (args.kinds or args.list) or set(args.kinds) - set(known):
        parser.error(f'expected some of: {" ".join(known)}')
    if args.list:
        # For "| head"
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        list_tests(args.kinds)
        return
    if 'coverage' in args.kinds[1:]:
        coverage.forget()
    tally = runner.Tally()
    for kind in args.kinds:
        run_kind(kind, tally)
    failed = bool(tally.failed)
    if os.environ.get('CHECK_TALLY'):
        tally.add_earlier(os.environ['CHECK_TALLY'])
    tally.summary()
    sys.exit(1 if failed else 0)


if __name__ == '__main__':
    main()
