# SPDX-License-Identifier: GPL-2.0-or-later
"""
make dist, make update, and what a release says about itself: a part of kind
scripts.
"""

import glob
import hashlib
import os
import re
import shutil
import subprocess
import tarfile
import tempfile

from .copies import Copy, TinyQemu
from .runner import TOP

# Ends the script that calls it, or the one that calls that
KILLER = """#!/bin/sh
case "$1" in
format-patch)
    pid=$PPID
    [ "$WHO" = export ] || pid=$(awk '/^PPid/ {{ print $2 }}' /proc/$PPID/status)
    kill $pid
    exec sleep 60
    ;;
esac
exec {} "$@"
"""
CHANGES = '# Changelog\n\n## [1.0] - 2026-11-30\n'


def check_dist(_copy):
    """A release has all exports, and can be made again."""
    with tempfile.TemporaryDirectory() as folder:
        qemu = TinyQemu(folder)
        sources = ' '.join(sorted(glob.glob(f'{folder}/source-*')))
        patches = qemu.patches()
        qemu.write('patches/overrides/10.2/b/two.patch',
                   patches['patches/b/two.patch'].replace('12;', '12a;'))
        qemu.write('VERSION', '1.0\n')
        qemu.write('CHANGELOG.md', CHANGES)
        qemu.write('.gitignore', '/cache/\n/dist/\n/source-*/\n__pycache__/\n'
                   '/*.dsc\n')

        def run(*command, **variables):
            return Copy.run(qemu, *command, **{
                'SOURCES': sources, 'GIT_AUTHOR_NAME': 'A',
                'GIT_AUTHOR_EMAIL': 'a@a', 'GIT_COMMITTER_NAME': 'A',
                'GIT_COMMITTER_EMAIL': 'a@a', **variables})

        def digest():
            with open(f'{folder}/dist/seqcache-1.0.tar.xz', 'rb') as f:
                return hashlib.file_digest(f, 'sha256').hexdigest()

        run('git', 'init', '-q')
        run('git', 'add', '-A')
        run('git', 'commit', '-qm', 'all')
        run('git', 'tag', 'v1.0')
        status, output = run('scripts/dist')
        yield 'a release is made', status == 0, output
        if status:
            return
        first = digest()
        with tarfile.open(f'{folder}/dist/seqcache-1.0.tar.xz') as tar:
            names = tar.getnames()
        yield ('it has an export for each version, and the repository',
               {'seqcache-1.0/export-10.0/flat/series',
                'seqcache-1.0/export-10.2/flat/series',
                'seqcache-1.0/scripts/dist'} <= {*names}, '\n'.join(names))
        status, output = run('sh', '-c', 'cd dist && sha256sum -c SHA256SUMS')
        yield 'its digest is noted', status == 0, output

        status, output = run('scripts/dist', TZ='Asia/Tokyo',
                             GIT_AUTHOR_NAME='Someone', LANG='de_DE.UTF-8')
        yield ('the same release has the same bytes', status == 0 and
               digest() == first, output)

        qemu.write('cache/stubs/git', KILLER.format(shutil.which('git')))
        os.chmod(f'{folder}/cache/stubs/git', 0o755)
        for who in 'export', 'dist':
            status, output = run(
                f'scripts/{who}', WHO=who, QEMU_SRC=sources.split()[0],
                PATH=f'{folder}/cache/stubs:{os.environ["PATH"]}')
            left = glob.glob(f'{folder}/cache/export-*') + [
                name for name in os.listdir(f'{folder}/dist')
                if name not in ('seqcache-1.0.tar.xz', 'SHA256SUMS')]
            yield (f'{who} that is ended leaves nothing behind',
                   status == 143 and not left, f'{status} {left} {output}')

        run('git', 'tag', 'v2.0')
        status, output = run('scripts/dist')
        yield ('a tag of another version is refused',
               status != 0 and 'has the tag v2.0' in output, output)
        run('git', 'tag', '-d', 'v2.0')
        qemu.write('VERSION', '1.1\n')
        status, output = run('scripts/dist')
        yield ('what is not committed, and a version without changes, are refused',
               status != 0 and 'not committed' in output and
               'the newest release in CHANGELOG.md is 1.0' in output and
               digest() == first, output)


APT_GET = """#!/bin/sh
case "$*" in
*indextargets*) echo 'Debian|Debian|http://debian.invalid|/nonexistent:1' ;;
*--download-only*) exit 1 ;;
esac
"""
APT_CACHE = """#!/bin/sh
echo 'Version: 1:10.0.10+ds-1'
"""


def check_update(copy):
    """make update tells whether there is a newer QEMU, before it takes it."""
    for name, text in ('apt-get', APT_GET), ('apt-cache', APT_CACHE):
        copy.write(f'stubs/{name}', text)
        os.chmod(os.path.join(copy.folder, 'stubs', name), 0o755)
    path = os.path.join(copy.folder, 'stubs') + ':' + os.environ['PATH']

    for ours, expected in (('10.0.10', 'qemu 1:10.0.10+ds-1 is the newest'),
                           ('10.0.9', 'Debian has QEMU 10.0.10')):
        copy.write('cache/debian/qemu.dsc', f'Version: 1:{ours}+ds-1\n')
        status, output = copy.run('scripts/debian-source', '--update', PATH=path)
        yield (f'with QEMU {ours} it says "{expected}"',
               (status == 0) == (ours == '10.0.10') and expected in output and
               ('qemu 1:10.0.9+ds-1 is used as before' in output) ==
               (ours == '10.0.9') and
               os.listdir(os.path.join(copy.folder, 'cache/debian')) ==
               ['qemu.dsc'], output)


def check_release(_copy):
    """VERSION, the changelog and git's tags agree."""
    with open(os.path.join(TOP, 'VERSION'), encoding='utf-8') as f:
        version = f.read().strip()
    with open(os.path.join(TOP, 'CHANGELOG.md'), encoding='utf-8') as f:
        releases = re.findall(r'^## \[(\d.*?)\] - \d{4}-\d\d-\d\d$', f.read(), re.M)
    yield ('CHANGELOG.md has the version, and each once', version in releases and
           len(releases) == len(set(releases)), f'{version}, {releases}')

    def git(*command):
        return subprocess.run(('git', *command), cwd=TOP, check=False, text=True,
                              stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL).stdout

    wrong = [tag for tag in git('tag', '-l', 'v*').split()
             if git('show', f'{tag}:VERSION').strip() != tag[1:]]
    yield 'tags have the names of their versions', not wrong, ' '.join(wrong)
