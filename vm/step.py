#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""step.py LOG TITLE COMMAND…: run a long command, keep its output in LOG, show progress.

A build counts what it compiles. V=1 shows the output itself. When the command fails, the end
of its output and the name of the log are shown; the exit status is the command's own. All of it goes to standard error: standard output
belongs to what the user asked for.
"""
import os
import re
import select
import signal
import subprocess
import sys
import time

COMPILES = re.compile(rb"^\s+(CC|AS|LD|AR|HOSTCC|CHECK|DESCEND)\b")
PERIOD = 0.5 if sys.stderr.isatty() else 20
TAIL = 25
LOCK = 9                        # as in common.sh


class Progress:
    """One line that is redrawn on a terminal, and a line now and then elsewhere."""

    def __init__(self, title):
        self.title, self.start, self.shown, self.count = title, time.monotonic(), 0.0, 0
        self.tty = sys.stderr.isatty()

    def line(self, mark):
        took = time.monotonic() - self.start
        count = f", {self.count} files" if self.count else ""
        return f"hmm: {self.title}: {mark}{count}, {int(took) // 60}:{int(took) % 60:02d}"

    def tick(self):
        now = time.monotonic()
        if now - max(self.shown, self.start) < PERIOD:
            return
        self.shown = now
        self.put(self.line("working"), end="\r" if self.tty else "\n")

    def put(self, text, end="\n"):
        print(text + ("\033[K" if self.tty else ""), end=end, file=sys.stderr, flush=True)


def lock():
    """The build folder's lock, for the command to hold until it ends, should this be killed."""
    try:
        os.fstat(LOCK)
    except OSError:
        return ()
    return (LOCK,)


def run(log, command, progress, verbose):
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, start_new_session=True, pass_fds=lock())

    def stop(signum, _frame):
        os.killpg(child.pid, signal.SIGTERM)
        child.wait()
        sys.exit(128 + signum)

    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, stop)
    fd, rest = child.stdout.fileno(), b""
    while True:
        if select.select([fd], [], [], PERIOD)[0]:
            data = os.read(fd, 65536)
            if not data:
                break
            try:
                log.write(data)
                log.flush()
            except OSError:
                os.killpg(child.pid, signal.SIGTERM)
                child.wait()
                raise
            *lines, rest = (rest + data).split(b"\n")
            progress.count += sum(1 for x in lines if COMPILES.match(x))
            if verbose:
                sys.stderr.buffer.write(data)
                sys.stderr.flush()
        if not verbose:
            progress.tick()
    return child.wait()


def main():
    path, title, command = sys.argv[1], sys.argv[2], sys.argv[3:]
    progress = Progress(title)
    try:
        with open(path, "wb") as log:
            status = run(log, command, progress, bool(os.environ.get("V")))
    except FileNotFoundError as err:
        print(f"hmm: error: {title}: {err.filename}: {err.strerror}", file=sys.stderr)
        return 127
    except OSError as err:
        print(f"hmm: error: {title}: {path} cannot be written: {err.strerror}. If the disk is "
              "full, make room, or choose another with BUILD=dir.", file=sys.stderr)
        return 1
    if status == 0:
        progress.put(progress.line("done"))
        return 0
    progress.put(progress.line("FAILED"))
    with open(path, "rb") as log:
        for row in log.read().splitlines()[-TAIL:]:
            print("    " + row.decode(errors="replace"), file=sys.stderr)
    print(f"hmm: error: {title} failed (status {status}); all of its output is in {path}",
          file=sys.stderr)
    return status if status > 0 else 128 - status


sys.exit(main())
