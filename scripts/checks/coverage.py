# SPDX-License-Identifier: GPL-2.0-or-later
"""Kind coverage: which lines of ours the tests have reached"""

import glob
import json
import os
import subprocess
import sys

from . import runner, tests


def objects(path):
    """Where the compiler has put the counters of a file"""
    library = 'libqemuutil.a.p' if path.startswith('util/') else 'libblock.a.p'
    return os.path.join(runner.BUILD, library, path.replace('/', '_'))


def forget():
    """Let all counters begin anew."""
    for path in glob.glob(os.path.join(glob.escape(runner.BUILD), '**',
                                       '*.gcda'), recursive=True):
        os.unlink(path)


class Coverage(runner.Test):
    """How much of one file was reached; each line that was not is printed."""

    def __init__(self, path, minimum):
        super().__init__(path, f'coverage of {path}', '')
        self.minimum = minimum

    def lines(self):
        """{line: how often it was reached} of all lines with code"""
        counts = {}
        out = subprocess.run(['gcov', '--json-format', '--stdout',
                              objects(self.name) + '.gcda'],
                             cwd=runner.BUILD, stdout=subprocess.PIPE,
                             check=True).stdout
        for data in map(json.loads, out.splitlines()):
            for file in data['files']:
                if file['file'].endswith(self.name):
                    for line in file['lines']:
                        number = line['line_number']
                        counts[number] = max(counts.get(number, 0),
                                             line['count'])
        return counts

    def run(self):
        if not os.path.exists(objects(self.name) + '.gcda'):
            self.add('fail', 'no test has run it')
            return
        counts = self.lines()
        missed = [n for n, count in sorted(counts.items()) if not count]
        percent = 100 - 100 * len(missed) / len(counts)
        self.add('pass' if percent >= self.minimum else 'fail',
                 f'{len(counts) - len(missed)} of {len(counts)} lines,'
                 f' {percent:.1f} %, at least {self.minimum} % wanted')
        text = runner.read(os.path.join(runner.TOP, self.name)).splitlines()
        print(*(f'    {self.name}:{n}: {text[n - 1].strip()}' for n in missed),
              sep='\n', flush=True)


def coverage_tests():
    if not os.path.exists(objects('util/seqcache.c') + '.gcno'):
        sys.exit(f'{runner.BUILD} was not configured with --enable-gcov; "make'
                 ' coverage" makes a build that is.')
    return [Coverage(path, minimum)
            for path, minimum in tests.COVERAGE.items()]
