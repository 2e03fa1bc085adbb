# How a test is run: where, how often, and what it is skipped for
#
# SPDX-License-Identifier: GPL-2.0-or-later

import functools
import json
import os
import random
import shutil
from typing import Any, Dict, Mapping

import iotests
from iotests import file_path, qemu_img, qemu_io


def main(*fmts: str, **kwargs: Any) -> None:
    '''
    Run the test cases of the script, for images of @fmts, or of qcow2.  The
    tests choose the options of images themselves, so that they do not run with
    others from the command line of check.  @kwargs: for iotests.main()
    '''
    iotests.main(supported_fmts=list(fmts or ('qcow2',)),
                 supported_protocols=['file'],
                 unsupported_imgopts=['cluster_size', 'compat', 'data_file',
                                      'encrypt', 'extended_l2',
                                      'preallocation', 'refcount_bits'],
                 **kwargs)


# How much a random test does, as a multiple of what it does in "make check"
scale = int(os.environ.get('TEST_SCALE', 1))


def first_seed() -> int:
    '''Of a random test: TEST_SEED, to repeat what failed, or another one'''
    return int(os.environ.get('TEST_SEED', random.getrandbits(31)))


def add_figures(case: iotests.QMPTestCase, figures: Mapping[str, int]) -> None:
    '''Append to the file that TEST_FIGURES names what a test case counted'''
    path = os.environ.get('TEST_FIGURES')
    if path:
        with open(path, 'a', encoding='utf-8') as f:
            f.write(json.dumps({'case': case.id(), **figures}) + '\n')


def skip_without(case: iotests.QMPTestCase, *programs: str) -> None:
    '''Skip the test case unless all @programs are installed'''
    for program in programs:
        if not shutil.which(program):
            case.case_skip(f'{case.id()}: {program} not installed')


def skip_without_o_direct(case: iotests.QMPTestCase) -> None:
    '''Skip the test case unless files of the test can have O_DIRECT'''
    try:
        os.close(os.open(file_path('o_direct'),
                         os.O_CREAT | os.O_RDWR | os.O_DIRECT))
    except OSError:
        case.case_skip(f'{case.id()}: TEST_DIR does not support O_DIRECT')


def skip_without_zstd(case: iotests.QMPTestCase) -> None:
    '''Skip the test case unless qcow2 can compress with zstd'''
    if not iotests.supports_qcow2_zstd_compression():
        case.case_skip(f'{case.id()}: zstd compression not supported')


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
    '''Skip the test case if delay() does not delay in this version of QEMU'''
    if not has_delay():
        case.case_skip(f'{case.id()}: blkdebug of this QEMU has no delay-ns')


@functools.lru_cache(maxsize=None)
def has_aio_discard() -> bool:
    '''Whether qemu-io can discard in the background'''
    return 'not found' not in qemu_io('-c', 'help aio_discard',
                                      check=False).stdout


def skip_without_aio_discard(case: iotests.QMPTestCase) -> None:
    '''Skip the test case if qemu-io cannot discard in the background'''
    if not has_aio_discard():
        case.case_skip(f'{case.id()}: qemu-io has no aio_discard')
