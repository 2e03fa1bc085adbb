# SPDX-License-Identifier: GPL-2.0-or-later
"""The rows of scripts/bench about reads of compressed images"""

import glob
import os
import re
import shutil
import subprocess

from bench_convert import files_source
from bench_filter import fio
from bench_report import difference, ratio, value_of
from bench_row import DIRECT, TIMES, Row, direct_file
from lab import (
    BUILD, KIB, MIB, QEMU_IMG, Failed, SlowDisk, StorageDaemon, qemu_img,
    read_whole, run_timed
)

DISK = 'a disk with 2 ms a request'


def compressed_image(bench, folder, mib):
    """A compressed image of files, in the order of convert -c -W"""
    source = files_source(bench, mib)
    path = os.path.join(folder, f'restore-{mib}.qcow2')
    if not os.path.exists(path):
        qemu_img('convert', '-c', '-W', '-f', 'raw', '-O', 'qcow2', '-o',
                 'compression_type=zstd', source, path)
        # Whole blocks of a disk
        os.truncate(path, -(-os.path.getsize(path) // MIB) * MIB)
    return source, path


def image_options(file, cache):
    """file(prefix) are the options of the file child; cache is its size, or None
    for the default."""
    size = '' if cache is None else f',compressed-read-cache-size={cache}'
    return f'driver=qcow2{size},{file("file.")}'


def cached_file(path):
    return lambda prefix: f'{prefix}driver=file,{prefix}filename={path}'


class ReadRow(Row):
    """Work on a compressed image of mib MiB"""

    def __init__(self, name, title, figures, sides, mib, quick_mib, repeats=3):
        super().__init__(name, title, figures, repeats)
        self.sides = sides
        self.mib = mib, quick_mib
        self.source = self.path = None

    def folder(self, bench):
        return bench.tmpfs

    def prepare(self, bench):
        self.source, self.path = compressed_image(
            bench, self.folder(bench), bench.pick(*self.mib))
        read_whole(self.path)

    def on_disk(self, side, work, block=4096):
        """work(options of the file child) with the image on a slow disk"""
        with SlowDisk(['file', self.path], '2ms', block) as disk:
            result = work(disk.options)
        return dict(result, reads=disk.reads, read=disk.read,
                    requests=disk.reads)


def restore(bench, options, source=None):
    """Convert to a raw file on a tmpfs; compare it with the source."""
    path = os.path.join(bench.tmpfs, 'restored.raw')
    took = run_timed([QEMU_IMG, 'convert', '-O', 'raw', '--image-opts',
                      options, path])
    if source:
        qemu_img('compare', '-q', '-f', 'raw', '-F', 'raw', source, path)
    os.unlink(path)
    return {m: took[m] for m in TIMES}


class RestoreFromDisk(ReadRow):
    """From a slow disk, and from a tmpfs as the limit"""

    def __init__(self, *args, block, **kwargs):
        super().__init__(*args, sides=['off', 'on', 'tmpfs'], **kwargs)
        self.block = block

    def measure(self, bench, side):
        if side == 'tmpfs':
            return restore(bench, image_options(cached_file(self.path), None))
        return self.on_disk(side, lambda file: restore(
            bench, image_options(file, 0 if side == 'off' else None),
            self.source), self.block)


class RestoreFromFile(ReadRow):
    """From a file with O_DIRECT, and through the page cache"""

    def folder(self, bench):
        return bench.folder

    def measure(self, bench, side):
        def direct(prefix):
            return direct_file(self.path, prefix)

        if side == 'page cache':
            return restore(bench, image_options(cached_file(self.path), None))
        return restore(bench, image_options(direct, 0 if side == 'off' else
                                            None))


class SmallReads(ReadRow):
    """Sequential reads of one size, one at a time, by qemu-img bench"""

    def measure(self, bench, side):
        size = 4 * KIB if '4 KiB' in side else 64 * KIB
        options = image_options(cached_file(self.path),
                                '16M' if side.startswith('on') else 0)
        took = run_timed([QEMU_IMG, 'bench', '-d', '1', '-s', str(size), '-c',
                          str(bench.pick(*self.mib) * MIB // size),
                          '--image-opts', options])
        return {m: took[m] for m in TIMES}


class RandomReads(ReadRow):
    """4 KiB reads anywhere, through an NBD export, by fio"""

    def measure(self, bench, side):
        def work(file):
            node = image_options(file, 0 if side == 'off' else None)
            with StorageDaemon(node) as daemon:
                # No two of them in order
                return fio(daemon.uri, '--rw=randread', '--ba=64k',
                           f'--size={bench.pick(*self.mib)}M',
                           f'--io_size={bench.pick(4, 1)}M')

        return self.on_disk(side, work)


class Nbdcopy(ReadRow):
    """A client with four connections, and a conversion"""

    def measure(self, bench, side):
        options = image_options(cached_file(self.path),
                                0 if 'off' in side else '16M')
        if side.startswith('convert'):
            return restore(bench, options)
        path = os.path.join(bench.tmpfs, 'restored.raw')
        with StorageDaemon(options) as daemon:
            took = run_timed(['nbdcopy', '--connections=4', daemon.uri, path])
            took['cpu'] += daemon.cpu()
            took['memory'] = daemon.peak_memory()
        if os.path.getsize(path) != os.path.getsize(self.source):
            raise Failed('nbdcopy has not copied everything')
        os.unlink(path)
        return {m: took[m] for m in TIMES}


# What the guest does: a part of what a boot does
INIT = """#!/bin/sh
/lib/systemd/systemd-udevd --daemon
udevadm trigger
udevadm settle
cat /etc/* /usr/lib/udev/rules.d/* > /dev/null 2>&1
for program in /lib/systemd/systemd-* /usr/sbin/[a-d]* /usr/bin/[a-d]*; do
    timeout 60 $program --version < /dev/null > /dev/null 2>&1
done
echo guest started
poweroff -f -f
"""
INIT_PACKAGES = ['systemd-sysv', 'udev', 'base-files', 'bash', 'dash',
                 'perl-base', 'coreutils', 'util-linux', 'mount', 'kmod']


def query_packages(command, *args):
    return subprocess.run(['dpkg-query', command, *args], text=True, check=True,
                          stdout=subprocess.PIPE).stdout


def package_files(wanted):
    """The files of Debian packages of this machine, and of all they need"""
    needs = {}
    for line in query_packages('-W', '-f', '${Package}:${Pre-Depends},'
                               '${Depends}:${Provides}\n').splitlines():
        line = re.sub(r'\([^)]*\)|:any', '', line)
        name, depends, provides = line.split(':')
        needs.setdefault(name, set()).update(re.findall(r'[^,|\s]+', depends))
        for other in re.findall(r'[^,\s]+', provides):
            needs.setdefault(other, set()).add(name)
    found, new = set(), set(wanted)
    while new:
        found |= new
        new = {n for name in new for n in needs[name] if n in needs} - found
    names = query_packages('-W', '-f', '${Package}\n').split()
    listed = query_packages('-L', *(n for n in names if n in found))
    return {os.path.join(os.path.realpath(os.path.dirname(path)),
                         os.path.basename(path))
            for path in listed.splitlines() if path.startswith('/')
            and not path.startswith('/usr/share/') and os.path.lexists(path)}


def make_system_image(folder, path):
    """An ext4 image that Linux boots from"""
    root = os.path.join(folder, 'system')
    os.mkdir(root)
    files = package_files(INIT_PACKAGES) | {
        '/bin', '/sbin', '/lib', '/lib64', '/dev', '/proc', '/sys', '/run',
        '/tmp', '/etc/passwd', '/etc/group', '/etc/ld.so.cache'}
    for file in sorted(files):
        to = root + file
        os.makedirs(os.path.dirname(to), exist_ok=True)
        if os.path.islink(file) or os.path.isfile(file):
            shutil.copy2(file, to, follow_symlinks=False)
        else:
            os.makedirs(to, exist_ok=True)
    with open(os.path.join(root, 'boot.sh'), 'w', encoding='utf-8') as f:
        f.write(INIT)
    os.chmod(f.name, 0o755)
    subprocess.run(['mke2fs', '-q', '-F', '-t', 'ext4', '-d', root, path,
                    '512M'], stdin=subprocess.DEVNULL, check=True)
    shutil.rmtree(root)


class Boot(ReadRow):
    """A guest whose disk has a compressed backing file on a slow disk"""
    main = 'reads'

    def prepare(self, bench):
        self.source = os.path.join(bench.tmpfs, 'system.raw')
        self.path = os.path.join(bench.tmpfs, 'system.qcow2')
        if not os.path.exists(self.path):
            make_system_image(bench.tmpfs, self.source)
            qemu_img('convert', '-c', '-W', '-f', 'raw', '-O', 'qcow2', '-o',
                     'compression_type=zstd', self.source, self.path)
            os.truncate(self.path, -(-os.path.getsize(self.path) // MIB) * MIB)

    def measure(self, bench, side):
        def work(file):
            backing = image_options(file, 0 if side == 'off' else None)
            # Not KVM: it is of no use for some kernels in a virtual machine
            took = run_timed([
                os.path.join(BUILD, 'qemu-system-x86_64'), '-nodefaults',
                '-display', 'none', '-accel', 'tcg', '-smp', '2', '-m', '512',
                '-kernel', kernel, '-initrd',
                kernel.replace('/vmlinuz-', '/initrd.img-'), '-append',
                'root=/dev/vda rw console=ttyS0 quiet panic=-1 no_timer_check'
                ' init=/boot.sh', '-serial', 'stdio', '-no-reboot',
                '-blockdev', f'node-name=backing,{backing}', '-blockdev',
                f'driver=qcow2,node-name=disk,file.driver=file,file.filename='
                f'{overlay},backing=backing', '-device',
                'virtio-blk-pci,drive=disk'])
            if 'guest started' not in took['output']:
                raise Failed(f'The guest did not boot\n{took["output"]}')
            return {'seconds': took['seconds']}

        kernel = max(glob.glob('/boot/vmlinuz-*'), key=os.path.getmtime)
        overlay = os.path.join(bench.tmpfs, 'overlay.qcow2')
        qemu_img('create', '-q', '-f', 'qcow2', overlay, '512M')
        return self.on_disk(side, work)


ROWS = [
    *(RestoreFromDisk(
        f'read-restore-{block}', f'convert of a compressed image of 512 MiB of'
        f' files from {DISK} and blocks of {block} bytes, zstd',
        [ratio('off', 'on'), value_of('off', 'reads'),
         value_of('on', 'reads', at_most=300),
         ratio('on', 'tmpfs', at_most=1.15),
         difference('on', 'off', 'memory', at_most=18 * MIB)],
        mib=512, quick_mib=64, block=block) for block in (1, 4096)),
    RestoreFromFile(
        'read-restore-file', f'convert of a compressed image of 512 MiB of'
        f' files from {DIRECT}, zstd',
        [ratio('off', 'on'), ratio('on', 'page cache', at_most=1.02),
         difference('on', 'off', 'memory', at_most=18 * MIB)],
        ['off', 'on', 'page cache'], 512, 64, repeats=5),
    SmallReads(
        'read-4k', '64 MiB of a compressed image in sequential reads of 4 KiB'
        ' and of 64 KiB', [ratio('off, 4 KiB', 'on, 64 KiB', 'cpu'),
                           ratio('on, 4 KiB', 'on, 64 KiB', 'cpu',
                                 at_most=2.5)],
        ['off, 4 KiB', 'on, 4 KiB', 'on, 64 KiB'], 64, 16),
    RandomReads(
        'read-random', f'Random reads of 4 KiB of a compressed image on {DISK}',
        [ratio('on', 'off', 'reads', at_most=1.02),
         ratio('on', 'off', 'read', at_most=1.02), ratio('on', 'off')],
        ['off', 'on'], 512, 64),
    Nbdcopy(
        'read-nbdcopy', 'nbdcopy with four connections, and convert, of a'
        ' compressed image of 512 MiB of files in the page cache',
        [ratio('nbdcopy', 'convert', at_most=1.15),
         ratio('nbdcopy', 'nbdcopy, off', 'cpu'),
         ratio('nbdcopy', 'convert', 'cpu')],
        ['nbdcopy, off', 'nbdcopy', 'convert'], 512, 64, repeats=5),
    Boot(
        'boot-backing', f'Boot of a guest whose disk has a compressed backing file'
        f' on {DISK}', [ratio('off', 'on', 'reads', at_least=3),
                        ratio('off', 'on', 'read'), ratio('off', 'on')],
        ['off', 'on'], 512, 512, repeats=1),
]
