# SPDX-License-Identifier: GPL-2.0-or-later
"""
What runs the tests. tests.py is the list of them: begin there.

tests.py         which tests there are, of which kind, and in which environment
runner.py        running a command, counting results, running tests in parallel
programs.py      kinds standalone and unit: programs, with TAP or without
iotests.py       kind iotests
lint.py          kind lint
repository.py    kind scripts; patches.py is its part about patches/
long.py          kind random
storage.py       kind storage; stores.py is the list of what it runs on,
                 store_base.py what these are made of, and libvirt.py one of
                 its tests
compare.py       kinds filtered and upstream
coverage.py      kind coverage
"""
