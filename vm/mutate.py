# SPDX-License-Identifier: GPL-2.0
"""mutate.py: run the KUnit suites against every fault of vm/mutants, and judge the suites.

One kernel holds all of them: of a function that is to have faults a copy for each, and in its own
place a switch that calls the one chosen by the boot parameter hmm.mutant. So one build of User Mode
Linux serves every mutant, and a mutant is one boot. All of that is in $BUILD/mutate, which has its
own copy of the project and of the tree.

A mutant is killed when a test fails, or the kernel complains, hangs or dies. Those that live under
User Mode Linux are put into the virtual machine's kernel, and tried there, with those that are
listed for it alone; the suite that is named there comes first. The exit status is 0 when just those
live that are listed as equivalent.

MUTANTS='name pattern*' runs those alone.
"""
import concurrent.futures
import fnmatch
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import splats

TOP = Path(__file__).resolve().parent.parent
BUILD = Path(os.environ["BUILD"])
WORK = BUILD / "mutate"
PATCH = WORK / "patch"          # the copy of the project
LIST = TOP / "vm/mutants"
UM, VM = "User Mode Linux", "the virtual machine"
AT_ONCE = {UM: 8, VM: 2}        # on two processors: most of a suite's time it waits

# How many seconds a run may take, and how long it may say nothing: at first, and then some times
# what both were without a fault.
LIMIT = {UM: (120, 60), VM: (600, 180)}


def patience(seconds):
    return 10 + int(4 * seconds)


FILES = "mm/hmm.c", "mm/hmm_internal.h", "mm/hmm_dma.c", "include/linux/hmm.h"

# Each suite of the virtual machine's kernel, and a command; what they find is on the console.
RUN_SUITES = """
echo N >/sys/kernel/debug/failslab/ignore-gfp-wait
echo {number} >/sys/module/hmm/parameters/mutant || exit 99
cd /sys/kernel/debug/kunit || exit 99
for suite in {first} $(ls -d hmm* | grep -vx "{first}"); do
    echo 1 >$suite/run
    grep -q "^ok" $suite/results || exit 1
done
"""
RUN_COMMAND = """
echo {number} >/sys/module/hmm/parameters/mutant || exit 99
cd /selftests; {by} >/dev/console 2>&1
"""

# What vm/boot's exit status says when the console says nothing.
ENDS = {123: "the kernel complained", 124: "no end", 125: "the kernel died"}


class Trouble(Exception):
    """Something that is not for a mutant to answer for."""


def say(text):
    print(f"hmm: {text}", file=sys.stderr, flush=True)


# The list

class Mutant:
    """One entry: a name, a file, perhaps what is said of its fate, and a hunk as in a diff."""

    def __init__(self, head, hunk):
        words = re.fullmatch(r"(\w+) (\S+)(?: (equivalent|by|vm): (.+))?", head)
        if not words or words[2] not in FILES:
            raise Trouble(f"'{head}' in vm/mutants is no entry. Write 'name file', the file being "
                          f"one of {', '.join(FILES)}, and then a hunk as in a diff.")
        self.name, self.file = words[1], words[2]
        self.equivalent = words[4] if words[3] == "equivalent" else None
        self.by = words[4] if words[3] == "by" else None
        self.suite = words[4] if words[3] == "vm" else ""
        self.only_vm = words[3] in ("by", "vm")
        self.number, self.place = 0, None
        self.old = [row[1:] for row in hunk if row[0] in " -"]
        self.new = [row[1:] for row in hunk if row[0] in " +"]

    def find(self, lines):
        """Find its place in a file of these lines. Return what is wrong with it, or None."""
        size = len(self.old)
        places = [i for i in range(len(lines)) if lines[i:i + size] == self.old] if size else []
        if self.old == self.new:
            return f"{self.name}: it changes nothing"
        if len(places) != 1:
            return f"{self.name}: {self.file} has these lines {len(places)} times: " \
                   f"{''.join(self.old[:1]).strip()}"
        self.place = places[0]
        if not any(self.is_inside(where) for where in functions(lines)):
            return f"{self.name}: these lines are not inside of one function: {self.old[0].strip()}"
        return None

    def is_inside(self, where):
        """Is it the function there that it changes?"""
        _, body, last = where
        return body <= self.place and self.place + len(self.old) <= last + 1

    def apply(self, lines):
        return [*lines[:self.place], *self.new, *lines[self.place + len(self.old):]]


def read_list():
    """Every mutant, numbered from 1. All entries that are stale are told at once."""
    mutants = []
    for block in re.split(r"\n\s*\n", LIST.read_text()):
        rows = [row for row in block.split("\n") if row and not row.startswith("#")]
        if rows:
            mutants.append(Mutant(rows[0], rows[1:]))
    names = [m.name for m in mutants]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise Trouble(f"vm/mutants has two entries named {', '.join(twice)}. Rename one.")
    wrong = [m.find(source(m.file)) for m in mutants]
    if any(wrong):
        raise Trouble("vm/mutants is stale; each entry's lines have to be in the file once, and "
                      "inside of a function. Write these anew, with more lines around them if "
                      "need be:\n    " +
                      "\n    ".join(w for w in wrong if w))
    for number, mutant in enumerate(mutants, 1):
        mutant.number = number
    return mutants


def source(file):
    return (TOP / file).read_text().split("\n")


def chosen(mutants):
    patterns = os.environ.get("MUTANTS", "").split() or ["*"]
    for pattern in patterns:
        if not fnmatch.filter([m.name for m in mutants], pattern):
            raise Trouble(f"MUTANTS: vm/mutants has no '{pattern}'.")
    return [m for m in mutants if any(fnmatch.fnmatch(m.name, p) for p in patterns)]


# The copy of the project

def put(path, text):
    """Write what differs, so that the rest is not built again."""
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def copy_project():
    """The project as it is, but for the files that the mutants are made of."""
    files = [TOP / n for n in ("Makefile.patch", "Kconfig.fragment")]
    for folder in ("vm", "patches", *os.environ["OVERLAY"].split()):
        files += [p for p in (TOP / folder).rglob("*") if p.is_file() and p.suffix != ".pyc"]
    for path in files:
        name = path.relative_to(TOP)
        if str(name) not in FILES:
            put(PATCH / name, path.read_text())
            shutil.copymode(path, PATCH / name)
    return {PATCH / p.relative_to(TOP) for p in files}


def call_name(call):
    return re.search(r"(\w+)\(", call)[1]


def arguments(call):
    return ", ".join(name for name in re.findall(r"(\w+)[,)]", call) if name != "void")


def functions(lines):
    """Where each function is: its first line, that of its {, and that of its }."""
    first = None
    for number, line in enumerate(lines):
        if re.match(r"[a-z][^;]*\(", line):
            first = number
        elif line == "{" and first is not None:
            yield first, number, lines.index("}", number)
            first = None


def marker(file, number):
    """Where what follows is from, and (3) that the compiler has to put up with how it looks."""
    return f'# {number + 1} "{file}" 3'


def named(signature, name, mutant):
    """The signature of a copy. Copies are not inlined: there would be no end of it."""
    words = re.sub(r"\b(static|inline|noinline|__always_inline)\s", "", signature)
    return "static noinline __maybe_unused " + words.replace(f"{name}(", f"{name}_{mutant}(", 1)


def function_switch(file, lines, where, mutants):
    """What stands in a function's place: itself, its mutants, and the switch."""
    first, body, last = where
    signature = "\n".join(lines[first:body])
    name, words, rows = call_name(signature), arguments(signature), []
    for number, text in ((0, lines), *((m.number, m.apply(lines)) for m in mutants)):
        end = last + len(text) - len(lines)
        rows += [marker(file, first), named(signature, name, number),
                 *text[body:end + 1]]
    return [*rows, signature.replace("__always_inline", "noinline"), "{",
            "\tswitch (hmm_mutant) {",
            *(f"\tcase {m.number}: return {name}_{m.number}({words});" for m in mutants),
            f"\tdefault: return {name}_0({words});", "\t}", "}"]


def switched(file, mutants):
    """The file with those mutants in it. Number 0 is what it is without a fault."""
    lines, done = source(file), 0
    rows = [f"{'' if file == 'mm/hmm.c' else 'extern '}unsigned int hmm_mutant;"]
    for where in functions(lines):
        mine = [m for m in mutants if m.is_inside(where)]
        if mine:
            rows += [marker(file, done), *lines[done:where[0]],
                     *function_switch(file, lines, where, mine)]
            done = where[2] + 1
    rows += [marker(file, done), *lines[done:]]
    if file == "mm/hmm.c":
        rows += ["#include <linux/moduleparam.h>", "EXPORT_SYMBOL_GPL(hmm_mutant);",
                 "module_param_named(mutant, hmm_mutant, uint, 0644);", ""]
    return "\n".join(rows)


def make_project(mutants):
    wanted = copy_project() | {PATCH / file for file in FILES}
    for file in FILES:
        put(PATCH / file, switched(file, [m for m in mutants if m.file == file]))
    for path in PATCH.rglob("*"):
        if path.is_file() and path not in wanted:
            path.unlink()


def build(arch, mutants):
    """A kernel with these in it, by the copy's own scripts. Its base is the build folder's."""
    make_project(mutants)
    (WORK / "logs").mkdir(parents=True, exist_ok=True)
    if not (WORK / "base").exists():
        (WORK / "base").symlink_to("../base")
    if not (WORK / "base.from").exists() or \
            (WORK / "base.from").read_text() != (BUILD / "base.from").read_text():
        shutil.copy2(BUILD / "base.from", WORK / "base.from")
    for command in (["overlay"], ["build", arch]):
        child = RUNS.start([PATCH / "vm" / command[0], *command[1:]], env=environment())
        status = child.wait()
        RUNS.children.discard(child)
        if status:
            raise Trouble("The kernel with the mutants in it could not be built. If one of them "
                          "does not compile, mend its entry in vm/mutants.")


def environment():
    return {**os.environ, "BUILD": str(WORK), "IMAGE": str(WORK / "vm"), "DEBUG": ""}


# Running

class Runs:
    """The kernels that run now, to be ended with this program."""

    def __init__(self):
        self.lock, self.children, self.ended = threading.Lock(), set(), False

    def start(self, command, **how):
        with self.lock:
            if self.ended:
                raise Trouble("Interrupted.")
            # The build folder's lock is theirs, too, until they end.
            child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True,
                                     close_fds=False, **how)
            self.children.add(child)
            return child

    def stop(self, child, signum=signal.SIGKILL):
        with self.lock:
            self.children.discard(child)
        try:
            os.killpg(child.pid, signum)
        except ProcessLookupError:
            pass
        child.wait()

    def end(self, *_):
        with self.lock:
            self.ended = True
            children = list(self.children)
        for child in children:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGTERM)
        time.sleep(1 if children else 0)    # for vm/boot and vm/step.py to end theirs
        for child in children:
            self.stop(child)


RUNS = Runs()


class Console:
    """What a kernel says, read as it comes. The first of it that speaks of a fault is enough."""

    def __init__(self, log):
        self.log, self.file, self.rest = log, None, ""
        self.test, self.verdict, self.planned, self.passed = "", None, None, 0
        self.began = self.said = time.monotonic()
        self.longest = 0            # of the silences

    def open(self):
        try:
            self.file = open(self.log, encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return False
        return True

    def read(self):
        text = self.file.read() if self.file or self.open() else ""
        now = time.monotonic()
        self.longest = max(self.longest, now - self.said)
        if text:
            self.said = now
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            self.note(splats.bare(line))

    def note(self, line):
        test = re.search(r"# Subtest: (.*)", line)
        failed = re.match(r" *not ok \d+ *(?:- )?(.*)", line)
        plan = re.match(r"1\.\.(\d+)", line)
        self.test = test[1] if test else self.test
        self.planned = int(plan[1]) if plan else self.planned
        self.passed += line.startswith("ok ")
        if self.verdict:
            return
        if failed and not re.search(r"# *(SKIP|TODO)", line, re.I):
            self.verdict = f"{self.test}, {failed[1]}"
        elif splats.is_complaint(line):
            self.verdict = f"{self.test}, the kernel complained"

    def is_late(self, limits):
        return time.monotonic() > min(self.began + limits[0], self.said + limits[1])


def watch(child, console, limits):
    """Wait for the child's end, or until it is known that there is a fault. True: it has ended."""
    while True:
        over = child.poll() is not None
        console.read()
        if console.verdict or over:
            return over
        if console.is_late(limits):
            console.verdict = f"{console.test}, no end after " \
                              f"{int(time.monotonic() - console.began)} s"
        time.sleep(0.1)


def start_anew(log):
    log.unlink(missing_ok=True)
    return Console(log)


def set_limit(where, console):
    LIMIT[where] = patience(console.said - console.began), patience(console.longest)


def run_um(mutant):
    """What kills the mutant under User Mode Linux, or None."""
    console = start_anew(WORK / "logs" / f"um.{mutant.name}.log")
    with open(console.log, "wb") as out:
        child = RUNS.start([WORK / "um/linux", "mem=1G", "console=tty", "kunit.enable=1",
                            "kunit_shutdown=halt", f"uml_dir={WORK}/um.run/",
                            f"hmm.mutant={mutant.number}"],
                           stdout=out, stderr=subprocess.STDOUT)
    try:
        watch(child, console, LIMIT[UM])
    finally:
        RUNS.stop(child)
    if not console.verdict and console.passed != console.planned:
        console.verdict = f"{console.test}, the kernel died"
    if not mutant.number:
        set_limit(UM, console)
    return console.verdict


def run_vm(mutant):
    """The same for the virtual machine."""
    name = f"vm.{mutant.name}"
    console = start_anew(WORK / "logs" / f"{name}.console.log")
    command = (RUN_COMMAND if mutant.by else RUN_SUITES).format(
        number=mutant.number, by=mutant.by, first=mutant.suite)
    with open(WORK / "logs" / f"{name}.log", "w+", encoding="utf-8") as out:
        child = RUNS.start([PATCH / "vm/boot", "--name", name, "--timeout", str(LIMIT[VM][0]),
                            "--command", command], env=environment(), stdout=out,
                           stderr=subprocess.STDOUT)
        try:
            over = watch(child, console, LIMIT[VM])
        finally:
            RUNS.stop(child, signal.SIGTERM)
        out.seek(0)
        words = out.read().strip()
    if over and child.returncode == 99:
        raise Trouble(f"The virtual machine's kernel has no mutants in it: {words}")
    if over and (child.returncode < 0 or child.returncode > 125):
        raise Trouble(f"Somebody ended the virtual machine of {mutant.name}. Run it again.")
    if not console.verdict and child.returncode:
        console.verdict = f"{console.test}, {ENDS.get(child.returncode, mutant.by or 'no result')}"
    if not mutant.number:
        set_limit(VM, console)
    return console.verdict


def each(mutants, run, arch, at_once):
    """Run all, a few at a time; tell of each when it is known. Return those that live."""
    living = []
    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        jobs = {pool.submit(run, m): m for m in mutants}
        for job in concurrent.futures.as_completed(jobs):
            mutant, verdict = jobs[job], job.result()
            if verdict:
                print(f"{'KILLED' if mutant.equivalent else 'killed'} {mutant.name} "
                      f"({arch}: {verdict})", flush=True)
            else:
                living.append(mutant)
    return sorted(living, key=lambda m: m.number)


def survivors_of(mutants, arch, run, where):
    """Build a kernel with the mutants, see that its suites pass without, and run all."""
    if not mutants:
        return []
    build(arch, mutants)
    verdict = run(Mutant("clean mm/hmm.c", []))
    if verdict:
        raise Trouble(f"The suites fail in {where} without a fault: {verdict}. Mend that first.")
    say(f"running {len(mutants)} mutants in {where}")
    return each(mutants, run, arch, AT_ONCE[where])


def judge(mutants):
    living = survivors_of([m for m in mutants if not m.only_vm], "um", run_um, UM)
    living = survivors_of(living + [m for m in mutants if m.only_vm], "x86_64", run_vm, VM)
    for m in living:
        print(f"equivalent {m.name}: {m.equivalent}" if m.equivalent else f"SURVIVED {m.name}")
    wrong = [m.name for m in mutants if m.equivalent and m not in living]
    survivors = sum(not m.equivalent for m in living)
    if wrong:
        say(f"error: listed as equivalent in vm/mutants, and killed: {', '.join(wrong)}. Take the "
            "reason away there.")
    if survivors:
        say("error: write a test that sees each survivor, or the reason why none can into "
            "vm/mutants.")
    print(f"{len(mutants) - len(living)} killed, {survivors} survived, "
          f"{len(living) - survivors} equivalent")
    return 1 if survivors or wrong else 0


def interrupted(signum, _frame):
    RUNS.end()
    os._exit(128 + signum)


def main():
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, interrupted)
    began = time.monotonic()
    try:
        every = read_list()
        status = judge(chosen(every))
    except (Trouble, OSError) as err:
        RUNS.end()
        say(f"error: {err}")
        return 1
    say(f"took {int(time.monotonic() - began) // 60} minutes; the logs are in {WORK}/logs")
    return status


if __name__ == "__main__":
    sys.exit(main())
