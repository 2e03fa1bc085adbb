# SPDX-License-Identifier: GPL-2.0-or-later
"""
What the rows of scripts/bench have in common. A row is an object with

name, title    for the user; the name begins with the name of its group
sides          the names of the ways in which the same work is done
figures        what is made of the medians
repeats        how often each side is measured, unless it is a quick run
main           the metric that is plotted
prepare()      makes what all sides need
once()         what is measured (or verified) only once; a dict as below
measure()      does the work in one way; returns a dict with values for some of
               bench_report.METRICS, that of main always among them
"""

TIMES = 'seconds', 'cpu', 'memory'

DIRECT = 'a file with O_DIRECT'

# For differences that are small: short runs that follow each other closely
MANY = 21


class Row:
    main = 'seconds'

    def __init__(self, name, title, figures, repeats=5):
        self.name = name
        self.title = title
        self.figures = figures
        self.repeats = repeats

    def prepare(self, bench):
        pass

    def once(self, _bench, _side):
        return {}


def direct_file(path, prefix=''):
    return (f'{prefix}driver=file,{prefix}filename={path},'
            f'{prefix}cache.direct=on')
