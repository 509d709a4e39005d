# SPDX-License-Identifier: GPL-2.0
"""bench_plot: how many times faster each workload is, as an SVG.

A panel for each engine; in it a group of bars for each workload, one for each size of call, on a
logarithmic scale. Bars to the left of the 1x line are slower than the base.
"""
from html import escape
from math import ceil, floor, log2

LABELS = 175                    # width of the column of names
PANEL, GAP = 400, 44
TOP, BOTTOM, EDGE = 112, 34, 16
BAR, PAD = 9, 7                 # height of a bar, and what is left between groups
NUMBER = 16                     # width of a bar's number
MOST = 16                       # how many times faster there is room for
SHADES = ("#9ecae1", "#6baed6", "#3182bd", "#08519c")
SLOWER = "#d9480f"
TARGET = "#2b8a3e"


def text(x, y, words, size=11, anchor="start", fill="#222", weight="normal"):
    return (f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" '
            f'fill="{fill}" font-weight="{weight}">{escape(words)}</text>')


def rect(x, y, width, height, fill):
    return (f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.8):.1f}" height="{height}" '
            f'fill="{fill}"/>')


def line(x, top, bottom, stroke, width):
    return (f'<line x1="{x:.1f}" y1="{top:.1f}" x2="{x:.1f}" y2="{bottom:.1f}" '
            f'stroke="{stroke}" stroke-width="{width}"/>')


def groups(engines):
    """The workloads, as the engine with most has them, and the most bars that each has."""
    found = {}
    for engine in sorted(engines.values(), key=lambda e: len(e["rows"]), reverse=True):
        for name in dict.fromkeys(r["workload"] for r in engine["rows"] if "base" in r):
            count = sum(r["workload"] == name and "base" in r for r in engine["rows"])
            found[name] = max(found.get(name, 0), count)
    return found


def scale(engines):
    """Powers of two around what is to be shown. What is far from the rest has its number."""
    values = [v for e in engines.values() for r in e["rows"] if "base" in r
              for v in (r["ratio"], r["target"], 0.9, 2)]
    return floor(log2(min(values))), ceil(log2(min(max(values), MOST)) + 0.4)


class Panel:
    """Where an engine's bars go."""

    def __init__(self, left, low, high, bottom):
        self.left, self.low, self.high, self.bottom = left, low, high, bottom

    def x(self, ratio):
        return self.left + PANEL * (log2(ratio) - self.low) / (self.high - self.low)

    def frame(self, engine):
        yield text(self.left + PANEL / 2, TOP - 24, f"{engine['title']} ({engine['unit']})", 13,
                   "middle", weight="bold")
        for power in range(self.low, self.high + 1):
            at = self.x(2.0 ** power)
            yield line(at, TOP, self.bottom, "#222" if power == 0 else "#ddd",
                       1.5 if power == 0 else 1)
            for y in (TOP - 6, self.bottom + 14):
                yield text(at, y, f"{2.0 ** power:g}x", 10, "middle", "#555")

    def bar(self, y, r, shade):
        one, at = self.x(1), self.x(min(r["ratio"], MOST))
        slower = r["ratio"] < 1 and not r["met"]
        yield rect(min(one, at), y, abs(at - one), BAR - 1, SLOWER if slower else shade)
        end, aim = max(one, at) + 4, self.x(r["target"])
        if r["target"] > 1:
            yield line(aim, y - 0.5, y + BAR - 0.5, TARGET, 2)
            if end - 4 < aim < end + NUMBER:
                end = aim + 4
        yield (f'<text class="n" x="{end:.1f}" y="{y + BAR - 1.5:.1f}">'
               f"{r['ratio']:.1f}</text>")


def legend():
    """What the colours say."""
    x, y = LABELS, 64
    names = ("1 page a call", "16", "512", "all pages")
    for shade, name in [*zip(SHADES, names), (SLOWER, "slower"), (TARGET, "aim")]:
        yield rect(x, y - 9, 3 if shade == TARGET else 12, 10, shade)
        yield text(x + 16, y, name)
        x += 34 + 6.5 * len(name)


def shade_of(r, rows):
    """By the place of its call among those of the workload, the largest being the darkest."""
    calls = sorted(q["call"] for q in rows if q["workload"] == r["workload"])
    return SHADES[len(SHADES) - len(calls) + calls.index(r["call"])]


def plot(engines):
    rows = groups(engines)
    height = sum(count * BAR + PAD for count in rows.values())
    width = LABELS + len(engines) * (PANEL + GAP)
    low, high = scale(engines)
    panels = [Panel(LABELS + i * (PANEL + GAP), low, high, TOP + height)
              for i in range(len(engines))]
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" '
             f'height="{TOP + height + BOTTOM}" '
             'font-family="DejaVu Sans, Helvetica, Arial, sans-serif">',
             '<style>.n { font-size: 8.5px; fill: #444; paint-order: stroke; stroke: #fff; '
             'stroke-width: 2px; }</style>',
             '<rect width="100%" height="100%" fill="#fff"/>',
             text(EDGE, 24, "hmm_range_fault(): how many times faster than the base tree's", 15,
                  weight="bold"),
             text(EDGE, 43, "On a logarithmic scale: bars to the right are faster, to the left slower",
                  fill="#555"), *legend()]
    for panel, engine in zip(panels, engines.values()):
        parts += panel.frame(engine)
    y = TOP + PAD / 2
    for name, count in rows.items():
        parts.append(text(LABELS - 8, y + count * BAR / 2 + 4, name, anchor="end"))
        for panel, engine in zip(panels, engines.values()):
            mine = [r for r in engine["rows"] if r["workload"] == name and "base" in r]
            for i, r in enumerate(mine):
                parts += panel.bar(y + i * BAR, r, shade_of(r, mine))
        y += count * BAR + PAD
    return "\n".join([*parts, "</svg>"]) + "\n"
