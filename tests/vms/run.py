#!/usr/bin/python3 -B
"""Runs the tests with guests: all of them, or those whose name contains an argument.

    tests/vms/run.py [NAME...]

`scripts/test-vms` installs what they need first.
"""

import pathlib
import sys
import time
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import image

CASES = ("case_nics", "case_macvtap", "case_libvirt", "case_taps", "case_messages")


class Result(unittest.TestResult):
    """Says at once how each test ended, and how long it took."""

    def startTest(self, test):
        super().startTest(test)
        self.begin, self.failed = time.monotonic(), False

    def say(self, test, word, detail=""):
        seconds = time.monotonic() - getattr(self, "begin", time.monotonic())
        print(f"{word:4} {seconds:5.1f} s  {test.id()}{detail}", flush=True)

    def addSuccess(self, test):
        super().addSuccess(test)
        if not self.failed:
            self.say(test, "ok")

    def addSkip(self, test, reason):
        super().addSkip(test, reason)
        self.say(test, "n/a", f": {reason}")

    def addExpectedFailure(self, test, error):
        super().addExpectedFailure(test, error)
        self.say(test, "todo", f": {str(error[1]).splitlines()[-1]}")

    def addUnexpectedSuccess(self, test):
        super().addUnexpectedSuccess(test)
        self.say(test, "FAIL", ": it works now; take the mark away")

    def addFailure(self, test, error):
        super().addFailure(test, error)
        self.tell(test, self.failures)

    def addError(self, test, error):
        super().addError(test, error)
        self.tell(test, self.errors)

    def addSubTest(self, test, subtest, error):
        super().addSubTest(test, subtest, error)
        if error:
            self.failed = True
            kind = self.failures if issubclass(error[0], test.failureException) else self.errors
            self.tell(subtest, kind)

    def tell(self, test, kind):
        self.say(test, "FAIL")
        print("    " + kind[-1][1].rstrip().replace("\n", "\n    "), flush=True)


def tests(suite):
    for item in suite:
        if isinstance(item, unittest.TestSuite):
            yield from tests(item)
        else:
            yield item


def main():
    loader = unittest.TestLoader()
    every = list(tests(loader.loadTestsFromNames(CASES)))
    chosen = [test for test in every if not sys.argv[1:] or any(word in test.id() for word in sys.argv[1:])]
    if not chosen:
        print(f"no test is called like {' '.join(sys.argv[1:])}")
        return 2
    image.initrd()
    begin, result = time.monotonic(), Result()
    # A suite of one level runs class by class, in the order of the modules.
    unittest.TestSuite(chosen).run(result)
    failed = len(result.failures) + len(result.errors) + len(result.unexpectedSuccesses)
    print(f"{result.testsRun} tests with guests in {time.monotonic() - begin:.0f} s: {failed or 'none'} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
