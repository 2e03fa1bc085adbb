# SPDX-License-Identifier: GPL-2.0-or-later
"""
scripts/check as a module: "from check_module import check". It has the parts
that run tests and count them; the other scripts that run tests use these.
"""

import importlib.machinery
import importlib.util
import os
import sys


def load_script(name):
    """The script scripts/NAME, which has no .py in its name, as a module"""
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), name)
    loader = importlib.machinery.SourceFileLoader(name, path)
    spec = importlib.util.spec_from_loader(name, loader)
    module = importlib.util.module_from_spec(spec)
    sys.dont_write_bytecode = True
    loader.exec_module(module)
    return module


check = load_script('check')
