# Images: their contents, the options of their nodes, and what must be in them
#
# SPDX-License-Identifier: GPL-2.0-or-later

import json
import os
import random
from typing import Any, Callable, Dict, Iterable, List, Optional, Tuple, Union

import iotests
from iotests import file_path, qemu_img, qemu_img_check, qemu_img_create


KiB = 1024
MiB = 1024 * KiB

# The options of a node, as blockdev-add takes them; a child may be a name
Node = Dict[str, Any]
NodeRef = Union[str, Node]


# Contents

def random_bytes(size: int, seed: int) -> bytes:
    '''Data that does not compress'''
    return random.Random(seed).getrandbits(8 * size).to_bytes(size, 'little')


def half_random_bytes(size: int, seed: int) -> bytes:
    '''Data that compresses to a little more than half of its size'''
    return random_bytes((size + 1) // 2, seed).hex().encode('ascii')[:size]


def mixed_bytes(size: int, seed: int) -> bytes:
    '''Pieces of very different lengths that compress very differently'''
    rand = random.Random(seed)
    kinds: List[Callable[[int], bytes]] = [
        lambda n: b'\0' * n,
        lambda n: b'\xff' * n,
        lambda n: (b'All work and no play. ' * (n // 22 + 1))[:n],
        lambda n: random_bytes(n, rand.getrandbits(32)),
        lambda n: half_random_bytes(n, rand.getrandbits(32)),
    ]
    data = bytearray()
    while len(data) < size:
        data += rand.choice(kinds)(rand.randrange(1, 200 * KiB))
    return bytes(data[:size])


def write_file(path: str, data: Union[bytes, bytearray],
               offset: int = 0) -> None:
    '''A new file with @data; or, with @offset, change a file there'''
    mode = 'r+b' if offset else 'wb'
    with open(path, mode) as f:
        f.seek(offset)
        f.write(data)


def sparse_file(path: str, size: int) -> None:
    '''A new file of @size bytes, in which there is nothing'''
    with open(path, 'wb') as f:
        f.truncate(size)


def read_file(path: str) -> bytes:
    '''All that is in the file'''
    with open(path, 'rb') as f:
        return f.read()


def create_qcow2(path: str, size: Union[int, str, None] = None,
                 backing: str = '', backing_fmt: str = 'qcow2',
                 **options: Any) -> None:
    '''A new image.  Without @size it has that of its backing file.'''
    args = ['-b', backing, '-F', backing_fmt] if backing else []
    if options:
        args += ['-o', ','.join(f'{k}={v}' for k, v in options.items())]
    qemu_img_create('-f', 'qcow2', *args, path,
                    *([] if size is None else [str(size)]))


def make_disk(path: str, size: int, extents: int) -> None:
    '''A file in which that many pieces of 64 KiB are data, the rest holes'''
    iotests.try_remove(path)
    sparse_file(path, size)
    step = size // extents // (64 * KiB) * 64 * KiB
    assert step >= 128 * KiB
    with open(path, 'r+b') as f:
        for i in range(extents):
            f.seek(i * step)
            f.write(random_bytes(64 * KiB, i))


# Options

def opts(**kwargs: Any) -> str:
    '''Options for --image-opts; "__" stands for "." and "_" for "-"'''
    return ','.join(key.replace('__', '.').replace('_', '-') + '=' +
                    str(value) for key, value in kwargs.items())


def as_json(node: Node) -> str:
    """A file name for a node"""
    return 'json:' + json.dumps(node)


def flat_opts(node: Node) -> str:
    '''The options of a node, as --image-opts takes them'''
    def flatten(prefix: str, value: Any) -> List[str]:
        items: Iterable[Tuple[Any, Any]]
        if isinstance(value, dict):
            items = value.items()
        elif isinstance(value, list):
            items = enumerate(value)
        else:
            if isinstance(value, bool):
                value = 'on' if value else 'off'
            return [f'{prefix}={value}']
        return [option for key, child in items
                for option in flatten(f'{prefix}.{key}' if prefix
                                      else str(key), child)]

    return ','.join(flatten('', node))


def dashes(kwargs: Node) -> Node:
    '''With the names that QMP has: a dash for each underscore'''
    return {key.replace('_', '-'): value for key, value in kwargs.items()}


def file_node(path: str, direct: Optional[bool] = None,
              **kwargs: Any) -> Dict[str, Any]:
    '''A file node; uses the cache mode of the test run unless told'''
    if direct is None:
        direct = iotests.cachemode in ('none', 'directsync')
    return {'driver': 'file', 'filename': path, 'aio': iotests.aiomode,
            'cache': {'direct': direct}, **dashes(kwargs)}


def qcow2_node(name: str, file: Union[str, Dict[str, Any]],
               cache: Optional[Any] = None, **kwargs: Any) -> Dict[str, Any]:
    '''@cache: compressed-cache-size; None leaves it to the default'''
    node = {'driver': 'qcow2', 'node-name': name, 'file': file,
            **dashes(kwargs)}
    if cache is not None:
        node['compressed-cache-size'] = cache
    return node


def raw_node(file: NodeRef, **kwargs: Any) -> Node:
    '''A raw node above @file'''
    return {'driver': 'raw', 'file': file, **dashes(kwargs)}


def seqcache_node(file: NodeRef, name: str = 'filter', **kwargs: Any) -> Node:
    '''The filter seqcache above @file'''
    return {'driver': 'seqcache', 'node-name': name, 'file': file,
            **dashes(kwargs)}


def cacheextents_node(file: NodeRef, **kwargs: Any) -> Node:
    '''The filter cacheextents above @file'''
    return {'driver': 'cacheextents', 'file': file, **dashes(kwargs)}


# Results

def guest_bytes(image: str, *args: str, offset: int = 0,
                size: int = -1) -> bytes:
    '''What the guest sees of a qcow2 image; @args are for qemu-img convert'''
    path = file_path('guest-bytes')
    qemu_img('convert', '-f', 'qcow2', '-O', 'raw', *args, image, path)
    with open(path, 'rb') as f:
        f.seek(offset)
        data = f.read(size)
    os.remove(path)
    return data


def map_output(node: Union[str, Node]) -> str:
    '''What qemu-img map says of a node, or of options for --image-opts'''
    out: str = qemu_img('map', '--output=json', '--image-opts',
                        node if isinstance(node, str) else flat_opts(node)
                        ).stdout
    return out


def check_clean(path: str, leaks: bool = False) -> None:
    '''
    qemu-img check finds no errors in a qcow2 image; nor leaks, unless there
    may be @leaks
    '''
    result = qemu_img_check('-f', 'qcow2', path)
    kinds = ['corruptions', 'check-errors'] + ([] if leaks else ['leaks'])
    assert not any(result.get(kind) for kind in kinds), f'{path}: {result}'


def check_no_corruption(path: str) -> None:
    '''qemu-img check finds no errors in a qcow2 image; there may be leaks'''
    check_clean(path, leaks=True)
