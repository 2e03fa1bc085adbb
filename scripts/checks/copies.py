# SPDX-License-Identifier: GPL-2.0-or-later
"""Folders in which the scripts can be tried: for kind scripts."""

import os
import shutil
import subprocess

from .runner import TOP

DSC = 'Source: {}\nVersion: 1:{}+ds-1\nChecksums-Sha256:\n {} 1 {}\n'


class Copy:
    """A copy of what the scripts need, with a few files to be refused"""

    def __init__(self, folder):
        self.folder = folder
        for name in ('scripts', 'patches', 'Makefile'):
            path = os.path.join(TOP, name)
            if os.path.isdir(path):
                shutil.copytree(path, os.path.join(folder, name))
            else:
                shutil.copy(path, folder)
        for name, source, version in (('old.dsc', 'qemu', '1.7.2'),
                                      ('other.dsc', 'hello', '10.0.1'),
                                      ('alone.dsc', 'qemu', '10.0.1')):
            self.write(name, DSC.format(source, version, '0' * 64,
                                        'qemu.orig.tar.xz'))
        self.files = set(os.listdir(folder))

    def write(self, name, text):
        path = os.path.join(self.folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, 'w', encoding='utf-8') as f:
            f.write(text)

    def run(self, *command, **variables):
        """(exit status, output) of a command, as a user would type it"""
        env = {'PATH': os.environ['PATH'], 'HOME': self.folder, **variables}
        done = subprocess.run(command, cwd=self.folder, env=env, check=False,
                              stdin=subprocess.DEVNULL, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        return done.returncode, done.stdout


# A QEMU of a few lines, and two patches of it
LINES = ''.join(f'    line{n};\n' for n in range(1, 21))
PATCH = """Subject: {name}: Change a line

Why.

Costs: nothing
{adds}
diff --git a/block/qcow2.c b/block/qcow2.c
--- a/block/qcow2.c
+++ b/block/qcow2.c
@@ -{begin},7 +{begin},7 @@
     line{0};
     line{1};
     line{2};
-    line{3};
+    changed{3};
     line{4};
     line{5};
     line{6};
"""


def tiny_patch(name, line, adds=''):
    numbers = range(line - 3, line + 4)
    return PATCH.format(*numbers, name=name, begin=line - 3,
                        adds=f'Adds: {adds}\n' if adds else '')


class TinyQemu(Copy):
    """The scripts with a QEMU of a few lines, in two versions"""

    def __init__(self, folder):
        super().__init__(folder)
        shutil.rmtree(os.path.join(folder, 'patches'))
        for version, lines in (('10.0.1', LINES),
                               ('10.2.1', LINES.replace('12;', '12a;'))):
            for name, text in (('VERSION', version), ('block/qcow2.c', lines),
                               ('pythondeps.toml', ''),
                               ('subprojects/keycodemapdb/x', ''),
                               ('subprojects/berkeley-softfloat-3/x', ''),
                               ('subprojects/berkeley-testfloat-3/x', '')):
                self.write(f'source-{version}/{name}', text)
        self.write('patches/versions', '10.0 10.0.1\n10.2 10.2.1\n')
        self.write('patches/series', '# All.\n\n# a:\n# Of a.\na/one.patch\n'
                   '\n# b:\nb/two.patch [10.0 10.2 99.0]\n'
                   'b/old.patch [10.0]\n')
        self.write('patches/test/series', '# None.\n')
        self.write('patches/a/one.patch', tiny_patch('one', 5))
        self.write('patches/b/two.patch', tiny_patch('two', 15, 'util/two.c'))
        self.write('patches/b/old.patch', tiny_patch('old', 10, 'util/old.c'))
        self.write('util/two.c', '')
        self.write('util/old.c', '')

    def run(self, *command, version='10.0', **variables):
        return super().run(
            *command, GIT_AUTHOR_NAME='A', GIT_AUTHOR_EMAIL='a@a',
            GIT_COMMITTER_NAME='A', GIT_COMMITTER_EMAIL='a@a',
            QEMU_SRC=os.path.join(self.folder, f'source-{version}.1'),
            **variables)

    def patches(self):
        """{path: contents} of patches/"""
        found = {}
        for folder, _, names in os.walk(os.path.join(self.folder, 'patches')):
            for name in names:
                path = os.path.join(folder, name)
                with open(path, encoding='utf-8') as f:
                    found[os.path.relpath(path, self.folder)] = f.read()
        return found

    def commit(self, message, version='10.0'):
        return self.run('git', '-C', f'tree-{version}', 'commit', '-aqm',
                        message)
