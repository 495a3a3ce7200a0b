"""macvtap on a VLAN device against vlanswitchd, on an emulated machine, by instructions.

QEMU counts the instructions its one processor executes and lets the machine's clock run by
them, a nanosecond each (`-icount shift=0`). So what the benchmark there takes for seconds are
10^9 instructions, of the kernel and of all programs, and a rate is instructions per frame:
the same in every run but for what chance does to schedulers, on whatever machine this is.
"""

import json
import os
import pathlib
import subprocess
import sys

import kernels
from machine import FOLDER, Machine

import image

BASE = "macvtap-on-vlan"
PATHS = ["packet", "kernel"]
# What each row is: the figure of the benchmark, and what one of it takes, in instructions.
ROWS = {
    "flood-guest-to-wire-60": ("60 B, guest to wire", "instructions a frame", lambda f: 1e3 / f["delivered_mpps"]),
    "flood-guest-to-wire-1514": ("1514 B, guest to wire", "instructions a frame", lambda f: 1e3 / f["delivered_mpps"]),
    "tcp-guest-to-wire-1": ("TCP, guest to wire", "instructions a KiB", lambda f: 8192 / f["gbit_per_s"]),
    "tcp-wire-to-guest-1": ("TCP, wire to guest", "instructions a KiB", lambda f: 8192 / f["gbit_per_s"]),
    "rtt-back-to-back": ("round trip", "instructions, median", lambda f: 1e3 * f["p50_us"]),
}
PATIENCE = 900.0
NOTE = """\
What this shows: how much work each way of carrying a guest's frames is, generator, guest's
stack and far end included, on the same kernel and counted alike; and that frames get through.
What it does not show: time. An instruction that misses the cache, a system call with its
mitigations, an interrupt, a wake-up on another processor cost many times a plain one, and
here all cost the same; there is one processor, so nothing runs side by side; and the wire is
a veth pair. docs/performance.md has the figures of real processors."""


def build():
    """Builds the benchmark and the product statically; returns their paths."""
    words = ["cargo", "bench", "--locked", "--no-run", "--bench", "versus_macvtap"]
    words += ["--target", "x86_64-unknown-linux-gnu", "--target-dir", FOLDER / "bench"]
    environment = {
        **os.environ,
        "CARGO_ENCODED_RUSTFLAGS": "-Ctarget-feature=+crt-static",
        "CARGO_PROFILE_RELEASE_STRIP": "true", "CARGO_PROFILE_RELEASE_DEBUG": "0",
    }
    done = subprocess.run(
        [*words, "--message-format", "json-render-diagnostics"], cwd=image.ROOT, env=environment,
        stdout=subprocess.PIPE, check=False,
    )
    if done.returncode:
        sys.exit("cannot build the benchmark")
    messages = [json.loads(line) for line in done.stdout.splitlines()]
    return {
        message["target"]["name"]: pathlib.Path(message["executable"])
        for message in messages if message.get("executable")
    }


def measure(version, programs):
    """Runs the benchmark there; returns figures by workload and datapath."""
    # One processor, as instructions can be counted of one only.
    machine = Machine(version, cpus=1, arguments=["-icount", "shift=0,sleep=off"])
    for path in programs.values():
        machine.add(path, str(path))
    words = [str(programs["versus_macvtap"]), "--quick", "--force", "--rounds", "1", "--window", "0.2", "--verbose"]
    words += ["--patience", "0", "--json", "/tmp/results.json"]
    for name in [BASE, *PATHS, *ROWS]:
        words += ["--only", name]
    for name in PATHS:
        words += ["--daemon", f"'{name}={programs['vlanswitchd']} --datapath {name}'"]
    command = f"{' '.join(words)}; echo; cat /tmp/results.json | tr -d '\\n'; echo"
    report = {}

    def say(line):
        if line.startswith("{"):
            report.update(json.loads(line))
        elif line:
            print(f"    {line}", flush=True)

    code = machine.run(command, PATIENCE, say)
    if code is None or not report:
        print(machine.console[-2000:])
        sys.exit(f"kernel {version}: the benchmark did not get to the end")
    for failure in report["failures"]:
        print(f"    not measured: {failure}")
    return {(made["workload"], made["datapath"]): made["figures"] for made in report["measurements"]}


def table(version, measured):
    lines = [
        f"Linux {version}, instructions counted by QEMU; in brackets the ratio to macvtap on a VLAN device",
        f"{'':22} {'':22} {'macvtap on VLAN':>16} {'packet path':>18} {'kernel path':>18}",
    ]
    for workload, (what, unit, cost) in ROWS.items():
        base = measured.get((workload, BASE))
        cells = [f"{what:22} {unit:22}", f"{cost(base):16.0f}" if base else f"{'-':>16}"]
        for name in PATHS:
            figures = measured.get((workload, name))
            if figures and base:
                cells.append(f"{cost(figures):10.0f} ({cost(figures) / cost(base):.2f})".rjust(18))
            else:
                cells.append(f"{'-':>18}")
        lines.append(" ".join(cells))
    return "\n".join(lines)


def compare(versions):
    """Measures on each of these kernels, and prints a table for it."""
    programs = build()
    tables = [table(version, measure(version, programs)) for version in versions or kernels.SUITES]
    print("\n\n".join(["", *tables]))
    print(f"\n{NOTE}")
