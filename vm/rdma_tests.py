#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""rdma_tests: run test modules that come with rdma-core, and say KTAP. For the guest.

rdma_tests DEVICE GID MODULE…
"""
import errno
import sys
import unittest

from args_parser import parser


class Ktap(unittest.TestResult):
    """A line a test; what it failed of stands above. What the device has not is skipped."""

    def say(self, test, good, why=""):
        name = test.id().rpartition(".")[2]
        print(f"{'ok' if good else 'not ok'} {self.testsRun} {name}{why}", flush=True)

    def addSuccess(self, test):
        super().addSuccess(test)
        self.say(test, True)

    def addSkip(self, test, reason):
        super().addSkip(test, reason)
        self.say(test, True, f" # SKIP {reason}")

    def addFailure(self, test, err):
        super().addFailure(test, err)
        self.explain(test, self.failures)

    def addError(self, test, err):
        if getattr(err[1], "error_code", None) == errno.EOPNOTSUPP:
            self.addSkip(test, str(err[1]))
            return
        super().addError(test, err)
        self.explain(test, self.errors)

    def explain(self, test, found):
        print("\n".join(f"# {row}" for row in found[-1][1].splitlines()))
        self.say(test, False)


def main():
    device, gid, *modules = sys.argv[1:]
    sys.argv[1:] = ["--dev", device, "--gid", gid]
    parser.parse_args()
    suite = unittest.defaultTestLoader.loadTestsFromNames(modules)
    print(f"1..{suite.countTestCases()}", flush=True)
    result = Ktap()
    suite.run(result)
    return 0 if result.wasSuccessful() else 1


if __name__ == "__main__":
    sys.exit(main())
