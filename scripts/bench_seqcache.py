# SPDX-License-Identifier: GPL-2.0-or-later
"""The rows of scripts/bench about the data structure alone"""

import json
import os
import subprocess

from bench_report import ratio
from bench_row import Row
from lab import TOP

BUILD_UTIL = os.path.join(TOP, 'build-util')
FEW, MANY = '10', '100000'


class SeqCacheRow(Row):
    """One of the things that tests/bench/seqcache-bench.c measures"""

    main = 'ns'

    # What each run of the program printed: it measures all rows at once
    runs: list = []

    def __init__(self, name, title, has_memcpy=True, at_most=None):
        figures = [ratio(MANY, FEW, 'ns', at_most=at_most)]
        self.sides = [FEW, '1000', MANY]
        if has_memcpy:
            figures.append(ratio('1000', 'memcpy', 'ns'))
            self.sides.insert(0, 'memcpy')
        super().__init__(f'seqcache-{name}', f'SeqCache: {title}', figures)
        self.key = name
        self.count = {}

    def prepare(self, bench):
        if not os.path.exists(os.path.join(BUILD_UTIL, 'build.ninja')):
            subprocess.run(['meson', 'setup', BUILD_UTIL], cwd=TOP, check=True,
                           stdout=subprocess.DEVNULL)
        subprocess.run(['ninja', '-C', BUILD_UTIL, 'seqcache-bench'],
                       check=True, stdout=subprocess.DEVNULL)

    def measure(self, bench, side):
        index = self.count.get(side, 0)
        self.count[side] = index + 1
        if index == len(self.runs):
            output = subprocess.run(
                [os.path.join(BUILD_UTIL, 'seqcache-bench'), '--json'],
                stdout=subprocess.PIPE, check=True).stdout
            self.runs.append(json.loads(output))
        return {'ns': self.runs[index][self.key][side]}


ROWS = [
    SeqCacheRow('write-512', 'a write of 512 bytes'),
    SeqCacheRow('write-4k', 'a write of 4 KiB'),
    SeqCacheRow('write-64k', 'a write of 64 KiB'),
    SeqCacheRow('hit', 'a look-up that hits, in order', False, at_most=2),
    SeqCacheRow('hit-random', 'a look-up that hits, at random', False,
                at_most=2),
    SeqCacheRow('miss-random', 'a look-up that misses, at random', False),
    SeqCacheRow('read-4k', 'a read of 4 KiB, in order'),
    SeqCacheRow('read-4k-random', 'a read of 4 KiB, at random'),
]
