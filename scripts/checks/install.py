# SPDX-License-Identifier: GPL-2.0-or-later
"""
make install and make uninstall: a part of kind scripts. The first ones install a
few files that are made here; the last one what was built.
"""

import glob
import os
import shutil
import subprocess

from .iotests import Iotest
from .runner import BUILD, TOP, read

MANIFEST = 'share/seqcache/manifest'
# Root may write everywhere: a user who may not
USER = ('setpriv', '--reuid=65534', '--regid=65534', '--clear-groups')


def contents(folder):
    """{path: contents, or what a link points to, or None of a folder}"""
    found = {}
    for top, folders, names in os.walk(folder):
        for name in folders + names:
            path = os.path.join(top, name)
            text = None
            if os.path.islink(path):
                text = os.readlink(path)
            elif os.path.isfile(path):
                with open(path, 'rb') as f:
                    text = f.read()
            found[os.path.relpath(path, folder)] = text
    return found


class Stage:
    """What scripts/build --install would have laid out, and where it goes"""

    def __init__(self, copy):
        self.copy = copy
        self.to = os.path.join(copy.folder, 'to')
        self.prefix = os.path.join(self.to, 'opt/a b')
        copy.write('build/meson-info/intro-buildoptions.json',
                   '[{"name": "prefix", "value": "/usr/local"}]')
        copy.write('build/build.ninja', '')
        copy.write('build/config-host.h', '#define CONFIG_RELOCATABLE\n')
        self.fill('1.0', 'bin/qemu-io', 'share/man/man1/qemu-img.1')
        os.mkdir(self.to)
        os.symlink('/nonexistent/bios.bin', self.path('share/bios.bin'))

    def path(self, name):
        return os.path.join(self.copy.folder, 'build/stage/usr/local', name)

    def fill(self, version, *names):
        self.copy.write(self.path('bin/qemu-img'), '#!/bin/sh\n'
                        f'echo "qemu-img version 10.0.13 (seqcache {version})"')
        os.chmod(self.path('bin/qemu-img'), 0o755)
        for name in names:
            self.copy.write(self.path(name), version)

    def run(self, *arguments, user=(), **variables):
        return self.copy.run(*user, 'scripts/install', *arguments,
                             **{'PREFIX': self.prefix, **variables})


def check_install_script(copy):
    """What is installed, replaced by an upgrade, and removed is ours."""
    stage = Stage(copy)
    staged = contents(stage.path(''))
    status, output = stage.run(DESTDIR=stage.to, PREFIX='/opt/a b')
    found = contents(stage.prefix)
    manifest = found.pop(MANIFEST, None)
    found.pop(os.path.dirname(MANIFEST), None)
    yield ('all is installed as it was laid out',
           status == 0 and found == staged and manifest and
           f'QEMU 10.0.13 (seqcache 1.0) is installed in {stage.prefix}. ' in
           output, output)

    stage.fill('1.1', 'bin/new')
    os.unlink(stage.path('bin/qemu-io'))
    shutil.rmtree(stage.path('share/man'))
    status, output = stage.run()
    found = contents(stage.prefix)
    yield ('an upgrade replaces and removes what is out of date',
           status == 0 and 'instead of QEMU 10.0.13 (seqcache 1.0)' in output and
           found['bin/new'] == b'1.1' and 'bin/qemu-io' not in found and
           'share/man' not in found, output)

    copy.write(os.path.join(stage.prefix, 'bin/other'), 'mine')
    copy.write(os.path.join(stage.prefix, 'bin/new'), 'changed')
    before = contents(stage.prefix)
    status, output = stage.run()
    yield ('what somebody else changed is not replaced',
           status != 0 and 'bin/new is there, and not as seqcache' in output and
           contents(stage.prefix) == before, output)

    status, output = stage.run('--uninstall')
    yield ('only what was installed is removed',
           status == 0 and 'bin/new was changed since' in output and
           contents(stage.prefix) == {'bin': None, 'bin/new': b'changed',
                                      'bin/other': b'mine'}, output)
    shutil.rmtree(stage.prefix)

    status, output = stage.run()
    status2, output2 = stage.run('--uninstall')
    yield ('nothing is left behind', status == status2 == 0 and
           os.listdir(stage.to) == ['opt'] and
           not os.listdir(os.path.join(stage.to, 'opt')), output + output2)


def check_install_refused(copy):
    """What cannot be installed leaves everything as it was."""
    stage = Stage(copy)
    outside = os.path.join(copy.folder, 'outside')
    copy.write(outside, 'outside')

    def refused(title, expected, *arguments, **variables):
        before = contents(stage.to)
        status, output = stage.run(*arguments, **variables)
        return (f'{title} is refused', status != 0 and expected in output and
                output.count('\n') == 1 and contents(stage.to) == before, output)

    user = USER if os.getuid() == 0 else ()
    if user:
        os.chmod(copy.folder, 0o755)
    os.chmod(stage.to, 0o555)
    yield refused('a folder that cannot be written to', 'may not write to',
                  user=user, PATH='/usr/bin:/bin')
    os.chmod(stage.to, 0o755)
    yield refused('a file as folder', 'is not a folder', PREFIX=outside)
    yield refused('to remove what was never installed', 'is not there',
                  '--uninstall')

    os.rename(stage.path(''), stage.path('')[:-1] + '-away')
    yield refused('nothing built', '"make install" builds it')
    os.rename(stage.path('')[:-1] + '-away', stage.path(''))

    copy.write(os.path.join(stage.prefix, 'bin/qemu-img'), 'of Debian')
    yield refused("somebody else's program", 'remove it, or name another PREFIX')
    os.unlink(os.path.join(stage.prefix, 'bin/qemu-img'))

    os.mkdir(os.path.join(stage.prefix, 'share'))
    copy.write(os.path.join(stage.prefix, 'share/man'), 'in the way')
    yield refused('a file where a folder is to be', 'is not a folder')
    os.unlink(os.path.join(stage.prefix, 'share/man'))

    # It is found only when half of all is copied
    os.mkfifo(stage.path('share/zzz'))
    yield refused('what cannot be copied', 'Nothing was installed')
    os.unlink(stage.path('share/zzz'))

    for line in 'f ../../outside', 'f /etc/passwd', 'f', 'folder ../x':
        copy.write(os.path.join(stage.prefix, MANIFEST), f'# Title\n{line}\n')
        yield refused(f'a manifest with "{line}"', 'was changed', '--uninstall')

    copy.write('build/config-host.h', '')
    shutil.rmtree(stage.prefix)
    yield refused('another PREFIX of a build that is not relocatable',
                  'PREFIX can only be /usr/local')


def boot(programs):
    """Linux, with disks, in the programs of this folder: results of a check"""
    test = Iotest('seqcache-guest-disk', 'none', where='installed', env={
        variable: os.path.join(programs, program) for variable, program in (
            ('QEMU_PROG', 'qemu-system-x86_64'), ('QEMU_IMG_PROG', 'qemu-img'),
            ('QEMU_IO_PROG', 'qemu-io'), ('QEMU_NBD_PROG', 'qemu-nbd'),
            ('QSD_PROG', 'qemu-storage-daemon'))})
    test.run()
    for _, result, note in test.results:
        # One that passed has a note if cases of it were not run
        skipped = result == 'skip' or result == 'pass' and note
        yield ('an installed qemu-system boots a guest',
               None if skipped else result == 'pass', note or read(test.log))


def check_install(copy):
    """What was built can be installed, runs, and can be removed."""
    if not os.path.exists(os.path.join(BUILD, 'qemu-img')):
        yield 'make install installs what was built', None, 'nothing is built'
        return
    to = os.path.join(copy.folder, 'to')
    env = {'DESTDIR': to, 'PREFIX': '/opt/qemu'}

    def run(*command, **variables):
        done = subprocess.run(command, cwd=TOP, check=False, text=True,
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, timeout=1800,
                              env={**os.environ, **variables})
        return done.returncode, done.stdout

    status, output = run('make', 'install', **env)
    programs = os.path.join(to, 'opt/qemu/bin')
    systems = glob.glob(os.path.join(programs, 'qemu-system-*'))
    built = [path for path in glob.glob(os.path.join(
        glob.escape(BUILD), 'qemu-system-*')) if os.path.isfile(path)]
    yield ('make install installs what was built',
           status == 0 and len(systems) == len(built), output)

    with open(os.path.join(TOP, 'VERSION'), encoding='utf-8') as f:
        version = f'(seqcache {f.read().strip()})'
    for program in ('qemu-img', 'qemu-io', 'qemu-nbd', 'qemu-storage-daemon',
                    *map(os.path.basename, systems)):
        status, output = run(os.path.join(programs, program), '--version')
        yield (f'{program} tells which version it is',
               status == 0 and version in output.splitlines()[0], output)

    if any('x86_64' in system for system in systems):
        log = os.path.join(copy.folder, 'log')
        # SeaBIOS writes to this port, and finds nothing to boot from
        status, output = run(
            'timeout', '60', os.path.join(programs, 'qemu-system-x86_64'),
            '-M', 'pc,accel=tcg', '-m', '64', '-display', 'none', '-no-reboot',
            '-boot', 'reboot-timeout=1', '-net', 'none',
            '-debugcon', f'file:{log}', '-global', 'isa-debugcon.iobase=0x402')
        found = contents(copy.folder).get('log') or b''
        yield ('qemu-system finds its firmware', status == 0 and
               b'No bootable device' in found, f'{output}{found!r}')
        yield from boot(programs)
    else:
        yield ('an installed qemu-system boots a guest', None,
               'qemu-system-x86_64 is not built')

    status, output = run('make', 'uninstall', **env)
    yield ('make uninstall leaves nothing behind',
           status == 0 and not os.path.exists(to), output)
