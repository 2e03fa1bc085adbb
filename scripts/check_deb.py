#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""
What an administrator does with our packages on Debian 13: scripts/check-deb runs
this in a new system. The packages are in /srv/seqcache/now, and again with a
later version in /srv/seqcache/later.

Each step is a function, in the order in which they are written; a step that
fails does not keep the next one from running. The last line is
"N passed, N failed[, N skipped]".
"""

import glob
import hashlib
import json
import os
import re
import subprocess
import sys
import time

from lab import (
    LIBVIRT_QEMU_CONF, Failed, RequestLog, Skipped, expect, free_port,
    libvirt_guest, make_files_image, qemu_img, verify, wait_for)

LOG = '/root/check-deb.log'
WORK = '/root/work'
SOURCE = f'{WORK}/source.img'
IMAGE_MIB = 192
REPOSITORY = '/srv/seqcache'
SOURCES_LIST = '/etc/apt/sources.list.d/seqcache.list'
OURS = sorted({os.path.basename(path).partition('_')[0]
               for path in glob.glob(f'{REPOSITORY}/now/*.deb')})
HAS_SYSTEM = 'qemu-system-x86' in OURS
TOOLS = ['strace', 'procps', 'e2fsprogs', 'tgt', 'lighttpd']
LIBVIRT = ['libvirt-daemon', 'libvirt-daemon-driver-qemu', 'libvirt-clients']
HTTP_PORT, ISCSI_PORT = free_port(), free_port()
ISCSI_TARGET = 'iqn.2026-01.example:disk'

# What changes when packages are installed and programs run, and is no trace of
# ours: apt's and dpkg's own records, logs, caches, and what only lives until
# the next boot
NO_TRACE = re.compile(r'/(proc|sys|dev|run|tmp|root|srv|build)(/|$)|/var/'
                      r'(log|cache|tmp|lib/(apt|dpkg|libvirt|systemd))(/|$)|'
                      r'/etc/ld\.so\.cache|/etc/apt/sources\.list\.d')


def run(*command, **options):
    """The output of a command, which must succeed; the log has it as well."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, check=False,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, **options)
    with open(LOG, 'a', encoding='utf-8') as f:
        f.write(f'+ {" ".join(command)}\n{done.stdout}')
    if done.returncode:
        raise Failed(f'{" ".join(command)}: status {done.returncode}\n'
                     + '\n'.join(done.stdout.splitlines()[-20:]))
    return done.stdout


def start(command):
    """A program in the background; the log has what it prints."""
    with open(LOG, 'ab') as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log,
                                stderr=log)


def versions():
    """{package: version} of what is installed of QEMU's source"""
    text = run('dpkg-query', '-W', '-f',
               '${source:Package} ${Package} ${Version} ${db:Status-Abbrev}\n')
    return {words[1]: words[2] for words in map(str.split, text.splitlines())
            if words[0] == 'qemu' and words[3] == 'ii'}


def files():
    """{path: what is there} of the system"""
    found = {}
    for top, folders, names in os.walk('/'):
        folders[:] = [f for f in folders
                      if not NO_TRACE.match(os.path.join(top, f))]
        for name in folders + names:
            path = os.path.join(top, name)
            if NO_TRACE.match(path):
                continue
            if os.path.islink(path):
                found[path] = os.readlink(path)
            elif os.path.isfile(path):
                with open(path, 'rb') as f:
                    found[path] = hashlib.file_digest(f, 'sha256').hexdigest()
            else:
                found[path] = ''
    return found


def drivers():
    """The drivers that qemu-img names, and the modules there are"""
    found = re.search(r'^Supported .*formats:\n(.*?)\n\n', qemu_img('--help'),
                      re.M | re.S)
    return {*found[1].split(), *map(os.path.basename, glob.glob(
        '/usr/lib/*/qemu/block-*.so'))}


def convert_requests():
    """What the file of "convert -c -t none" got: {'reads', 'writes', ...}"""
    path = f'{WORK}/copy.qcow2'
    log = RequestLog(path)
    run(*log.prefix, '/usr/bin/qemu-img', 'convert', '-c', '-t', 'none', '-f',
        'raw', '-O', 'qcow2', SOURCE, path)
    verify(SOURCE, path)
    return log.read()


class Guest:
    """A guest that libvirt starts; its disk is the source image."""

    NAME = 'check-deb'

    def __init__(self):
        self.daemon = None

    def start(self):
        """By libvirt, which is started without systemd if it does not run."""
        if self.daemon is None:
            with open('/etc/libvirt/qemu.conf', 'a', encoding='utf-8') as f:
                f.write(LIBVIRT_QEMU_CONF)
            program = next(filter(os.path.exists, (
                '/usr/sbin/virtqemud', '/usr/sbin/libvirtd')))
            self.daemon = start([program])
            wait_for(lambda: subprocess.run(
                ['virsh', '-q', 'version'], check=False,
                capture_output=True).returncode == 0, 'libvirt')
        with open(f'{WORK}/guest.xml', 'w', encoding='utf-8') as f:
            f.write(libvirt_guest(self.NAME, '/usr/bin/qemu-system-x86_64',
                                  SOURCE))
        run('virsh', 'create', f'{WORK}/guest.xml')

    def stop(self):
        run('virsh', 'destroy', self.NAME)

    def qmp(self, command, **arguments):
        reply = json.loads(run('virsh', 'qemu-monitor-command', self.NAME,
                               json.dumps({'execute': command,
                                           'arguments': arguments})))
        expect('return' in reply, f'{command} {arguments}: {reply}')
        return reply['return']

    def version(self):
        return self.qmp('query-version')['package']

    @staticmethod
    def pid():
        with open(f'/run/libvirt/qemu/{Guest.NAME}.pid', encoding='utf-8') as f:
            return f.read().strip()

    def backup(self):
        """A compressed backup by QMP, compared; what its file got"""
        path = f'{WORK}/backup.qcow2'
        if os.path.exists(path):
            os.unlink(path)
        qemu_img('create', '-q', '-f', 'qcow2', path, f'{IMAGE_MIB}M')
        disk = self.qmp('query-block')[0]['inserted']['node-name']
        self.qmp('blockdev-add', **{
            'driver': 'qcow2', 'node-name': 'target', 'file': {
                'driver': 'file', 'filename': path, 'aio': 'threads',
                'cache': {'direct': True}}})
        log = RequestLog(path)
        trace = subprocess.Popen(
            [*[w for w in log.prefix if w not in ('--seccomp-bpf', '-qq')],
             '-p', self.pid()], stderr=subprocess.PIPE, text=True)
        expect('attached' in trace.stderr.readline(), 'strace')
        self.qmp('blockdev-backup', **{
            'job-id': 'backup', 'device': disk, 'target': 'target',
            'sync': 'full', 'compress': True, 'auto-dismiss': False})
        job = wait_for(lambda: next(
            (j for j in self.qmp('query-jobs')
             if j['id'] == 'backup' and j['status'] == 'concluded'), None),
            'the backup', 600)
        expect('error' not in job, str(job))
        self.qmp('job-dismiss', id='backup')
        self.qmp('blockdev-del', **{'node-name': 'target'})
        trace.terminate()
        trace.communicate()
        verify(SOURCE, path)
        return log.read()


class Servers:
    """An HTTP server and an iSCSI target, both with the source image"""

    def __init__(self):
        self.processes = []

    def __enter__(self):
        with open(f'{WORK}/lighttpd.conf', 'w', encoding='utf-8') as f:
            f.write(f'server.document-root = "{WORK}"\n'
                    'server.bind = "127.0.0.1"\n'
                    f'server.port = {HTTP_PORT}\n')
        self.processes = [start(command) for command in (
            ['lighttpd', '-D', '-f', f'{WORK}/lighttpd.conf'],
            ['tgtd', '-f', '-C', '7', '--iscsi',
             f'portal=127.0.0.1:{ISCSI_PORT}'])]
        try:
            wait_for(lambda: subprocess.run(
                ['tgtadm', '-C', '7', '--mode', 'sys', '--op', 'show'],
                check=False, capture_output=True).returncode == 0, 'tgtd')
            for words in (['target', 'new', '--tid', '1', '-T', ISCSI_TARGET],
                          ['logicalunit', 'new', '--tid', '1', '--lun', '1',
                           '-b', SOURCE],
                          ['target', 'bind', '--tid', '1', '-I', 'ALL']):
                run('tgtadm', '-C', '7', '--lld', 'iscsi', '--mode', words[0],
                    '--op', *words[1:])
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *exception):
        for process in self.processes:
            process.kill()
            process.wait()


class Steps:
    """The steps, and what they hand on; the docstrings are what is printed"""

    def __init__(self):
        self.guest = Guest()
        self.debian = self.before = self.debian_drivers = None
        self.stock = self.stock_backup = None

    @staticmethod
    def _need_system():
        if not HAS_SYSTEM:
            raise Skipped('these packages have no qemu-system')

    @staticmethod
    def _upgrade(folder):
        """apt upgrade, with our repository among the package sources"""
        with open(SOURCES_LIST, 'w', encoding='utf-8') as f:
            f.write(f'deb [trusted=yes] file:{REPOSITORY}/{folder} ./\n')
        run('apt-get', 'update')
        run('apt-get', 'upgrade')

    def _expect_ours(self, end):
        """All packages of the source are ours, and no other was touched."""
        now = versions()
        expect(now.keys() == self.debian.keys(),
               f'packages: {sorted(now)}, before {sorted(self.debian)}')
        for name, version in now.items():
            wanted = (f'{self.debian[name]}+seqcache' if name in OURS
                      else self.debian[name])
            expect(version.startswith(wanted) and
                   (name not in OURS or version.endswith(end)),
                   f'{name} {version}')

    def install_debian(self):
        """Debian's own packages are installed"""
        run('apt-get', 'upgrade')
        run('apt-get', 'install', '--no-install-recommends', *OURS, *TOOLS,
            *(LIBVIRT if HAS_SYSTEM else []))
        os.makedirs(WORK)
        make_files_image(SOURCE, IMAGE_MIB * 3 // 4, IMAGE_MIB)
        self.debian = versions()
        expect('seqcache' not in qemu_img('--version'), 'it is ours')
        self.before = files()
        self.debian_drivers = drivers()
        self.stock = convert_requests()
        return f'{self.stock["writes"]} writes, {self.stock["reads"]} reads'

    def guest_of_debian(self):
        """libvirt starts a guest with Debian's qemu, and makes a backup"""
        self._need_system()
        self.guest.start()
        expect('seqcache' not in self.guest.version(), self.guest.version())
        self.stock_backup = self.guest.backup()
        return f'{self.stock_backup["writes"]} writes'

    def upgrade_to_ours(self):
        """apt upgrade takes ours, while the guest runs"""
        self._upgrade('now')
        self._expect_ours('')
        expect('seqcache' in qemu_img('--version'), qemu_img('--version'))

    def guest_survives(self):
        """the guest of before goes on, and makes a backup"""
        self._need_system()
        try:
            expect('seqcache' not in self.guest.version(), self.guest.version())
            self.guest.backup()
        finally:
            self.guest.stop()

    def convert(self):
        """convert -c -t none writes full clusters"""
        found = convert_requests()
        expect(found['writes'] * 4 < self.stock['writes'] and
               found['reads'] * 4 < self.stock['reads'],
               f'{found}, with Debian\'s {self.stock}')
        return f'{found["writes"]} writes, {found["reads"]} reads'

    def same_drivers(self):
        """what Debian's packages can open, ours can, and two filters more"""
        expect(drivers() == self.debian_drivers | {'seqcache', 'cacheextents'},
               f'different: {drivers() ^ self.debian_drivers}')

    def read_servers(self):
        """the modules iscsi and curl read from servers"""
        with Servers():
            for url in (f'iscsi://127.0.0.1:{ISCSI_PORT}/{ISCSI_TARGET}/1',
                        f'http://127.0.0.1:{HTTP_PORT}/source.img'):
                qemu_img('compare', '-q', '-f', 'raw', '-F', 'raw', SOURCE, url)

    def own_errors(self):
        """the modules rbd, nfs and ssh are loaded: the errors are their own"""
        for url, error in (
                ('rbd:pool/image:mon_host=127.0.0.1:client_mount_timeout=1',
                 r'error connecting'),
                ('nfs://127.0.0.1:1/export/image', r'[Ff]ailed to mount nfs'),
                ('ssh://127.0.0.1:1/image', r'[Ff]ailed to connect')):
            try:
                qemu_img('info', url)
            except Failed as e:
                text = str(e).partition('\n')[2]
                expect(re.search(error, text) and 'Unknown' not in text, text)
            else:
                raise Failed(f'{url} was opened')

    def backup(self):
        """libvirt starts a guest with ours, and a backup writes full clusters"""
        self._need_system()
        self.guest.start()
        expect('seqcache' in self.guest.version(), self.guest.version())
        found = self.guest.backup()
        expect(found['writes'] * 2 < self.stock_backup['writes'],
               f'{found}, with Debian\'s {self.stock_backup}')
        return f'{found["writes"]} writes'

    def upgrade_again(self):
        """apt upgrade takes a later one of ours, while the guest runs"""
        self._upgrade('later')
        self._expect_ours('.1')

    def backup_again(self):
        """a backup before the guest is restarted, and after"""
        self._need_system()
        writes = [self.guest.backup()['writes']]
        self.guest.stop()
        self.guest.start()
        writes.append(self.guest.backup()['writes'])
        self.guest.stop()
        expect(max(writes) * 2 < self.stock_backup['writes'], f'{writes} writes')

    def downgrade(self):
        """apt goes back to Debian's, which reads what ours wrote"""
        os.unlink(SOURCES_LIST)
        run('apt-get', 'update')
        run('apt-get', 'install', '--allow-downgrades',
            *(f'{name}={version}' for name, version in self.debian.items()
              if name in OURS))
        expect(versions() == self.debian, f'{versions()}')
        expect('seqcache' not in qemu_img('--version'), qemu_img('--version'))
        for path in glob.glob(f'{WORK}/*.qcow2'):
            verify(SOURCE, path)
        if HAS_SYSTEM:
            self.guest.start()
            expect('seqcache' not in self.guest.version(),
                   self.guest.version())
            self.guest.stop()

    def nothing_left(self):
        """nothing is left behind: each file is as it was"""
        if self.guest.daemon:
            self.guest.daemon.terminate()
            self.guest.daemon.wait()
        after = files()
        # What libvirt was told for this check
        different = sorted(path for path in {*self.before, *after}
                           if self.before.get(path) != after.get(path) and
                           path != '/etc/libvirt/qemu.conf')
        expect(not different, '\n'.join(different))


def main():
    steps = Steps()
    counts = {'passed': 0, 'failed': 0, 'skipped': 0}
    for name, step in vars(Steps).items():
        if name.startswith('_'):
            continue
        begin = time.monotonic()
        try:
            note = getattr(steps, name)()
            outcome = 'passed'
        except Skipped as e:
            note, outcome = str(e), 'skipped'
        except (Failed, OSError, subprocess.SubprocessError, KeyError,
                TypeError) as e:
            note, outcome = str(e), 'failed'
        counts[outcome] += 1
        print(f'{outcome}: {step.__doc__} ({time.monotonic() - begin:.0f} s)'
              f'{": " if note else ""}{note or ""}', flush=True)
    print(', '.join(f'{n} {what}' for what, n in counts.items()
                    if n or what != 'skipped'))
    sys.exit(1 if counts['failed'] else 0)


if __name__ == '__main__':
    main()
