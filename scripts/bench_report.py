# SPDX-License-Identifier: GPL-2.0-or-later
"""What scripts/bench makes of the samples: figures, tables, plots."""

import json
import os
import platform
import re
import statistics
import subprocess
import time

from lab import KIB, MIB, QEMU_IMG, TOP

# What is measured: {name: (heading, unit, divisor)}
METRICS = {
    'seconds': ('time', 's', 1),
    'cpu': ('CPU', 's', 1),
    'memory': ('resident', 'MiB', MIB),
    'requests': ('requests', '', 1),
    'reads': ('reads', '', 1),
    'writes': ('writes', '', 1),
    'written': ('written', 'MiB', MIB),
    'read': ('read', 'MiB', MIB),
    'end': ('image end', 'MiB', MIB),
    'blocks': ('blocks of the file', 'MiB', MIB),
    'pages': ('page cache', 'pages', 1),
    'queries': ('queries', '', 1),
    'lseeks': ('lseek calls', '', 1),
    'dirty': ('dirty memory', 'MiB', MIB),
    'per_gib': ('time per GiB', 's', 1),
    'cpu_per_gib': ('CPU per GiB', 's', 1),
    'outside': ('CPU outside of compression', '%', 0.01),
    'idle': ('idle processors', '%', 0.01),
    'ns': ('time', 'ns', 1),
    **{f'{kind}_{name}': (f'{kind}s {text}', 'ms', 1e-3)
       for kind in ('read', 'write')
       for name, text in (('p50', 'median'), ('p95', '95 %'), ('p99', '99 %'),
                          ('p999', '99.9 %'))},
}


# What the summary shows, in its table and its plot: rows, and what they do
SUMMARY = [
    ('convert-main-zstd',
     'convert -c: 512 MiB of files to a file, O_DIRECT, zstd'),
    ('convert-main-zstd-w',
     'convert -c -W: 512 MiB of files to a file, O_DIRECT, zstd'),
    ('convert-main-zlib',
     'convert -c: 128 MiB of files to a file, O_DIRECT, zlib'),
    ('convert-constant-zstd-64k',
     'convert -c: 512 MiB of zeros and 0xff to a file, O_DIRECT'),
    ('convert-random-zstd-64k',
     'convert -c: 256 MiB of random data to a file, O_DIRECT'),
    ('convert-random-zstd-64k-w',
     'convert -c -W: 256 MiB of random data to a file, O_DIRECT'),
    ('disk-files-4096-0.2ms',
     'convert -c: 32 MiB of files to a disk, 0.2 ms'),
    ('disk-files-4096-1ms', 'convert -c: 32 MiB of files to a disk, 1 ms'),
    ('disk-files-4096-8ms', 'convert -c: 32 MiB of files to a disk, 8 ms'),
    ('disk-files-512-1ms',
     'convert -c: 32 MiB of files to a disk, 1 ms, 512-byte blocks'),
    ('disk-ff-zstd', 'convert -c: 128 MiB of 0xff to a disk, 4 ms'),
    ('disk-ff-1000', 'convert -c: 1000 MiB of 0xff to a disk, 8 ms, zlib'),
    ('backup-file', 'backup, compress: 320 MiB to a file, O_DIRECT'),
    ('backup-disk', 'backup, compress: 320 MiB to a disk, 1 ms'),
    ('read-restore-4096', 'convert: a compressed image of 512 MiB of files from'
     ' a disk, 2 ms'),
    ('filter-4k-file', 'seqcache: 4 KiB writes to a file, O_DIRECT'),
    ('filter-4k-disk', 'seqcache: 4 KiB writes to a disk, 4 ms'),
    ('filter-1m-file', 'seqcache: 1 MiB writes to a file, O_DIRECT'),
    ('filter-random-file',
     'seqcache: random 4 KiB writes to a file, O_DIRECT'),
    ('extents-22-0ms-map', 'cacheextents: map of 22 extents, no delay'),
    ('extents-1000-5ms-map',
     'cacheextents: map of 1000 extents, 5 ms a query'),
    ('extents-1000-5ms-convert',
     'cacheextents: convert of 1000 extents, 5 ms a query'),
    ('extents-100000-0ms-map',
     'cacheextents: map of 100 000 extents, no delay'),
]
# The sides that it compares
PAIRS = [('off', 'on'), ('without', 'with'), ('stock', 'with')]


def format_number(value):
    if value == int(value) and abs(value) < 1e6:
        return f'{value:.0f}'
    digits = 3 - len(str(int(abs(value)))) if abs(value) >= 1 else 3
    return f'{value:.{max(0, digits)}f}'


def format_value(metric, value):
    _, unit, divisor = METRICS[metric]
    return f'{format_number(value / divisor)} {unit}'.rstrip()


def format_samples(metric, values):
    """The median, and the range if there is one"""
    text = format_value(metric, statistics.median(values))
    if min(values) == max(values):
        return text
    divisor = METRICS[metric][2]
    return (f'{text} ({format_number(min(values) / divisor)} to'
            f' {format_number(max(values) / divisor)})')


def smaller_svg(svg):
    """The same to the eye: positions with one decimal, nothing indented, and no
    names of what nothing refers to"""
    svg = re.sub(r'<metadata>.*?</metadata>|<!--.*?-->| id="\w+_\d+"', '', svg,
                 flags=re.S)
    svg = re.sub(r' (?:d|x|y|transform)="[^"]*"',
                 lambda m: re.sub(r'(\.\d)\d+', r'\1', m[0]), svg)
    return re.sub(r'\n\s*', '\n', svg)


class Figure:
    """Something to be reached, or just stated: a function of two medians.

    text is what a reader sees. sides are (side, metric) each. unit is the
    metric that the result is formatted as, or None for a plain number.
    """

    def __init__(self, text, function, sides, unit=None, at_least=None,
                 at_most=None):
        self.text = text
        self.function = function
        self.sides = sides
        self.unit = unit
        self.at_least = at_least
        self.at_most = at_most

    def evaluate(self, samples):
        """A dict for the JSON file"""
        values = [samples[side][metric] for side, metric in self.sides]
        value = self.function(*map(statistics.median, values))
        # By turns: the runs that followed each other
        single = [self.function(*v) for v in zip(*values)]
        reached = None
        if self.at_least is not None:
            reached = value >= self.at_least
        elif self.at_most is not None:
            reached = value <= self.at_most
        return {'figure': self.text, 'value': value, 'min': min(single),
                'max': max(single), 'unit': self.unit,
                'at_least': self.at_least, 'at_most': self.at_most,
                'reached': reached}


def ratio(side_a, side_b, metric='seconds', metric_b=None, **reach):
    """The ratio of the metrics of two sides"""
    metric_b = metric_b or metric
    if side_a == side_b:
        text = f'{METRICS[metric][0]} / {METRICS[metric_b][0]}, {side_a}'
    else:
        text = f'{METRICS[metric][0]}, {side_a} / {side_b}'
    return Figure(text, lambda a, b: a / b,
                  [(side_a, metric), (side_b, metric_b)], **reach)


def difference(side_a, side_b, metric, **reach):
    return Figure(f'{METRICS[metric][0]}, {side_a} - {side_b}',
                  lambda a, b: a - b, [(side_a, metric), (side_b, metric)],
                  metric, **reach)


def value_of(side, metric, **reach):
    return Figure(f'{METRICS[metric][0]}, {side}', lambda a: a,
                  [(side, metric)], metric, **reach)


def format_figure(figure, quick):
    """(value with its range, what it should reach, reached or MISSED)"""
    def text(value):
        if figure['unit']:
            return format_value(figure['unit'], value)
        return f'{value:.3f}' if value < 10 else f'{value:.1f}'

    value = text(figure['value'])
    if figure['min'] != figure['max']:
        value += f' ({text(figure["min"])} to {text(figure["max"])})'
    if figure['reached'] is None:
        return value, '', 'stated'
    if figure['at_least'] is not None:
        reach = f'at least {format_reach(figure, figure["at_least"])}'
    else:
        reach = f'at most {format_reach(figure, figure["at_most"])}'
    if figure['reached']:
        return value, reach, 'reached'
    return value, reach, 'missed in a quick run' if quick else 'MISSED'


def format_reach(figure, value):
    return format_value(figure['unit'], value) if figure['unit'] else f'{value}'


def requests_of(metrics):
    """Of one side: how many requests or queries, as text"""
    for names in ('requests',), ('reads', 'writes'), ('queries',):
        if all(name in metrics for name in names):
            return format_number(sum(statistics.median(metrics[name])
                                     for name in names))
    return ''


def output_of(*command):
    done = subprocess.run(command, stdout=subprocess.PIPE, cwd=TOP,
                          stderr=subprocess.DEVNULL, text=True, check=False)
    return done.stdout.strip()


def machine(folder):
    """What the results depend on"""
    def field(path, name):
        with open(path, encoding='utf-8') as f:
            m = re.search(rf'^{name}\s*:\s*(.*)$', f.read(), re.M)
        return m.group(1) if m else ''

    memory = int(field('/proc/meminfo', 'MemTotal').split()[0]) * KIB
    return {
        'processor': field('/proc/cpuinfo', 'model name') or platform.machine(),
        'processors': os.cpu_count(),
        'memory': f'{memory / MIB / KIB:.0f} GiB',
        'kernel': platform.release(),
        'file system': output_of('findmnt', '-n', '-o', 'FSTYPE', '-T', folder),
        'QEMU': output_of(QEMU_IMG, '--version').split('\n')[0].split()[-1],
        'revision': output_of('git', 'describe', '--always', '--dirty'),
    }


class Report:
    """All results, those of earlier runs of other rows included"""

    def __init__(self, folder, quick):
        self.folder = folder
        self.quick = quick
        self.json = os.path.join(folder, 'results.json')
        self.added = []
        self.rows = {}
        os.makedirs(folder, exist_ok=True)
        self.machine = machine(folder)
        if os.path.exists(self.json):
            with open(self.json, encoding='utf-8') as f:
                self.rows = json.load(f)['rows']

    def add(self, row, samples):
        figures = [f.evaluate(samples) for f in row.figures]
        self.rows[row.name] = {
            'title': row.title, 'group': row.name.split('-')[0],
            'when': time.strftime('%Y-%m-%d', time.gmtime()),
            'quick': self.quick, 'machine': self.machine,
            'main': row.main, 'sides': samples,
            'figures': figures,
        }
        self.added.append(row.name)
        for side, metrics in samples.items():
            text = ', '.join(f'{METRICS[m][0]} {format_samples(m, v)}'
                             for m, v in metrics.items())
            print(f'    {side}: {text}')
        for figure in figures:
            value, reach, word = format_figure(figure, self.quick)
            print(f'    {figure["figure"]}: {value}',
                  f'[{reach}: {word}]' if reach else '', flush=True)

    def write(self):
        with open(self.json + '.new', 'w', encoding='utf-8') as f:
            json.dump({'rows': dict(sorted(self.rows.items()))}, f, indent=1)
            f.write('\n')
        os.rename(self.json + '.new', self.json)
        for name, text in (('results.md', self.markdown()),
                           ('summary.md', self.summary())):
            with open(os.path.join(self.folder, name), 'w',
                      encoding='utf-8') as f:
                f.write(text)
        self.plot()

    def groups(self):
        groups = {}
        for name, row in sorted(self.rows.items()):
            groups.setdefault(row['group'], {})[name] = row
        return groups

    def markdown(self):
        out = ['# Results', '',
               'Made by `make bench`; see `scripts/bench --help`. Medians; in '
               'brackets the smallest and the largest.', '']
        for group, rows in self.groups().items():
            out += ['', f'## {group}', '', f'![{group}]({group}.svg)', '',
                    '| row | figure | value | to reach | |',
                    '| --- | --- | --- | --- | --- |']
            for name, row in rows.items():
                for figure in row['figures']:
                    cells = format_figure(figure, row['quick'])
                    out.append(f'| {name} | {figure["figure"]} | '
                               f'{" | ".join(cells)} |')
            for name, row in rows.items():
                out += ['', f'**{name}**: {row["title"]}', '',
                        ', '.join(f'{key} {value}' for key, value in {
                            **row['machine'], 'date': row['when'],
                            'quick': row['quick']}.items()), '']
                out += self.sides_table(row)
        return '\n'.join(out) + '\n'

    @staticmethod
    def sides_table(row):
        metrics = [m for m in METRICS
                   if any(m in side for side in row['sides'].values())]
        out = ['| | ' + ' | '.join(METRICS[m][0] for m in metrics) + ' |',
               '| --- ' * (len(metrics) + 1) + '|']
        for side, samples in row['sides'].items():
            out.append(f'| {side} | ' + ' | '.join(
                format_samples(m, samples[m]) if m in samples else ''
                for m in metrics) + ' |')
        return out

    def summarised(self):
        """(text, row, sides, how many times faster) of rows of SUMMARY"""
        for name, text in SUMMARY:
            row = self.rows.get(name)
            for pair in PAIRS:
                if row and set(pair) <= set(row['sides']):
                    yield (text, row, [row['sides'][side] for side in pair],
                           ratio(*pair).evaluate(row['sides']))

    def summary(self):
        """The table that is committed, docs/results/summary.md"""
        out = ['# Results', '', 'Made by `make bench`. Medians; in brackets'
               ' the smallest and the largest ratio of runs that followed each'
               ' other. "Without" is `compressed-cache-size=0`, or no filter'
               ' node. A disk has blocks of 4 KiB, and a delay for each request.'
               ' Requests are those that the target got; with extents, the'
               ' queries.', '',
               '![How many times faster](summary.svg)', '',
               '| work | without | with | times faster | requests without |'
               ' with | measured |', '| --- ' * 7 + '|']
        for text, row, sides, faster in self.summarised():
            seconds = [format_value('seconds',
                                    statistics.median(side['seconds']))
                       for side in sides]
            out.append(f'| {text} | {" | ".join(seconds)} | '
                       f'{format_figure(faster, row["quick"])[0]} | '
                       f'{" | ".join(map(requests_of, sides))} | '
                       f'{row["when"]}, QEMU {row["machine"]["QEMU"]}'
                       f'{", quick" if row["quick"] else ""} |')
        machines = {', '.join([m['processor'], f'{m["processors"]} processors',
                               m['memory'], m['file system']])
                    for m in (row['machine'] for row in self.rows.values())}
        out += ['', f'Machine: {"; ".join(sorted(machines))}.']
        return '\n'.join(out) + '\n'

    def plot(self):
        """One SVG for each group: the time that each side of each row took"""
        # Only here, because it takes long to load
        # pylint: disable=import-outside-toplevel
        import matplotlib
        matplotlib.use('svg')
        matplotlib.rcParams['svg.hashsalt'] = 'seqcache'
        # Text instead of outlines: a tenth of the size
        matplotlib.rcParams['svg.fonttype'] = 'none'
        matplotlib.rcParams['font.sans-serif'] = ['DejaVu Sans']
        from matplotlib import pyplot

        for group, rows in self.groups().items():
            sizes = [len(row['sides']) + 1 for row in rows.values()]
            fig, axes = pyplot.subplots(
                len(rows), 1, squeeze=False, layout='constrained',
                figsize=(8, 0.3 * sum(sizes) + 0.5 * len(rows)),
                gridspec_kw={'height_ratios': sizes})
            for ax, row in zip(axes[:, 0], rows.values()):
                self.plot_row(ax, row)
            self.save(pyplot, fig, group)
        self.plot_summary(pyplot)

    def save(self, pyplot, fig, name):
        path = os.path.join(self.folder, f'{name}.svg')
        fig.savefig(path, metadata={'Date': None})
        pyplot.close(fig)
        with open(path, 'r+', encoding='utf-8') as f:
            svg = smaller_svg(f.read())
            f.seek(0)
            f.truncate()
            f.write(svg)

    def plot_summary(self, pyplot):
        found = [(text, faster) for text, _, _, faster in self.summarised()]
        if not found:
            return
        values = [f['value'] for _, f in found]
        spread = [[max(0, f['value'] - f['min']) for _, f in found],
                  [max(0, f['max'] - f['value']) for _, f in found]]
        fig, ax = pyplot.subplots(layout='constrained',
                                  figsize=(8, 0.25 * len(found) + 0.8))
        # By number: several texts are the same
        bars = ax.barh(range(len(found)), [v - 1 for v in values], left=1,
                       xerr=spread, capsize=2, error_kw={'elinewidth': 1},
                       tick_label=[text for text, _ in found])
        ax.bar_label(bars, [f'{format_number(v)} x' for v in values],
                     fontsize=8, padding=3)
        ax.set_xscale('log')
        ax.xaxis.set_major_formatter('{x:g}')
        ax.set_xlim(left=min([0.3, *values]))
        ax.margins(x=0.2)
        ax.invert_yaxis()
        ax.set_title('How many times faster, with seqcache', fontsize=9,
                     loc='left')
        self.finish_axes(ax)
        self.save(pyplot, fig, 'summary')

    @staticmethod
    def finish_axes(ax):
        ax.tick_params(labelsize=8)
        for edge in 'top', 'right':
            ax.spines[edge].set_visible(False)

    @staticmethod
    def plot_row(ax, row):
        sides = list(row['sides'])
        values = [row['sides'][side][row['main']] for side in sides]
        medians = [statistics.median(v) for v in values]
        spread = [[m - min(v) for m, v in zip(medians, values)],
                  [max(v) - m for m, v in zip(medians, values)]]
        bars = ax.barh(sides, medians, xerr=spread, capsize=2,
                       color=[f'C{i}' for i in range(len(sides))])
        ax.bar_label(bars, [f'  {format_value(row["main"], m)}'
                            for m in medians], fontsize=8)
        ax.margins(x=0.12)
        ax.invert_yaxis()
        ax.set_title(row['title'], fontsize=9, loc='left')
        Report.finish_axes(ax)

    def print_summary(self):
        print()
        for name in self.added:
            for figure in self.rows[name]['figures']:
                value, reach, word = format_figure(figure, self.quick)
                print(f'{name:26} {figure["figure"]:36} {value:30} {reach:17}'
                      f' {word}')
