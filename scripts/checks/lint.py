# SPDX-License-Identifier: GPL-2.0-or-later
"""Kind lint: pylint and mypy over our Python, shellcheck over our bash"""

import glob
import os
import shutil

from . import iotests, programs, runner

# For scripts, besides those of QEMU's iotests; no bytecode is written before the
# first import
RULES = ['--max-line-length=88', '--disable=wrong-import-position,'
         'too-many-instance-attributes,consider-using-with,'
         'undefined-loop-variable,unused-argument,unknown-option-value,'
         'too-many-positional-arguments']
# It must leave nothing in the prepared tree, which check_export() compares
MYPY = ['mypy', '--cache-dir=/dev/null']


def scripts_in(language):
    """Our scripts in python or bash"""
    for path in sorted(path for folder in ('scripts', 'scripts/checks', '.ci')
                       for path in glob.glob(os.path.join(runner.TOP, folder,
                                                          '*'))
                       if os.path.isfile(path)):
        first = runner.read(path).partition('\n')[0]
        if path.endswith('.py') if language == 'python' else \
                path.endswith('.sh'):
            yield path
        elif first.startswith('#!') and language in first:
            yield path


def linters():
    """Our iotests as QEMU's test 297 looks at them, and our scripts"""
    source = iotests.source_folder(runner.BUILD)
    folder = os.path.join(source, 'tests/qemu-iotests')
    logs = os.path.join(runner.BUILD, 'check-logs')
    python = os.path.join(runner.BUILD, 'pyvenv/bin/python3')
    of_iotests = [os.path.join('tests', name) for name in
                  [*iotests.our_iotests(), *iotests.our_modules()]]
    of_scripts = list(scripts_in('python'))
    path = {'PYTHONPATH': f'{folder}:{source}/python'}
    rules = f'--rcfile={folder}/pylintrc'
    for name, command, cwd, env in (
            ('pylint-iotests', ['pylint', *of_iotests], folder, path),
            ('mypy-iotests', [*MYPY, *of_iotests], folder, path),
            ('pylint-scripts', ['pylint', rules, *RULES, *of_scripts],
             runner.TOP, {'PYTHONPATH': 'scripts'}),
            ('mypy-scripts', [*MYPY, '--ignore-missing-imports',
                              '--scripts-are-modules', *of_scripts],
             runner.TOP, {'MYPYPATH': 'scripts'})):
        yield programs.Program(name, [python, '-m', *command],
                               os.path.join(logs, name), env, cwd)
    if shutil.which('shellcheck'):
        yield programs.Program(
            'shellcheck', ['shellcheck', '-x', *scripts_in('bash')],
            os.path.join(logs, 'shellcheck'), cwd=runner.TOP)
    else:
        yield runner.Known('shellcheck', 'skip', 'not installed')


def lint_tests():
    return [t for t in linters() if t.name in programs.wanted([t.name])]
