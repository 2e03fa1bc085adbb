# SPDX-License-Identifier: GPL-2.0-or-later
"""
The patches and our own files, and git repositories that have one commit for
each patch: what scripts/tree, save, export, check-series and
checks/patches.py share.

  python3 scripts/patchset.py VERSION    print our files that belong into that version

A patch file is "Subject: ...", a blank line, text, trailers, a blank line and
git's diff, or no diff at all if the patch only adds files. Its new files are
not in it; the trailer "Adds:" names them. In a repository the commit has these
files, no "Adds:", and "Patch: TOPIC/NAME" as its last trailer.
"""

import glob
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import textwrap

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PATCHES = os.path.join(TOP, 'patches')
SERIES = os.path.join(PATCHES, 'series')
TEST_SERIES = os.path.join(PATCHES, 'test', 'series')
# The commit that has our files which no patch adds
UNCLAIMED = 'unclaimed'
NAME = re.compile(r'[a-z0-9-]+/[A-Za-z0-9._-]+')
ADDS = re.compile(r'^Adds:((?:.*\n?)(?:[ \t].*\n?)*)', re.M)
TRAILER = re.compile(r'[A-Z][A-Za-z-]*: ')


def end_cleanly():
    """Let a signal that ends the script remove its temporary folders."""
    for number in signal.SIGTERM, signal.SIGHUP:
        signal.signal(number, lambda n, _: sys.exit(128 + n))


def run(*command, cwd=TOP, stdin=None, **env):
    """The output of a command; its failure ends the script, and the end of the
    script ends it."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=cwd, env={**os.environ, **env},
                          stdin=None if stdin is None else pipe, stdout=pipe,
                          encoding='utf-8', errors='surrogateescape') as process:
        try:
            output = process.communicate(stdin)[0]
        except BaseException:
            # It may have temporary folders, too
            process.terminate()
            raise
    if process.returncode:
        sys.exit(process.returncode)
    return output


def read(path):
    with open(path, encoding='utf-8', errors='surrogateescape',
              newline='') as f:
        return f.read()


def versions():
    return run('scripts/series', '--versions').split()


def series(version, test=False):
    """The files of the patches for a version, in order"""
    return run('scripts/series', *(['--test'] if test else []),
               version).split()


def version_in_use():
    """The version that VERSION and QEMU_SRC choose"""
    return run('scripts/version').strip()


def our_files(version=None):
    """Our files that belong into QEMU's tree, or into that version's: not those
    that only a patch for other versions adds"""
    files = run('scripts/series', '--files').split()
    if version is None:
        return files
    every = glob.glob(f'{PATCHES}/**/*.patch', recursive=True)
    others = added(os.path.relpath(p, TOP) for p in every) - \
        added(series(version, test=True))
    return [f for f in files if f not in others]


def added(patches):
    """The files that the "Adds:" of these patch files name"""
    return {f for p in patches for f in Patch.parse(p).adds}


def suffix(version=None):
    """What the names of a version's folders end in; of the one in use"""
    if version is None:
        return run('scripts/version', '--suffix').strip()
    return '' if version == versions()[0] else f'-{version}'


def build_folder(name=''):
    """The default build of the version in use, or that of another environment"""
    return os.path.join(TOP, f'build{name and "-"}{name}{suffix()}')


def source(version):
    """The folder with the unpacked source of that version; QEMU_SRC may name it,
    or that of another version"""
    env = {**os.environ, 'VERSION': version}
    if version != version_in_use():
        env.pop('QEMU_SRC', None)
    if subprocess.run(['scripts/prepare', '--source-only'], cwd=TOP, env=env,
                      check=False, stdout=sys.stderr).returncode:
        sys.exit(1)
    return os.path.join(TOP, f'cache/source{suffix(version)}')


def is_trailers(paragraph):
    lines = paragraph.splitlines()
    return bool(lines and TRAILER.match(lines[0])) and all(
        TRAILER.match(line) or line[0] in ' \t' for line in lines)


def add_trailer(text, trailer):
    last = text.rpartition('\n\n')[2]
    return f'{text}{chr(10) if is_trailers(last) else chr(10) * 2}{trailer}'


def state():
    """{path: digest} of all that scripts/save may write"""
    found = {}
    paths = our_files()
    for folder, _, names in os.walk(PATCHES):
        paths += [os.path.relpath(os.path.join(folder, n), TOP)
                  for n in names]
    for path in paths:
        found[path] = digest(os.path.join(TOP, path))
    return found


def digest(path):
    """Of a file's contents and mode"""
    with open(path, 'rb') as f:
        return digest_of(f.read(), os.access(path, os.X_OK))


def digest_of(contents, executable=False):
    return hashlib.sha1(contents + bytes([executable])).hexdigest()


class Patch:
    """One patch; text is the subject, the text and the trailers."""

    def __init__(self, name, text, adds, diff):
        self.name = name
        self.text = text
        self.adds = adds
        self.diff = diff

    @classmethod
    def parse(cls, path):
        """The patch in a file, which is below TOP"""
        text = read(os.path.join(TOP, path))
        begin = re.search('^diff --git ', text, re.M)
        begin = begin.start() if begin else len(text)
        diff = text[begin:]
        text = text[:begin]
        if not text.startswith('Subject: '):
            sys.exit(f'{path}: expected "Subject: " at its beginning')
        adds = [f for m in ADDS.findall(text) for f in m.split()]
        # A subject may be folded, as in a mail
        text = re.sub(r'\n[ \t]+', ' ', text.partition('\n\n')[0]) + \
            ''.join(text.partition('\n\n')[1:])
        text = ADDS.sub('', text).removeprefix('Subject: ').strip()
        name = '/'.join(path.removesuffix('.patch').split('/')[-2:])
        return cls(name, text, adds, diff)

    @property
    def topic(self):
        return self.name.partition('/')[0]

    def trailer(self, name):
        """The value of a trailer, on one line, or None"""
        found = re.search(rf'^{name}:(.*(?:\n[ \t].*)*)', self.text, re.M)
        return ' '.join(found[1].split()) if found else None

    def format(self):
        text = self.text
        if self.adds:
            text = add_trailer(text, textwrap.fill(
                'Adds: ' + ' '.join(sorted(self.adds)), 78,
                subsequent_indent=' ', break_long_words=False,
                break_on_hyphens=False))
        return f'Subject: {text}\n{chr(10) + self.diff if self.diff else ""}'

    def message(self):
        """The message of its commit"""
        return add_trailer(self.text, f'Patch: {self.name}') + '\n'

    def names_in(self, trailer):
        """The names of patches in this trailer"""
        words = re.split(r'[\s,;]+', self.trailer(trailer) or '')
        return [w for w in (w.rstrip('.').removesuffix('.patch')
                            for w in words) if NAME.fullmatch(w)]


def parse_series(text):
    """({name: comment lines before it}, [(name, versions)])"""
    blocks, entries, block = {}, [], []
    for line in text.splitlines():
        if line.startswith('#') or not line.strip():
            block.append(line)
            continue
        name, _, mark = line.partition('.patch')
        blocks[name], block = block, []
        entries.append((name, mark.strip(' []').split()))
    blocks[None] = block
    return blocks, entries


def topic_title(topic, comment):
    """The subject of a topic's cover letter: the comment's first sentence"""
    title = ' '.join(comment.split()).partition('. ')[0].rstrip('.')
    return f'{topic}: {title}' if title else topic


def topic_comments(text):
    """{topic: text}: the comments before the first patches of topics"""
    blocks, entries = parse_series(text)
    found = {}
    for name, _ in entries:
        # What is before an empty line is not about the topic
        text = '\n'.join(blocks[name]).strip('\n').rpartition('\n\n')[2]
        text = re.sub('^# ?', '', text, flags=re.M).strip()
        topic = name.partition('/')[0]
        found.setdefault(topic, text.removeprefix(f'{topic}:').strip())
    return found


class Repo:
    """A git repository with one commit for each patch, on a source's commit"""

    # No configuration of the user's but who it is changes what we write
    CONFIG = {'core.autocrlf': 'false', 'core.hooksPath': '/dev/null',
              'core.quotePath': 'false', 'commit.gpgSign': 'false',
              'gc.auto': '0', 'advice.detachedHead': 'false'}

    def __init__(self, folder):
        self.folder = os.path.abspath(folder)

    def git(self, *args, **kwargs):
        return run('git', *args, cwd=self.folder, **kwargs)

    def succeeds(self, *args, stdin=None):
        return subprocess.run(['git', *args], cwd=self.folder, check=False,
                              input=stdin, capture_output=True,
                              encoding='utf-8', errors='surrogateescape'
                              ).returncode == 0

    def create(self, tree):
        """Copy a source to here, as the first commit."""
        os.makedirs(self.folder)
        self.git('init', '-q')
        for name, value in self.CONFIG.items():
            self.git('config', name, value)
        run('rsync', '-a', '--exclude=/roms/*/', f'{tree}/', f'{self.folder}/')
        self.git('add', '-fA')
        full = read(os.path.join(tree, 'VERSION')).strip()
        self.git('commit', '-q', '-m', f'QEMU {full}')

    def note_state(self, noted):
        """Note what scripts/save would find here if nothing changed."""
        with open(os.path.join(self.folder, '.git/seqcache-state'), 'w',
                  encoding='utf-8') as f:
            json.dump(noted, f)

    def noted_state(self):
        return json.loads(read(os.path.join(self.folder,
                                            '.git/seqcache-state')))

    def is_complete(self):
        return self.succeeds('config', 'seqcache.complete')

    def set_complete(self):
        self.git('config', 'seqcache.complete', 'true')

    def add(self, files):
        """Add files of ours, as they are now."""
        run('rsync', '-a', '--no-times', '--files-from=-', f'{TOP}/',
            f'{self.folder}/', stdin='\n'.join(files))
        self.git('add', '-f', '--pathspec-from-file=-', stdin='\n'.join(files))

    def apply(self, patch, message=None):
        """Apply a patch without fuzz, and commit it; whether this succeeds."""
        if patch.diff and not self.succeeds('apply', '--index', '-',
                                            stdin=patch.diff):
            return False
        missing = [f for f in patch.adds
                   if not os.path.isfile(os.path.join(TOP, f))]
        if missing:
            sys.exit(f'{patch.name} adds {" ".join(missing)}, which is not'
                     ' there.')
        if patch.adds:
            self.add(patch.adds)
        self.git('commit', '-q', '--allow-empty', '--cleanup=verbatim', '-F',
                 '-', stdin=message or patch.message())
        return True

    def commits(self, end='HEAD'):
        """[(commit, name or None, message without name)] after the first"""
        log = self.git('log', '--reverse', '--format=%H%n%B%x00', end)
        found = []
        for entry in log.split('\0\n')[1:]:
            commit, _, message = entry.partition('\n')
            if commit:
                message = message.strip('\n') + '\n'
                names = re.findall(r'^Patch: *(\S+) *\n', message, re.M)
                text = re.sub(r'^Patch: .*\n', '', message, flags=re.M)
                found.append((commit, names[-1] if names else None,
                              text.strip()))
        return found

    def paths(self, commit):
        return set(self.git('ls-tree', '-rz', '--name-only',
                            commit).split('\0')) - {''}

    def diff(self, commit, paths):
        """What a commit changes in these, as patch files have it"""
        if not paths:
            return ''
        diff = self.git('diff-tree', '-p', '--no-renames', '--no-color',
                        '--no-ext-diff', '--no-textconv', '--unified=3',
                        '--inter-hunk-context=0', '--diff-algorithm=myers',
                        '--indent-heuristic', '--src-prefix=a/',
                        '--dst-prefix=b/', f'{commit}^', commit, '--',
                        *sorted(paths))
        return re.sub(r'^index .*\n', '', diff, flags=re.M)


if __name__ == '__main__':
    if len(sys.argv) != 2 or sys.argv[1] not in versions():
        sys.exit(f'usage: {sys.argv[0]} VERSION, one of: '
                 f'{" ".join(versions())}')
    print(*our_files(sys.argv[1]), sep='\n')
