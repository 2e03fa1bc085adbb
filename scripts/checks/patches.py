# SPDX-License-Identifier: GPL-2.0-or-later
"""
What is wrong with patches/, as far as that can be told without any source of
QEMU: a part of the kind scripts.
"""

import os
import re

import patchset

TRAILERS = 'Costs', 'Test', 'Needs', 'Needed-By'
MOST_OVERRIDES = 8
LONGEST_TITLE = 75


def wrong_claims(version, patches):
    """Each file of ours is added by one patch."""
    files = patchset.our_files(version)
    claims = [f for p in patches for f in p.adds]
    for path in sorted(set(files) - set(claims)):
        yield f'{path}: no patch adds it'
    for path in sorted(set(claims)):
        if path not in files:
            yield f'{path}: a patch adds it, and it is not there'
        if claims.count(path) > 1:
            yield (f'{path}: several patches add it: ' +
                   ' '.join(p.name for p in patches if path in p.adds))


def wrong_order(patches):
    """A topic is in one piece, and what a patch needs comes before it."""
    names = [p.name for p in patches]
    # What another version needs is not missed in this one
    known = {name_of(p) for v in patchset.versions()
             for p in patchset.series(v)}
    topics = [p.topic for p in patches]
    for i, topic in enumerate(topics):
        if topic in topics[:i] and topics[i - 1] != topic:
            yield f'{names[i]}: its topic is not in one piece'
    for i, patch in enumerate(patches):
        for needed in patch.names_in('Needs'):
            if needed in names[i:]:
                yield f'{patch.name} needs {needed}, which comes later'
            elif needed not in known:
                yield f'{patch.name} needs {needed}, which is not there'
        for by in patch.names_in('Needed-By'):
            if by in names[:i + 1]:
                yield f'{patch.name} is needed by {by}, which comes earlier'
            elif by not in known:
                yield f'{patch.name} is needed by {by}, which is not there'


def wrong_trailers(patches):
    for patch in patches:
        for name in TRAILERS:
            if not patch.trailer(name):
                yield f'{patch.name} has no "{name}:"'


def wrong_since(patches):
    """New things of QAPI are in QEMU's next release."""
    wanted = patchset.run('scripts/series', '--next').strip()
    for patch in patches:
        for line in re.findall(r'^\+.*\bsince:? +([0-9.]*[0-9])', patch.diff,
                               re.I | re.M):
            if line != wanted:
                yield f'{patch.name} says "since {line}", not {wanted}'


def name_of(path):
    """TOPIC/NAME of a patch's file"""
    return '/'.join(path.removesuffix('.patch').split('/')[-2:])


def wrong_files():
    """What is in patches/ and used by no version"""
    used = {p for v in patchset.versions()
            for p in patchset.series(v, test=True)}
    # A patch that each version overrides says what it is for
    used |= {f'patches/{name_of(p)}.patch' for p in used}
    for folder, _, names in os.walk(patchset.PATCHES):
        for name in names:
            path = os.path.relpath(os.path.join(folder, name), patchset.TOP)
            if name.endswith('.patch') and path not in used:
                yield f'{path}: no version uses it'


def wrong(version):
    """All that is wrong for a version"""
    paths = patchset.series(version, test=True)
    patches = [patchset.Patch.parse(p) for p in paths]
    yield from wrong_claims(version, patches)
    yield from wrong_order([p for p in patches if p.topic != 'test'])
    yield from wrong_trailers([p for p in patches if p.topic != 'test'])
    yield from wrong_since(patches)
    overrides = [p for p in paths if p.startswith('patches/overrides/')]
    if len(overrides) > MOST_OVERRIDES:
        yield f'{len(overrides)} overrides; at most {MOST_OVERRIDES}'
    for patch, path in zip(patches, paths):
        if patch.format() != patchset.read(os.path.join(patchset.TOP, path)):
            yield f'{path} is not as scripts/save writes it'


def wrong_titles():
    """The subjects of cover letters that are too long"""
    for topic, comment in patchset.topic_comments(
            patchset.read(patchset.SERIES)).items():
        title = patchset.topic_title(topic, comment)
        if len(title) > LONGEST_TITLE:
            yield (f'patches/series: "{title}" has {len(title)} characters; at'
                   f' most {LONGEST_TITLE}')


def run():
    """(name, what is wrong) of each check"""
    for version in patchset.versions():
        yield f'the patches for {version}', sorted(set(wrong(version)))
    yield 'the files of patches/', sorted(wrong_files())
    yield "the topics' titles", sorted(wrong_titles())
