# SPDX-License-Identifier: GPL-2.0
"""bench.py FOLDER LOGS ENGINE…: judge what mm/tests/hmm_bench.c printed in LOGS/bench_ENGINE.log.

Shows a table for each engine and what came of the aims, and leaves bench.json and bench.svg in
FOLDER. The exit status is 0 when everything was measured, whatever of the aims was met.
"""
import json
import re
import statistics
import sys
from pathlib import Path

import bench_plot

ENGINES = {
    "um": ("User Mode Linux, natively", "ns"),
    "vm": ("x86_64 in QEMU", "instructions"),
}
LINE = re.compile(r"hmm_bench: (workload=.*)")
PASSED = re.compile(r"^ok \d+ hmm_bench$", re.M)
FAILED = re.compile(r"^ *not ok .*|^ *# hmm_bench_run: EXPECTATION FAILED.*(?:\n .*){0,4}", re.M)
SKIPPED = re.compile(r"^ *ok \d+ (\S+) # SKIP (.*)", re.M)

LARGE, SMALL = 512, 16          # pages a call, at least and at most
NOISE = 0.98                    # a ratio that is as good as 1

MET = ("populated", "populated-unlocked", "populated-each", "read-met", "write-met",
       "write-met-unlocked", "write-met-each", "read-met-mask", "write-met-mask",
       "write-met-mask-unlocked", "mixed-met-mask-unlocked", "mixed-met-mask-each")
LEAVES = ("empty", "empty-unlocked", "thp", "thp-write-met", "thp-each", "hugetlb",
          "hugetlb-write-met")
TABLES = ("one-table", "one-table-unlocked")
WALKS = MET + LEAVES + ("half", "thousand-vmas", "mthp-64k", "device-private")


def die(text):
    sys.exit(f"hmm: error: {text}")


# What was measured

def measurements(text):
    """{(workload, call): {side: [fields of a turn, …]}}, in the order of the log."""
    found = {}
    for line in LINE.findall(text):
        fields = dict(word.split("=", 1) for word in line.split())
        for name in ("call", "ns", "best", "pages", "range", "faults", "others", "others_ns"):
            fields[name] = int(fields[name])
        key = fields["workload"], fields["call"]
        found.setdefault(key, {}).setdefault(fields["side"], []).append(fields)
    return found


def times(turns):
    """What a page took in each turn: in its fastest round, unless others are there on purpose."""
    return [t["ns"] / t["pages"] if t["others"] else t["best"] / t["range"] for t in turns]


def faulted(turns):
    return statistics.median(t["faults"] / t["pages"] for t in turns)


def beside(turns):
    """How many µs another thread took for what it does beside the range, if there is one."""
    took = [t["others_ns"] / t["others"] / 1000 for t in turns if t["others"]]
    return statistics.median(took) if took else None


def spread(values):
    """The middle half of the values; all of them if they are few."""
    if len(values) < 4:
        return min(values), max(values)
    quarters = statistics.quantiles(values, n=4)
    return quarters[0], quarters[2]


def row(key, sides):
    """One line of the table. What disturbs a turn disturbs both sides: its ratio stays."""
    ours, base = times(sides["ours"]), times(sides.get("base", []))
    result = {"workload": key[0], "call": key[1], "ours": statistics.median(ours),
              "ours_faults": faulted(sides["ours"]), "ours_beside_us": beside(sides["ours"])}
    if base:
        ratios = [b / o for b, o in zip(base, ours)]
        low, high = spread(ratios)
        result |= {"base": statistics.median(base), "low": low, "high": high,
                   "ratio": statistics.median(ratios),
                   "base_faults": faulted(sides["base"]),
                   "base_beside_us": beside(sides["base"])}
    return result


def read(engine, logs):
    path = logs / f"bench_{engine}.log"
    text = path.read_text(errors="replace").replace("\r", "")
    failed = FAILED.findall(text)
    if failed or not PASSED.search(text):
        print("\n".join(failed), file=sys.stderr)
        die(f"the benchmark {'failed' if failed else 'did not come to its end'} "
            f"({ENGINES[engine][0]}); all of its output is in {path}.")
    found = measurements(text)
    if not any("base" in sides for sides in found.values()):
        die(f"the kernel was built without the base tree's HMM, so {path} has nothing to compare.")
    return {"title": ENGINES[engine][0], "unit": ENGINES[engine][1],
            "rows": [row(key, sides) for key, sides in found.items()],
            "skipped": dict(SKIPPED.findall(text))}


# The table

def number(value):
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def faults(r):
    if not r["ours_faults"] and not r.get("base_faults"):
        return ""
    base = f"{r['base_faults']:.2f}" if "base" in r else "-"
    return f"{base} {r['ours_faults']:.2f}"


def show(engine):
    print(f"\n{engine['title']}: {engine['unit']} a page, and the ratio of the two: "
          "medians of the turns")
    print(f"{'workload':24}{'pages a call':>13}{'base':>10}{'ours':>10}{'base/ours':>11}"
          f"{'spread':>14}   faults a page")
    for r in engine["rows"]:
        print(f"{r['workload']:24}{r['call']:13}", end="")
        if "base" in r:
            print(f"{number(r['base']):>10}{number(r['ours']):>10}{r['ratio']:10.2f}x"
                  f"{r['low']:8.2f}-{r['high']:.2f}", end="")
        else:
            print(f"{'-':>10}{number(r['ours']):>10}{'-':>11}{'too slow':>14}", end="")
        print(f"   {faults(r)}".rstrip())
    for r in engine["rows"]:
        if r["ours_beside_us"] and r.get("base_beside_us"):
            what = "zapping and faulting the other half" if r["workload"] in TABLES \
                else "an mmap() and munmap()"
            print(f"{r['workload']}, calls of {r['call']}: {what} meanwhile took "
                  f"{number(r['base_beside_us'])} µs with base, {number(r['ours_beside_us'])} µs "
                  "with ours")
    for name, why in engine["skipped"].items():
        print(f"{name:24}    not measured: {why}")


# The aims

def target(engine, r):
    """The ratio that is aimed at; 1 is no more than not to be slower."""
    name, call = r["workload"], r["call"]
    # The driver's lock, and what is done under it, take as long for both.
    share = 0.9 if name.endswith("-each") else 1
    if name in WALKS and call <= SMALL:
        return 1.5 * share
    if name in MET and call >= LARGE:
        return (4 if engine == "um" else 5) * share
    if name in LEAVES and call >= LARGE and engine == "vm":
        return 2 * share
    return 1


def reached(r):
    if r["target"] == 1:
        return max(r["ratio"] / NOISE, r["high"]) >= 1
    return r["ratio"] >= r["target"]


RATIO_AIMS = (
    ("populated, requests met, 512 pages and more a call",
     lambda r: r["workload"] in MET and r["call"] >= LARGE),
    ("nothing populated, huge and hugetlb pages, 512 pages and more a call",
     lambda r: r["workload"] in LEAVES and r["call"] >= LARGE),
    ("no fault needed, 1 and 16 pages a call",
     lambda r: r["workload"] in WALKS and r["call"] <= SMALL),
    ("nothing else slower than the base", lambda r: True),
)


def ratio_aims(rows):
    left = [r for r in rows if "base" in r]
    for text, matches in RATIO_AIMS:
        mine = [r for r in left if matches(r)]
        left = [r for r in left if not matches(r)]
        if not mine:
            continue
        short = [f"{r['workload']}/{r['call']} {r['ratio']:.2f}x" for r in mine if not reached(r)]
        wanted = max(r["target"] for r in mine)
        text += f": {wanted:g}x" if wanted > 1 else ""
        yield {"aim": text, "met": not short, "cases": len(mine), "short": short}


def half_aim(rows):
    mine = [r for r in rows if r["workload"] == "half-rest"]
    short = [f"{r['call']} pages a call {r['ours_faults']:.3f}"
             for r in mine if r["ours_faults"] != 0.5]
    return {"aim": "of a half-populated range, exactly the missing half is faulted",
            "met": not short, "cases": len(mine), "short": short}


def linear_aim(rows):
    mine = sorted((r["call"], r["ours"]) for r in rows if r["workload"] == "waiting")
    (few, first), (many, last) = mine[0], mine[-1]
    growth = last / first
    return {"aim": f"faults that drop the lock: a page of {many} takes at most 1.5 times as long "
                   f"as one of {few}",
            "met": growth <= 1.5, "cases": 1,
            "short": [] if growth <= 1.5 else [f"{growth:.2f} times"]}


def judge(name, engine):
    for r in engine["rows"]:
        if "base" in r:
            r["target"] = target(name, r)
            r["met"] = reached(r)
    rows = engine["rows"]
    engine["aims"] = [*ratio_aims(rows), half_aim(rows), linear_aim(rows)]


def show_aims(engine):
    print(f"\nAims, {engine['title']}:")
    for aim in engine["aims"]:
        count = f" ({len(aim['short'])} of {aim['cases']} short)" if aim["short"] else ""
        print(f"  {'met   ' if aim['met'] else 'missed'}  {aim['aim']}{count}")
        for at in range(0, len(aim["short"]), 3):
            print("          " + ", ".join(aim["short"][at:at + 3]))


def main():
    folder, logs, names = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    engines = {name: read(name, logs) for name in names}
    for name, engine in engines.items():
        judge(name, engine)
        show(engine)
    for engine in engines.values():
        show_aims(engine)
    (folder / "bench.json").write_text(json.dumps(engines, indent=1) + "\n", encoding="utf-8")
    (folder / "bench.svg").write_text(bench_plot.plot(engines), encoding="utf-8")
    aims = [aim["met"] for engine in engines.values() for aim in engine["aims"]]
    print(f"\nhmm: bench: {sum(aims)} of {len(aims)} aims met; figures and plot in {folder}")


main()
