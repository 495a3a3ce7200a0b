#!/usr/bin/python3 -B
"""Runs the tests with guests: all of them, or those whose name contains an argument.

    tests/vms/run.py [--list] [NAME...]

`scripts/test-vms` installs what they need first. `--list` only names them. All of them run in
two processes side by side, as most of their time is one guest's processor starting.
"""

import pathlib
import re
import subprocess
import sys
import threading
import time
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import image

# Side by side, about equally long. What libvirtd does is one process's.
HALVES = (("case_nics",), ("case_macvtap", "case_libvirt", "case_taps", "case_messages"))
CASES = tuple(name for half in HALVES for name in half)
# The guests' initrd is made: said by this program to itself.
PREPARED = "--prepared"
END = re.compile(r"guests: (\d+) passed, (\d+) failed, (\d+) skipped$")


class Result(unittest.TestResult):
    """Says at once how each test ended, and how long it took."""

    def __init__(self):
        super().__init__()
        # Tests, not failures: one may fail in several of its parts, and one that is no
        # test, the setting up or tearing down of a class, may fail too.
        self.passed, self.bad = 0, set()

    def startTest(self, test):
        super().startTest(test)
        self.begin = time.monotonic()

    def say(self, test, word, detail=""):
        seconds = time.monotonic() - getattr(self, "begin", time.monotonic())
        print(f"{word:4} {seconds:5.1f} s  {test.id()}{detail}", flush=True)

    def addSuccess(self, test):
        super().addSuccess(test)
        if test.id() not in self.bad:
            self.passed += 1
            self.say(test, "ok")

    def addSkip(self, test, reason):
        super().addSkip(test, reason)
        self.say(test, "SKIP", f": {reason}")

    def addFailure(self, test, error):
        super().addFailure(test, error)
        self.tell(test, test, self.failures)

    def addError(self, test, error):
        super().addError(test, error)
        self.tell(test, test, self.errors)

    def addSubTest(self, test, subtest, error):
        super().addSubTest(test, subtest, error)
        if error:
            kind = self.failures if issubclass(error[0], test.failureException) else self.errors
            self.tell(test, subtest, kind)

    def tell(self, test, part, kind):
        self.bad.add(test.id())
        self.say(part, "FAIL")
        print("    " + kind[-1][1].rstrip().replace("\n", "\n    "), flush=True)


def tests(suite):
    for item in suite:
        if isinstance(item, unittest.TestSuite):
            yield from tests(item)
        else:
            yield item


def run_halves():
    """Runs all tests, and tells what each process says as it comes; returns the exit status."""
    counts, lock = [], threading.Lock()

    def follow(half):
        command = [sys.executable, "-B", __file__, PREPARED, *(f"{name}." for name in half)]
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            for line in process.stdout:
                with lock:
                    if found := END.match(line):
                        counts.append([int(number) for number in found.groups()])
                    else:
                        print(line, end="", flush=True)

    threads = [threading.Thread(target=follow, args=[half]) for half in HALVES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(counts) < len(HALVES):
        print("guests: a process with tests did not get to its end")
        return 1
    passed, failed, skipped = (sum(column) for column in zip(*counts))
    print(f"guests: {passed} passed, {failed} failed, {skipped} skipped")
    return 1 if failed else 0


def main():
    loader = unittest.TestLoader()
    every = list(tests(loader.loadTestsFromNames(CASES)))
    words = [word for word in sys.argv[1:] if word not in ("--list", PREPARED)]
    chosen = [test for test in every if not words or any(word in test.id() for word in words)]
    if not chosen:
        print(f"no test is called like {' '.join(words)}")
        return 2
    if "--list" in sys.argv[1:]:
        print("\n".join(test.id() for test in chosen))
        return 0
    if PREPARED not in sys.argv[1:]:
        image.initrd()
    if not words:
        return run_halves()
    begin, result = time.monotonic(), Result()
    # A suite of one level runs class by class, in the order of the modules.
    unittest.TestSuite(chosen).run(result)
    print(f"guests: {time.monotonic() - begin:.0f} s for {result.testsRun} tests")
    print(f"guests: {result.passed} passed, {len(result.bad)} failed, {len(result.skipped)} skipped")
    return 1 if result.bad else 0


if __name__ == "__main__":
    sys.exit(main())
