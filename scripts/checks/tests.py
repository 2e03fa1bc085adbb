# SPDX-License-Identifier: GPL-2.0-or-later
"""
The list of all tests: data only. "scripts/check --list" prints it with the names
of our own unit tests and iotests, which are found by where they are.
"""

import dataclasses

# What scripts/check runs
KINDS = {
    'scripts': 'the Makefile, the scripts, patches/ and the documentation',
    'standalone': 'what meson.build at the top tests without a QEMU tree, with'
                  ' sanitizers',
    'unit': 'our unit tests in QEMU, and those of QEMU that concern us',
    'iotests': 'our iotests, and those of QEMU about qcow2 compression',
    'lint': 'pylint, mypy and shellcheck over our iotests and scripts',
    'coverage': 'which lines of ours the kinds before it have reached (gcov)',
    'random': 'the random tests for long, $LONG_SECONDS each part at least',
    'storage': 'images on devices, file systems and servers, $STORES',
    'filtered': "QEMU's iotests without and with a filter below each image",
    'upstream': "QEMU's own tests in an unpatched build and in ours",
}

# Kind standalone: as meson.build names them
STANDALONE = ['seqcache', 'seqcache-fuzz']

# Kind unit: those of QEMU (scripts/build builds these)
UPSTREAM_UNIT_TESTS = ['test-bdrv-drain', 'test-block-iothread',
                       'test-bdrv-graph-mod']

# Kind iotests: those of QEMU, with the first of patches/versions only; without
# 023 and 271, which take too long here and are in make check-upstream
UPSTREAM_IOTESTS = """013 014 031 042 046 053 055 060 061 073 090 112 122 214
                      220 244 287 290 302 303 314""".split()
CACHE_MODES = ['writeback', 'none']
# They take long; QEMU's run in all modes in make check-upstream
MODE_NONE_ONLY = """013 014 055 060 061 112 122 220 filter-matrix-filters
                    filter-matrix-images filter-matrix-ours
                    filter-matrix-protocols qcow2-compressed-cache-nbdcopy
                    qcow2-compressed-cache-target-shapes
                    seqcache-guest-disk seqcache-heap-contents
                    seqcache-limits""".split()
# What begins so is about servers, which have no cache mode
MODE_WRITEBACK_ONLY = 'cacheextents-', 'nbd-', 'seqcache-disconnect'
# These want larger sparse files than ext4 can have; the second is where they
# can be
HUGE_FILE_IOTESTS, HUGE_FILE_FOLDER = ['220'], '/dev/shm'


@dataclasses.dataclass
class Environment:
    """Where tests run: the build folder is build-NAME (see scripts/build)."""
    what: str
    # Of the kind iotests: all, ours, or these
    iotests: 'str | list[str]' = 'all'
    # How many times longer than usual a test may take
    slower: int = 1
    # More variables for programs
    variables: dict = dataclasses.field(default_factory=dict)
    # What a test program gets as arguments
    arguments: tuple = ()


# What WITH names
ENVIRONMENTS = {
    '': Environment('the default build'),
    'asan': Environment('AddressSanitizer and UBSan', slower=3),
    'tsan': Environment('ThreadSanitizer', 'ours', slower=6),
    'clang': Environment('clang with thread-safety analysis and -Werror'),
    'storage': Environment('the tools, with each driver for storage'),
    'gcov': Environment('counts which lines are reached', 'ours'),
    'valgrind': Environment(
        'valgrind: unit tests; qemu-img and qemu-io in an iotest',
        ['seqcache-heap-contents'], slower=12, variables={
            'SEQCACHE_OPS': '20000', 'TEST_SEQCACHE_OPS': '2000',
            'TEST_CACHEEXTENTS_OPS': '2000'},
        # It looks at how much memory the process has
        arguments=('-s', '/seqcache/million-clusters')),
}
# Seconds after which a test hangs; TEST_TIMEOUT is another number
TIMEOUT = 600


@dataclasses.dataclass
class Part:
    """
    A part of the kind random, in rounds: each has a seed of its own, and runs
    each case of a program, or each iotest in both cache modes.
    """
    what: str
    rounds: int = 1
    # A unit test, or a program of build-util; those of its cases that contain
    # the text, or if there is none all at once
    program: str = ''
    cases: str = ''
    arguments: tuple = ()
    # The variable with the number of operations in all cases, and that of a case
    operations: tuple = ()
    # (name, TEST_SCALE); one that is named twice runs twice as often
    iotests: tuple = ()


# What PARTS names
RANDOM = {
    'model': Part('SeqCache against its model: 5 000 000 operations a run',
                  program='build-util/test-seqcache', cases='/model',
                  operations=('SEQCACHE_OPS', 5000000)),
    'fuzz': Part('the same with inputs that libFuzzer finds',
                 program='build-util/seqcache-fuzz'),
    'write-behind': Part('requests to write-behind: 8 000 a run', rounds=10,
                         program='test-write-behind', cases='/random'),
    'filter': Part('requests to the filter: 200 000 a run',
                   program='test-seqcache-filter-random', cases='/random/',
                   operations=('TEST_SEQCACHE_OPS', 200000)),
    'filter-images': Part('requests to images below the filter, by qemu-io: 800'
                          ' a run', rounds=3, iotests=(('seqcache-io', 1),)),
    'cacheextents': Part('queries and changes: 100 000 a run',
                         program='test-cacheextents', cases='/random/',
                         operations=('TEST_CACHEEXTENTS_OPS', 100000)),
    'qcow2': Part('compressed writes to qcow2 images, by qemu-io',
                  iotests=(('qcow2-compressed-cache-random', 1),)),
    'qcow2-read': Part('several clients of a qcow2 image with compressed'
                       ' clusters, and threads', rounds=5,
                       program='test-compressed-read', cases='/',
                       iotests=(('qcow2-compressed-read-random', 1),)),
    'faults': Part('a disk that fails at each request of a script, in each way,'
                   ' and an NBD server that disconnects there',
                   program='test-seqcache-faults', cases='/',
                   arguments=('-m', 'slow'),
                   iotests=(('seqcache-disconnect', 2),)),
    'corrupt': Part('corrupt qcow2 images: 200 a run', rounds=5,
                    iotests=(('qcow2-compressed-cache-corrupt', 1),)),
    'power-cuts': Part('images that power cuts can leave: 480 a run and more',
                       iotests=(('qcow2-compressed-cache-power-cut', 2),
                                ('qcow2-compressed-cache-power-cut', 2),
                                ('seqcache-power-cut', 8))),
    'kills': Part('processes that are killed while they write: 40 a run and'
                  ' more',
                  iotests=(('qcow2-compressed-cache-kill', 2),
                           ('qcow2-compressed-cache-kill', 2),
                           ('seqcache-kill', 5))),
}

# Kind lint
LINTERS = ['pylint-iotests', 'mypy-iotests', 'pylint-scripts', 'mypy-scripts',
           'shellcheck']

# Kind coverage: the lines that are to be reached, in percent
COVERAGE = {
    'util/extent-set.c': 90,
    'util/seqcache.c': 95,
    'util/seqcache-flush.c': 95,
    'block/write-behind.c': 90,
    'block/write-behind-age.c': 90,
    'block/write-behind-read.c': 90,
    'block/seqcache.c': 90,
    'block/seqcache-child.c': 90,
    'block/cacheextents.c': 90,
    'block/block-extents.c': 90,
    'block/filter-common.c': 90,
    'block/compressed-read.c': 90,
    'block/compressed-read-ahead.c': 90,
    'block/compressed-read-entries.c': 90,
    'block/qcow2-compressed-read.c': 90,
    'block/qcow2-write-behind.c': 90,
    'block/qcow2-compress-ahead.c': 90,
}

# What QEMU's own tests may do differently, and why. Any other difference is a
# failure. {kind: {(format, iotest): reason}}
DIFFERENCES = {
    'filtered': {
        ('raw', '081'): 'an event names the child of the quorum node, which is'
                        ' the filter',
        ('raw', '184'): 'prints the whole graph below a node',
        ('raw', 'reopen-file'): 'replaces the child of a node, which is the'
                                ' filter',
        ('qcow2', '184'): 'prints the whole graph below a node',
        ('qcow2', '245'): 'replaces the child of a node, which is the filter,'
                          ' in four cases',
        ('qcow2', '273'): 'prints the whole graph',
        ('qcow2', '283'): 'an error message names the child of a node, which is'
                          ' the filter',
        ('qcow2', '302'): 'prints the information on each child',
        ('qcow2', 'reopen-file'): 'replaces the child of a node, which is the'
                                  ' filter',
    },
    'upstream': {},
}
