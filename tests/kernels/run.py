#!/usr/bin/python3 -B
"""Runs the tests of forwarding on emulated machines with Debian's other kernels.

    tests/kernels/run.py [--datapath NAME,...] [--only FILE[:TEST],...] [VERSION...]
    tests/kernels/run.py --compare [VERSION...]
    tests/kernels/run.py --document

Every kernel gets the same programs: the product built statically, the tests as they are. A
test is what it is on the machine's own kernel: it compares frames byte by byte, so that what
passes here and there came out the same. `scripts/test-kernels` installs first what this needs.
"""

import argparse
import json
import pathlib
import re
import subprocess
import sys
import time

import compare
import document
import kernels
from machine import FOLDER, Machine
from programs import executables, static

import image

# What frames meet: run once for each datapath.
FORWARDING = ["forwarding", "offloads", "beside"]
# What the switch asks of the kernel beside that: once is enough.
SYSTEM = ["features", "kernel_facts", "sys_bpf", "sys_packet", "sys_tap", "restart", "kernel_path"]
# Of these files only what concerns the kernel: the rest would be the same on any.
PARTS = {
    "restart": ["every_frame_arrives_once_through_many_restarts_by", "a_killed_switch"],
    "kernel_path": ["frames_flow_whatever", "changes_its_path", "cannot_serve", "both_paths_do", "full_queue", "guest_without_offloads"],
}
# How much less there is to transfer than on a real processor.
SCALE = "512"
# A kernel's run takes five minutes or so on two processors; twice that is no run any more.
PATIENCE = 700.0


def build(names):
    """Builds these tests, as ever, and the product they are to find in its usual place.

    Returns what to bring along: sources by name, and the tests' names.
    """
    product = static("instructions")
    # The product's binaries are built along with them, and these stand in for them.
    words = (word for name in names for word in ("--test", name))
    # What is emulated is worth some optimisation.
    made = executables("cargo", "test", "--locked", "--no-run", *words, CARGO_PROFILE_DEV_OPT_LEVEL="1")
    files = {str(path): product[kind, name] for (kind, name), path in made.items() if kind == "bin"}
    folder = FOLDER / "tests"
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        # Debug information is most of them, and an emulated machine has to load it.
        subprocess.run(["strip", "--strip-debug", "-o", folder / name, made["test", name]], check=True)
        files[f"/tests/{name}"] = folder / name
    return files


class Results:
    """What the tests on one machine said."""

    def __init__(self, version):
        self.version = version
        self.passed, self.failed = [], []
        # What the machine's own kernel can do, as `tests/features.rs` tells it.
        self.features = {}
        self.program = ""
        self.ended = False
        self.begin = self.last = time.monotonic()

    def read(self, line):
        """Takes note of a line, and shows it if it is of interest."""
        if found := re.match(r"kernels: (\S+ \S+)$", line):
            self.program = found[1]
            self.ended = False
        elif found := re.match(r"test (\S+)(?: - should panic)? \.\.\. (ok|FAILED|ignored.*)$", line):
            self.note(found[1], found[2] == "ok", not found[2].startswith("ignored"))
            return
        elif found := re.match(r"feature (\S+): (.*)$", line):
            self.features[found[1]] = found[2]
            return
        elif line.startswith("test result:"):
            self.ended = True
        elif found := re.match(r"kernels: status (\d+)$", line):
            # It ended without its last line: a signal, or an abort.
            if not self.ended:
                self.failed.append(f"{self.program}: ended early, status {found[1]}")
            return
        if line and not line.startswith(("running ", "test result:", "failures:", "successes:")):
            print(f"    {line}", flush=True)

    def note(self, test, good, ran):
        now = time.monotonic()
        word = ("ok" if good else "FAIL") if ran else "SKIP"
        print(f"{word:4} {now - self.last:5.1f} s  {self.version} {self.program} {test}", flush=True)
        self.last = now
        (self.passed if good else self.failed).append(f"{self.program} {test}")


def load(version):
    """The results of the last whole run on this kernel."""
    file = FOLDER / f"results-{version}.json"
    if not file.exists():
        sys.exit(f"no run of {version} to write about: scripts/test kernels {version}")
    results = Results(version)
    results.__dict__.update(json.loads(file.read_text()))
    return results


def run_kernel(version, files, datapaths, only, patience):
    results = Results(version)
    machine = Machine(version)
    script = ["cd /tmp", "export RUST_BACKTRACE=0 VLANSWITCHD_TEST_SCALE=" + SCALE]
    for name, source in files.items():
        machine.add(source, name)
    plan = [(name, "packet") for name in SYSTEM] + [(name, path) for path in datapaths for name in FORWARDING]
    for name, datapath in plan:
        words = [word.partition(":")[2] for word in only if word.partition(":")[0] == name]
        if only and not words:
            continue
        filters = " ".join([word for word in words if word] or PARTS.get(name, []))
        # What was found is to be seen of a test that passes, too.
        show = "--show-output" if name == "features" else ""
        script += [
            f"echo kernels: {name} {datapath}",
            f"VLANSWITCHD_DATAPATH={datapath} /tests/{name} --include-ignored --test-threads=6 {show} {filters}",
            'echo "kernels: status $?"',
        ]
    # What took the time, in hundredths of a second: user, nice, system, idle, ...
    script.append("echo \"    $(head -n 1 /proc/stat)\"")
    code = machine.run("\n".join(script), patience, results.read)
    if code is None:
        results.failed.append(f"{results.program}: the machine did not get to the end in {patience:g} s")
        print("    the kernel said:\n    " + machine.console[-4000:].replace("\n", "\n    "), flush=True)
    results.seconds = time.monotonic() - results.begin
    if not only:
        kept = {name: getattr(results, name) for name in ("passed", "failed", "features", "seconds")}
        (FOLDER / f"results-{version}.json").write_text(json.dumps(kept))
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datapath", default="packet,auto", help="those to test, with commas")
    parser.add_argument("--patience", type=float, default=PATIENCE, help="seconds a kernel may take")
    parser.add_argument("--only", default="", help="test files, or file:test, with commas")
    parser.add_argument("versions", nargs="*", help=", ".join(kernels.SUITES))
    parser.add_argument("--compare", action="store_true", help="macvtap on a VLAN device against vlanswitchd, by instructions")
    parser.add_argument("--document", action="store_true", help="write the tables of docs/kernels.md, of the last whole runs")
    options = parser.parse_args()
    if options.compare:
        compare.compare(options.versions)
        return 0
    if options.document:
        document.write([load(version) for version in kernels.SUITES])
        return 0
    only = [word for word in options.only.split(",") if word]
    chosen = [name for name in SYSTEM + FORWARDING if not only or name in {word.partition(":")[0] for word in only}]
    files = build(chosen)
    every = [
        run_kernel(version, files, options.datapath.split(","), only, options.patience)
        for version in options.versions or kernels.SUITES
    ]
    for results in every:
        print(f"kernel {results.version}: {len(results.passed)} passed, {len(results.failed)} failed in {results.seconds:.0f} s")
        for name in results.failed:
            print(f"    failed: {name}")
    passed, failed = (sum(len(part) for part in parts) for parts in ([r.passed for r in every], [r.failed for r in every]))
    print(f"kernels: {passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
