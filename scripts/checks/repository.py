# SPDX-License-Identifier: GPL-2.0-or-later
"""
Kind scripts: the Makefile, the scripts and the documentation's examples, in a
copy without any source of QEMU, and patches/. Nothing is downloaded, installed
or built.
"""

import fnmatch
import glob
import os
import re
import shutil
import subprocess
import tempfile
import textwrap
import time

import patchset
from . import install, iotests, patches, programs, release, runner, tests
from .copies import Copy, TinyQemu
from .runner import TOP

# What must be refused, and a part of what is said then
REFUSED = [
    ('all', 'JOBS=abc', 'number from 1'),
    ('all', 'JOBS=0', 'number from 1'),
    ('all', 'V=yes', 'expected 0, or 1'),
    ('all', 'BUILD=scripts', 'new folder'),
    ('all', 'BUILD=a b', 'without spaces'),
    ('all', 'PYTHON=/nonexistent', 'Python 3'),
    ('all', 'CONFIGURE_FLAGS="--x', 'quotes'),
    ('all', 'CONFIGURE_FLAGS=enable-rbd', 'begin with --'),
    ('all', 'CONFIGURE_FLAGS=--disable-tools', 'qemu-img'),
    ('all', 'VERSION=9', 'one of: 10.0'),
    ('check-series', 'VERSIONS=9', 'some of: 10.0'),
    ('all', 'QEMU_SRC=/nonexistent', 'no such file or folder. Accepted are'),
    ('demo', 'QEMU_SRC=scripts', 'not a QEMU source tree'),
    ('check', 'QEMU_SRC=Makefile', 'Accepted are a QEMU tree'),
    ('check', 'QEMU_SRC=old.dsc', 'there are patches for'),
    ('check', 'QEMU_SRC=other.dsc', 'not a source package of QEMU'),
    ('check', 'QEMU_SRC=alone.dsc', 'qemu.orig.tar.xz beside it'),
    ('check', 'TEST_TIMEOUT=x', 'seconds'),
    ('check', 'WITH=nonsense', 'asan'),
    ('check', 'TESTS=nonsense', 'scripts/check --list'),
    ('check-long', 'WITH=nonsense', 'asan'),
    ('check', 'TEST_DIR=relative', 'absolute path'),
    ('check-long', 'PARTS=nonsense', 'model'),
    ('check-long', 'PARTS=model nonsense', 'power-cuts'),
    ('check-long', 'LONG_SECONDS=abc', 'seconds'),
    ('check-long', 'SEED=-1', 'number from 0'),
    ('check-storage', 'STORES=nonsense', 'iscsi-4k'),
    ('check-filtered', 'TESTS=vmdk:001', 'qcow2 raw'),
    ('check-filtered', 'MODES=nonsense', 'writeback'),
    ('check-filtered', 'FILTER=nonsense', 'cacheextents'),
    ('check-upstream', 'TESTS=nonsense', 'qcow2 raw block unit'),
    ('check-upstream', 'MODES=nonsense', 'writeback'),
    ('check-clang', 'CLANG=nonsense', 'clang'),
    ('install', 'PREFIX=relative', 'absolute path'),
    ('install', 'PREFIX=/', 'absolute path'),
    ('install', 'PREFIX=/dev/null/x', 'is not a folder'),
    ('install', 'DESTDIR=relative', 'absolute path'),
    ('uninstall', 'PREFIX=~/x', 'absolute path'),
    ('dist', 'SOURCES=/nonexistent', 'there is no'),
    ('dist', 'SOURCES=old.dsc', 'there are patches for'),
    ('check-fresh', 'SUITES=nonsense', 'bookworm trixie sid'),
    ('check-fresh', 'USERS=nonsense', 'root user'),
    ('check-fresh', 'PARTS=nonsense', 'build demo check'),
    ('deb', 'DEB=nonsense', 'utils x86'),
    ('deb', 'DEB_REVISION=a', 'number from 1'),
    ('deb', 'VERSION=10.2', 'Debian 13'),
    ('check-deb', 'QEMU_SRC=scripts', '.dsc of Debian'),
    ('bench', 'ROWS=nonsense', 'convert-*'),
    ('bench-quick', 'ROWS=convert-* nonsense', 'convert-*'),
]

ACCEPTED = [
    ('all', 'JOBS=64'), ('all', 'BUILD=build-new'),
    ('all', 'CONFIGURE_FLAGS=--disable-system --extra-cflags="-O1 -g"'),
    ('check-long', 'PARTS=qcow2 power-cuts'), ('check-long', 'SEED=0'),
    ('check-long', 'LONG_SECONDS=0.5'),
    ('check-storage', 'STORES=iscsi loop-4k'),
    ('check-filtered', 'TESTS=raw qcow2:013'),
    ('check-upstream', 'TESTS=unit:test-aio block'),
    ('bench', 'ROWS=convert-* filter-4k-*'), ('check-fresh', 'SUITES=sid'),
    ('deb', 'DEB=utils'), ('check-deb', 'DEB=utils x86'),
]

# All files in git together, and each: what is made by a run is not committed
MAX_BYTES = 2_520_000
MAX_FILE_BYTES = 120_000


def check_refused(copy):
    """What make's variables must not be is refused before anything begins."""
    for target, setting, expected in REFUSED:
        name = setting.partition('=')[0]
        status, output = copy.run('make', target, setting)
        ok = status != 0 and expected in output and (
            name in output or name == 'ROWS')
        if set(os.listdir(copy.folder)) != copy.files:
            ok = False
            output += 'It has begun to work.'
        yield f'make {target} {setting} is refused', ok, output


def check_accepted(copy):
    """What they may be is accepted."""
    for target, setting in ACCEPTED:
        name, _, value = setting.partition('=')
        status, output = copy.run('scripts/arguments', target, **{name: value})
        yield (f'make {target} {setting} is accepted',
               status == 0 and not output, output)


def check_newer(copy):
    """A newer point release is announced, and no other."""
    copy.write('cache/debian/qemu.dsc', 'Version: 1:10.0.9+ds-1\n')
    for newest, text in (('1:10.0.10+ds-1', '"make update"'),
                         ('1:10.0.9+ds-1', ''), ('1:10.0.8+ds-1', '')):
        copy.write('cache/debian.newest', f'{newest}\n')
        status, output = copy.run('scripts/debian-source', '--newer')
        yield (f'qemu {newest} is {"" if text else "not "}announced',
               status == 0 and bool(output) == bool(text) and text in output,
               output)
    shutil.rmtree(os.path.join(copy.folder, 'cache'))


def check_tally(copy):
    """What several runs of scripts/check count is added, for CI's last line."""
    path = os.path.join(copy.folder, 'tally')
    for passed, failed, skipped in (3, ['a'], ['b', 'c']), (4, ['d'], []):
        tally = runner.Tally()
        tally.passed, tally.failed, tally.skipped = passed, failed, skipped
        tally.add_earlier(path)
    yield ('the counts of two runs are added',
           (tally.passed, tally.failed, tally.skipped) ==
           (7, ['a', 'd'], ['b', 'c']), str(vars(tally)))


def check_tree(_copy):
    """scripts/tree, and scripts/save of it"""
    with tempfile.TemporaryDirectory() as folder:
        qemu = TinyQemu(folder)
        before = qemu.patches()
        status, output = qemu.run('scripts/tree', '10.0')
        status2, output2 = qemu.run('scripts/save')
        yield ('a tree that did not change is saved as it was',
               status == status2 == 0 and qemu.patches() == before,
               output + output2)

        qemu.write('tree-10.0/util/three.c', 'three\n')
        qemu.run('git', '-C', 'tree-10.0', 'add', 'util/three.c')
        qemu.commit('three: Add a file')
        status, output = qemu.run('scripts/save', 'tree-10.0')
        yield ('a commit without "Patch:" is refused', status != 0 and
               '"Patch: TOPIC/NAME"' in output and
               'Nothing was written' in output and qemu.patches() == before,
               output)

        qemu.run('git', '-C', 'tree-10.0', 'commit', '-q', '--amend', '-m',
                 'three: Add a file', '-m', 'Costs: nothing\nPatch: b/three')
        status, output = qemu.run('scripts/save', 'tree-10.0')
        after = qemu.patches()
        yield ('a new commit becomes a patch', status == 0 and
               after.get('patches/b/three.patch') ==
               'Subject: three: Add a file\n\nCosts: nothing\n'
               'Adds: util/three.c\n' and after['patches/series'] ==
               before['patches/series'] + 'b/three.patch\n' and
               os.path.exists(os.path.join(folder, 'util/three.c')), output)

        status, output = qemu.run('scripts/tree', '10.2', version='10.2')
        status2, output2 = qemu.run('scripts/save', 'tree-10.2',
                                    version='10.2')
        new = qemu.patches()
        path = 'patches/overrides/10.2/b/two.patch'
        yield ('what does not apply to a version gets an override, and nothing'
               ' else does', status == status2 == 0 and
               '     line12a;\n' in new.pop(path, '') and new == after,
               output + output2)
        yield ('a file that another version needs stays',
               os.path.exists(os.path.join(folder, 'util/old.c')), output2)
        status, output = qemu.run('scripts/series', '10.2', version='10.2')
        yield 'the override is used', path in output.split(), output
        status, output = Copy.run(qemu, 'scripts/version')
        yield ('after another version, a bare make is for the first one again',
               output == '10.0\n', output)
        status, output = qemu.run('python3', '-B', 'scripts/patchset.py',
                                  '10.2')
        yield ('a file of another version does not belong into this one',
               output == 'util/three.c\nutil/two.c\n', output)

        qemu.write('tree-10.0/util/four.c', '')
        status, output = qemu.run('scripts/save', 'tree-10.0')
        yield ('a file that no commit has is named', status == 0 and
               'not saved: util/four.c' in output, output)

        qemu.write('tree-10.0/util/two.c', 'of the tree\n')
        qemu.commit('fixup')
        qemu.write('util/two.c', 'of here\n')
        status, output = qemu.run('scripts/save', 'tree-10.0')
        yield ('what changed in both is not lost', status != 0 and
               'util/two.c changed both' in output, output)

        qemu.write('mine/file', '')
        qemu.run('git', 'init', '-q', 'mine')
        status, output = qemu.run('scripts/tree', '10.0', 'mine')
        yield ('a repository of somebody else is refused', status != 0 and
               'mine is there, and scripts/tree did not make it' in output,
               output)


def check_dates(_copy):
    """Two exports of one commit are the same, and say when that was made."""
    with tempfile.TemporaryDirectory() as folder:
        qemu = TinyQemu(folder)
        qemu.run('git', 'init', '-q')
        qemu.run('git', 'add', 'patches', 'util')
        qemu.run('git', 'commit', '-qm', 'All',
                 GIT_COMMITTER_DATE='2001-02-03T04:05:06+0000')
        outputs = [qemu.run('scripts/export', 'export-1')[1]]
        # The clock shows another second
        time.sleep(1.1)
        outputs += [qemu.run('scripts/export', 'export-2')[1],
                    qemu.run('diff', '-r', 'export-1', 'export-2')[1]]
        dates = qemu.run('grep', '-rh', '^Date: ', 'export-1')[1].split('\n')
        yield ('an export is the same each time', not outputs[2] and
               set(dates) == {'Date: Sat, 3 Feb 2001 04:05:06 +0000', ''},
               '\n'.join(outputs + dates))


def check_source(_copy):
    """QEMU_SRC is the source of its own version, also if make has no VERSION."""
    with tempfile.TemporaryDirectory() as folder:
        qemu = TinyQemu(folder)
        for given in '', '10.2':
            output = qemu.run(
                'python3', '-Bc', 'import sys; sys.path[0] = "scripts"; import '
                'patchset; print(open(patchset.source("10.2") + "/VERSION")'
                '.read())', version='10.2', VERSION=given, http_proxy='x:1')[1]
            yield (f'QEMU_SRC is taken with VERSION="{given}"',
                   output.endswith('10.2.1\n'), output)


def check_patches(_copy):
    """patches/ is as it should be."""
    for name, found in patches.run():
        yield f'{name}: nothing is wrong', not found, '\n'.join(found)


def check_export(_copy):
    """git am, and patch, make the prepared tree of the export."""
    version = patchset.version_in_use()
    if not os.path.isdir(os.path.join(
            TOP, f'qemu{patchset.suffix(version)}')):
        return
    done = subprocess.run(
        ['scripts/export', '--check'], cwd=TOP, check=False, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, env={
            **os.environ, 'GIT_AUTHOR_NAME': 'A', 'GIT_AUTHOR_EMAIL': 'a@a',
            'GIT_COMMITTER_NAME': 'A', 'GIT_COMMITTER_EMAIL': 'a@a'})
    yield (f'the export for {version} is what was prepared',
           done.returncode == 0, done.stdout)


def examples(path):
    """The literal blocks of a page that are commands for a shell"""
    with open(path, encoding='utf-8') as f:
        text = f.read()
    if path.endswith('.md'):
        found = re.findall(r'^```\n(.*?)^```', text, re.M | re.S)
    else:
        found = re.findall(r'::\n\n((?:(?: {3}.*)?\n)+)', text)
    return [e for e in found if re.match(r'\s*(qemu-|nbdcopy|fio)', e)]


def typed(example):
    """The words of the commands that a shell reads; white space may differ"""
    stub = ''.join(f'{name}() {{ printf "<%s>" {name} "$@"; }}\n'
                   for name in ('qemu-img', 'qemu-nbd', 'nbdcopy', 'fio',
                                'qemu-storage-daemon', 'qemu-system-x86_64'))
    done = subprocess.run(['bash', '-ec', stub + example], check=False,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True)
    return done.returncode, re.sub(r'\s+', ' ', done.stdout)


def check_examples(_copy):
    """Copied with or without indentation, an example is the same."""
    for path in sorted(glob.glob(os.path.join(TOP, 'docs/system/*.rst')) +
                       [os.path.join(TOP, 'README.md')]):
        for example in examples(path):
            result = typed(example)
            yield (f'{os.path.basename(path)}: {example.split()[0]} ... can be'
                   ' copied',
                   result == typed(textwrap.dedent(example)) and
                   result[0] == 0 and '<...>' not in result[1], example)


def pages():
    """The pages in Markdown, {path: text}"""
    found = {}
    for path in glob.glob(os.path.join(TOP, '*.md')) + \
            glob.glob(os.path.join(TOP, 'docs', '**', '*.md'), recursive=True):
        with open(path, encoding='utf-8') as f:
            found[path] = f.read()
    return found


def anchors(text):
    """How a forge names the headings of a page"""
    return [re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-')
            for heading in re.findall(r'^#+ (.*)$', text, re.M)]


def check_references(_copy):
    """What the documentation names exists: files, headings, targets, tests."""
    with open(os.path.join(TOP, 'Makefile'), encoding='utf-8') as f:
        targets = re.findall(r'[\w-]+', f.read().partition('.PHONY:')[2])
    known = {os.path.basename(path).partition('.')[0] for path in
             glob.glob(os.path.join(TOP, 'tests', '**'), recursive=True)}
    texts = pages()
    for path, text in sorted(texts.items()):
        wrong = [t for t in re.findall(r'`make ([a-z][\w-]*)', text)
                 if t not in targets]
        for link, anchor in re.findall(r'\]\((?!\w+:)([^)#]*)#?([^)]*)\)', text):
            target = os.path.normpath(os.path.join(os.path.dirname(path), link)
                                      if link else path)
            if not os.path.exists(target) or \
                    anchor and anchor not in anchors(texts[target]):
                wrong.append(f'{link}#{anchor}')
        for name in re.findall(r'`([\w./-]+)`', text):
            if re.match(r'(scripts|docs|block|util|tests|include|patches)/',
                        name):
                if not os.path.exists(os.path.join(TOP, name)):
                    wrong.append(name)
            elif re.match(r'(test-|nbd-|seqcache-|cacheextents-|'
                          r'(qcow2|backup|convert)-\w+-)', name):
                if name.partition('.')[0] not in known:
                    wrong.append(name)
        yield (f'{os.path.relpath(path, TOP)} names what there is',
               not wrong, '\n'.join(wrong))


def check_versions(_copy):
    """The README names the versions that patches/versions names."""
    with open(os.path.join(TOP, 'patches', 'versions'), encoding='utf-8') as f:
        versions = [tuple(line.split()) for line in f
                    if line.strip() and not line.startswith('#')]
    found = re.findall(r'^\| (\d+\.\d+) \| (\S+) \| (\S+) \|$',
                       pages()[os.path.join(TOP, 'README.md')], re.M)
    yield 'README.md names the versions tested', found == versions, \
        f'{found}, and patches/versions {versions}'


def check_maintainers(_copy):
    """MAINTAINERS covers all files that go into QEMU's tree."""
    with open(os.path.join(TOP, 'MAINTAINERS'), encoding='utf-8') as f:
        text = f.read()
    ours = patchset.our_files()
    covered = {pattern: fnmatch.filter(ours, pattern) for pattern in
               re.findall('^F: (.*)$', text, re.M)}
    left = {*ours}.difference(*covered.values())
    unused = [pattern for pattern, files in covered.items() if not files]
    yield ('each of our files has an entry, and each pattern a file',
           not left and not unused, '\n'.join([*sorted(left), *unused]))


def check_list(_copy):
    """The names in tests.py are those of tests."""
    parts = tests.RANDOM.values()
    wanted = [*tests.MODE_NONE_ONLY, *(n for p in parts for n, _ in p.iotests),
              *(n for e in tests.ENVIRONMENTS.values()
                if isinstance(e.iotests, list) for n in e.iotests)]
    missing = set(wanted) - {*tests.UPSTREAM_IOTESTS, *iotests.our_iotests()}
    missing |= {p.program for p in parts if p.program and not os.path.exists(
        f'{TOP}/tests/unit/{os.path.basename(p.program)}.c')}
    yield ('the names in tests.py are those of tests',
           missing <= {'build-util/seqcache-fuzz'}, ' '.join(sorted(missing)))
    ours = {os.path.relpath(path, TOP) for folder in ('block', 'util')
            for path in glob.glob(os.path.join(glob.escape(TOP), folder,
                                               '*.c'))}
    yield ('there is a minimum of coverage for each C file of the product',
           ours == set(tests.COVERAGE),
           ' '.join(sorted(ours ^ set(tests.COVERAGE))))


def check_size(_copy):
    """The repository stays small."""
    done = subprocess.run(['git', 'ls-files', '-z'], cwd=TOP, check=False,
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                          text=True)
    sizes = {name: os.path.getsize(os.path.join(TOP, name))
             for name in done.stdout.split('\0')
             if os.path.isfile(os.path.join(TOP, name))}
    largest = sorted(sizes, key=sizes.get, reverse=True)[:10]
    yield (f'the files in git have less than {MAX_BYTES} bytes, and none has'
           f' more than {MAX_FILE_BYTES}',
           sum(sizes.values()) < MAX_BYTES and
           all(size <= MAX_FILE_BYTES for size in sizes.values()),
           '\n'.join([f'{sum(sizes.values())} in all',
                      *(f'{sizes[name]} {name}' for name in largest)]))


class Check(runner.Test):
    """One of the functions above. Each thing that it yields counts: (title,
    whether it is so, output), or (title, None, why it is skipped)."""

    def __init__(self, function):
        name = function.__name__.removeprefix('check_')
        super().__init__(name, f'{name}: {function.__doc__}', '')
        self.function = function

    def run(self):
        with tempfile.TemporaryDirectory() as folder:
            for title, ok, output in self.function(Copy(folder)):
                if ok is None:
                    self.add('skip', output, title)
                    continue
                self.add('pass' if ok else 'fail', title=title)
                if not ok:
                    self.details += f'{title}:\n{output}\n'


CHECKS = {check.name: check for check in map(Check, (
    check_refused, check_accepted, check_newer, check_tally, check_tree,
    check_dates, check_source, check_patches, check_export, check_examples,
    check_references, check_versions, check_maintainers, check_list, check_size,
    install.check_install_script, install.check_install_refused,
    install.check_install, release.check_dist, release.check_update,
    release.check_release))}


def check_tests():
    return [CHECKS[name] for name in programs.wanted(CHECKS)]
