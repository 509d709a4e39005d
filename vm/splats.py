# SPDX-License-Identifier: GPL-2.0
"""splats: what in a kernel's console log says that something went wrong in the kernel."""
import re
from pathlib import Path

STAMP = re.compile(r"^(?:<\d+>)?\[\s*\d+\.\d+\](?:\[\s*[TC]\d+\])? ?")

# The first line of a complaint. Words that programs print, too, count only at a line's start.
BAD = re.compile(r"""
    ^(?:
        WARNING: | BUG: | INFO:\ (?:task\ .*blocked|rcu_|trying\ to\ register|possible) |
        Oops | Kernel\ panic | general\ protection\ fault | kernel\ BUG\ at |
        Unable\ to\ handle\ kernel | stack\ segment: | invalid\ opcode: | double\ fault: |
        UBSAN: | KASAN | KCSAN | KMSAN | KFENCE | kmemleak:\ \d+\ new |
        rcu:\ .*(?:self-)?detected | rcu:\ INFO: | watchdog:\ BUG | NMI\ watchdog |
        refcount_t: | page_table_check | list_(?:add|del)\ corruption | Bad\ page |
        ODEBUG: | DEBUG_LOCKS_WARN_ON | ------------\[\ cut\ here | BUG\ \S+\ \( |
        \w*swap\w*:\ Bad\ swap
    ) |
    possible\ (?:circular|recursive)\ locking | possible\ irq\ lock\ inversion |
    inconsistent\ lock\ state | suspicious\ RCU\ usage | bad\ unlock\ balance |
    lock\ held\ when\ returning | held\ lock\ freed | Invalid\ wait\ context |
    sleeping\ function\ called | scheduling\ while\ atomic | bad\ (?:pmd|pud|p4d|pgd|pte)\b |
    Bad\ (?:rss-counter|page\ state|page\ map) | soft\ lockup | hard\ LOCKUP |
    blocked\ for\ more\ than | turning\ off\ the\ locking |
    unreferenced\ object | non-zero\ (?:pgtables_bytes|nr_ptes)
""", re.X)

# What looks like a complaint and is none, or is not of HMM: a race is named after its functions.
FINE = re.compile(r"^WARNING: (?:Support for this CPU|unmaintained)|"
                  r"^BUG: KCSAN: (?!.*(?:hmm|dmirror))")

ROWS = 60                       # of each log, at most
AFTER = 25                      # rows that belong to a complaint


def bare(row):
    """The row without the time and the task."""
    return STAMP.sub("", row.rstrip("\r"))


def is_complaint(text):
    return BAD.search(text) and not FINE.match(text)


def find(path):
    """The rows of the log that show a complaint and what follows it; [] when all is well."""
    rows = Path(path).read_text(errors="replace").replace("\r", "").splitlines()
    shown, until = [], -1
    for number, row in enumerate(rows):
        if is_complaint(bare(row)):
            until = number + AFTER
        if number < until and len(shown) < ROWS:
            shown.append(row)
    return shown
