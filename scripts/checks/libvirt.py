# SPDX-License-Identifier: GPL-2.0-or-later
"""
Kind storage: the libvirt of this system makes backups of a guest that runs.

libvirt runs in a mount namespace of its own, with empty folders where it keeps
its configuration and state. In push mode libvirt makes the qcow2 image, which it
does not compress; in pull mode the backup is an export, and "qemu-img convert -c"
copies it.
"""

import contextlib
import glob
import os
import shutil
import subprocess
import tempfile

from lab import LIBVIRT_QEMU_CONF, Failed, libvirt_guest, wait_for
from . import runner, storage
from .store_base import end, run
from .stores import Device, Iscsi

FOLDERS = ' '.join(f'/{where}/libvirt' for where in (
    'etc', 'run', 'var/lib', 'var/cache', 'var/log'))
# Its user is only made by a package that also starts it
START = f"""
for folder in {FOLDERS}; do
    mkdir -p $folder && mount -t tmpfs none $folder || exit 1
done
cp qemu.conf /etc/libvirt/
for file in passwd group; do
    cp /etc/$file .
    echo 'libvirt-qemu:x:64055:64055::/nonexistent:/bin/false' >> $file
    mount --bind $file /etc/$file || exit 1
done
exec "$1"
"""
PUSH = """<domainbackup mode='push'>
  <disks><disk name='vda' type='block'>
    <driver type='qcow2'/><target dev='{device}'/>
  </disk></disks>
</domainbackup>
"""
PULL = """<domainbackup mode='pull'>
  <server transport='unix' socket='{folder}/export'/>
  <disks><disk name='vda' type='file'>
    <scratch file='{folder}/scratch'/>
  </disk></disks>
</domainbackup>
"""


class Libvirt(storage.Stored):
    """Its stores are a disk with blocks of 4 KiB and an iSCSI LUN"""

    def __init__(self):
        super().__init__('libvirt')
        self.folder = ''
        self.daemon = None

    def virsh(self, *words):
        return run('nsenter', '-m', '-t', str(self.daemon.pid), 'virsh', '-q',
                   *words)

    def define(self, text):
        """The path of an XML file"""
        path = os.path.join(self.folder, 'definition.xml')
        with open(path, 'w', encoding='utf-8') as f:
            f.write(text)
        return path

    def start(self, program, emulator):
        """Start libvirt and the guest"""
        with open(os.path.join(self.folder, 'qemu.conf'), 'w',
                  encoding='utf-8') as f:
            f.write(LIBVIRT_QEMU_CONF)
        with open(self.log, 'ab') as log:
            self.daemon = subprocess.Popen(
                ['unshare', '-m', 'sh', '-c', START, 'sh', program],
                cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log,
                stderr=log, start_new_session=True)

        def answers():
            if self.daemon.poll() is not None:
                raise Failed(f'{program} ended')
            with contextlib.suppress(Failed):
                self.virsh('list')
                return True

        wait_for(answers, program)
        # Its own, as it locks it, and the tests of other stores run beside
        disk = shutil.copy(storage.source(), os.path.join(self.folder, 'disk'))
        self.virsh('create', self.define(
            libvirt_guest('guest', emulator, disk)))

    def push(self):
        """libvirt makes a qcow2 image on a disk with blocks of 4 KiB"""
        self.virsh('backup-begin', 'guest',
                   self.define(PUSH.format(device=self.store.path)))
        wait_for(lambda: 'None' in self.virsh('domjobinfo', 'guest'),
                 'the backup', 300)
        self.verify()
        return 'compared and checked'

    def pull(self):
        """convert -c from libvirt's export to an image on an iSCSI LUN"""
        self.virsh('backup-begin', 'guest',
                   self.define(PULL.format(folder=self.folder)))
        found = {side: self.convert_by(
            cache, origin=f'nbd+unix:///vda?socket={self.folder}/export')
                 for side, cache in (('off', 0), ('default', None))}
        self.virsh('domjobabort', 'guest')
        text = self.note(*storage.COLUMNS[:2], **found)
        self.judge(text, **found)
        return text

    def run_steps(self):
        for step, make in ((Libvirt.push, Device),
                           (Libvirt.pull, lambda f: Iscsi(f, 4096))):
            with tempfile.TemporaryDirectory(dir=self.folder) as folder, \
                 make(folder) as self.store:
                self.run_step(step)

    def run(self):
        program = shutil.which('virtqemud') or shutil.which('libvirtd')
        emulators = [path for folder in (runner.BUILD, f'{runner.TOP}/build')
                     for path in glob.glob(f'{folder}/qemu-system-x86_64')]
        absent = [name for name, found in (
            ('root', os.getuid() == 0), ('libvirt', program),
            ('virsh', shutil.which('virsh')), ('tgtd', shutil.which('tgtd')),
            ('driver iscsi', 'iscsi' in storage.drivers()),
            ('build/qemu-system-x86_64', emulators)) if not found]
        if absent:
            self.add('skip', f'there is no {", ".join(absent)}')
            return
        with open(self.log, 'w', encoding='utf-8'), \
             tempfile.TemporaryDirectory(dir=storage.FOLDER) as self.folder:
            try:
                self.start(program, emulators[0])
                self.run_steps()
            except Failed as e:
                self.add('fail', str(e))
            finally:
                with contextlib.suppress(Failed):
                    self.virsh('destroy', 'guest')
                end(self.daemon)
        storage.TABLE[self.name] = self.texts


def libvirt_tests():
    return [Libvirt()] if 'libvirt' in storage.names() else []
