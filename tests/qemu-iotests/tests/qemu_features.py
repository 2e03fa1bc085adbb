# What some versions of QEMU lack that tests want
#
# This work is licensed under the terms of the GNU GPL, version 2 or later.
# See the COPYING file in the top-level directory.
#
# SPDX-License-Identifier: GPL-2.0-or-later

import functools
import json
from typing import Any, Dict

import iotests
from iotests import qemu_img, qemu_io


@functools.lru_cache(maxsize=None)
def has_delay() -> bool:
    '''Whether blkdebug can delay requests'''
    node = {'driver': 'blkdebug', 'image': {'driver': 'null-co'},
            'inject-error': [{'event': 'none', 'errno': 0, 'delay-ns': 1}]}
    return qemu_img('info', f'json:{json.dumps(node)}',
                    check=False).returncode == 0


def delay(ms: float) -> Dict[str, Any]:
    '''For a rule of blkdebug's inject-error: succeed, but not at once'''
    rule: Dict[str, Any] = {'errno': 0}
    if has_delay():
        rule['delay-ns'] = int(ms * 1000 * 1000)
    return rule


def skip_without_delay(case: iotests.QMPTestCase) -> None:
    if not has_delay():
        case.case_skip(f'{case.id()}: blkdebug of this QEMU has no delay-ns')


@functools.lru_cache(maxsize=None)
def has_aio_discard() -> bool:
    return 'not found' not in qemu_io('-c', 'help aio_discard',
                                      check=False).stdout


def skip_without_aio_discard(case: iotests.QMPTestCase) -> None:
    if not has_aio_discard():
        case.case_skip(f'{case.id()}: qemu-io has no aio_discard')
