# SPDX-License-Identifier: GPL-2.0
"""coverage.py TREE JSON: judge what gcovr found out about files of TREE.

All lines have to have run, and BRANCHES of the branches. Those that did not are named. Lines that
vm/uncovered lists, and the branches in them, are excused. It has a row for the file, the function
and the line's text, and under it, indented, the reason:

    mm/hmm.c hmm_lock: return -EINTR;
            why no test gets there
"""
import json
import re
import sys
from pathlib import Path

EXCUSES = Path(__file__).resolve().parent / "uncovered"
LINES, BRANCHES = 100.0, 95.0           # per cent
FUNCTION = re.compile(r"^[a-z_].*?(\w+)\((?!.*;$)")


def read_excuses():
    """{(file and function, the line's text): reason}"""
    excuses, key = {}, None
    for row in EXCUSES.read_text(encoding="utf-8").splitlines():
        if not row.strip() or row.startswith("#"):
            continue
        if not row[0].isspace():
            name, _, text = row.partition(": ")
            key = name, text.strip()
            excuses[key] = ""
        elif key:
            excuses[key] = f"{excuses[key]} {row.strip()}".strip()
    for (name, text), reason in excuses.items():
        if not reason:
            sys.exit(f"hmm: error: {EXCUSES}: '{name}: {text}' has no reason")
    return excuses


class Count:
    """How many of something there are, ran, and may be missing."""

    def __init__(self):
        self.all, self.ran, self.excused = 0, 0, 0

    def add(self, ran, excused):
        self.all += 1
        self.ran += ran
        self.excused += not ran and excused

    def share(self):
        """Per cent, of those that are not excused."""
        return 100.0 * self.ran / max(1, self.all - self.excused)

    def __str__(self):
        excused = f" ({self.excused} excused)" if self.excused else ""
        return f"{self.ran} of {self.all}{excused} = {100.0 * self.ran / max(1, self.all):.1f} %"


def function_at(source, number):
    """The function that a line is in."""
    rows = (FUNCTION.match(row) for row in reversed(source[:number]))
    return next((row[1] for row in rows if row), "")


def missing(line):
    """What of a line did not run, in words."""
    if not line["count"]:
        return "did not run"
    branches = line["branches"]
    never = [str(i) for i, b in enumerate(branches) if not b["count"]]
    return f"branch {', '.join(never)} of {len(branches)} was not taken" if never else ""


def judge(tree, file, excuses, used):
    """Report on one file; whether it is covered well enough."""
    source = (tree / file["file"]).read_text(encoding="utf-8").splitlines()
    lines, branches = Count(), Count()
    for line in file["lines"]:
        if line.get("gcovr/noncode"):
            continue
        number = line["line_number"]
        text = source[number - 1].strip()
        key = f"{file['file']} {function_at(source, number)}", text
        excused = key in excuses
        lines.add(line["count"] > 0, excused)
        for branch in line["branches"]:
            branches.add(branch["count"] > 0, excused)
        what = missing(line)
        if what:
            why = f"\n\t{excuses[key]}" if excused else ""
            used.add(key)
            print(f"{file['file']}:{number}: {what}: {text}{why}")
    print(f"{file['file']}: lines {lines}, branches {branches}")
    return lines.share() >= LINES and branches.share() >= BRANCHES


def main():
    tree, found = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    excuses, used, good = read_excuses(), set(), len(found["files"]) == 2
    for file in found["files"]:
        good = judge(tree, file, excuses, used) and good
    for name, text in sorted(set(excuses) - used):
        print(f"hmm: vm/uncovered excuses what did run, or is gone: {name}: {text}")
    print(f"hmm: coverage: {'enough' if good else 'FAILED'}")
    return 0 if good else 1


sys.exit(main())
