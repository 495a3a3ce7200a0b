"""macvtap on a VLAN device against vlanswitchd, on an emulated machine, by instructions.

QEMU counts the instructions its one processor executes and lets the machine's clock run by
them, a nanosecond each (`-icount shift=0`). So what the benchmark there takes for seconds are
10^9 instructions, of the kernel and of all programs, and a rate is instructions per frame:
the same in every run but for what chance does to schedulers, on whatever machine this is.
"""

import json
import statistics
import sys

import kernels
from machine import Machine
from programs import static

BASE = "macvtap-on-vlan"
PATHS = ["packet", "kernel"]
FRAME = "instructions a frame"
KIBIBYTE = "instructions a KiB"
RESULTS = "/tmp/results.json"


class Run:
    """A run of the benchmark, and its rows: workload, what it is, the unit, and what one takes."""

    def __init__(self, rounds, window, rows, datapaths=(BASE, *PATHS)):
        self.rounds, self.window, self.rows, self.datapaths = rounds, window, rows, datapaths

    def words(self, programs):
        words = [str(programs["versus_macvtap"]), "--quick", "--force", "--verbose", "--patience", "0"]
        words += ["--rounds", str(self.rounds), "--window", str(self.window), "--json", RESULTS]
        for name in (*self.datapaths, *(row[0] for row in self.rows)):
            words += ["--only", name]
        for name in PATHS:
            words += ["--daemon", f"'{name}={programs['vlanswitchd']} --datapath {name}'"]
        return " ".join(words)


AS_FAST_AS_IT_GOES = Run(3, 0.2, [
    ("flood-guest-to-wire-60", "60 B, guest to wire", FRAME, lambda f: 1e3 / f["delivered_mpps"]),
    ("flood-guest-to-wire-1514", "1514 B, guest to wire", FRAME, lambda f: 1e3 / f["delivered_mpps"]),
    ("tcp-guest-to-wire-1", "TCP, guest to wire", KIBIBYTE, lambda f: 8192 / f["gbit_per_s"]),
    ("tcp-wire-to-guest-1", "TCP, wire to guest", KIBIBYTE, lambda f: 8192 / f["gbit_per_s"]),
    ("rtt-back-to-back", "round trip", "instructions, median", lambda f: 1e3 * f["p50_us"]),
])
# A flood toward the guest would leave it no instructions to receive with.
TRICKLE = Run(1, 2, [
    ("cost-wire-to-guest-60", "60 B, wire to guest", FRAME, lambda f: f["busy_ns_per_frame"]),
    ("cost-nic-to-guest-60", "the same, tag beside it", FRAME, lambda f: f["busy_ns_per_frame"]),
])
# Whose name is in those of all of its kind. What the switch does once a second is to be in it
# once a second.
PORTS = Run(1, 2, [
    ("ports-1", "60 B, guest to wire", FRAME, lambda f: 1e3 / f["to_wire_mpps"]),
    ("ports-1", "60 B, wire to guest", FRAME, lambda f: 1e3 / f["to_guest_mpps"]),
], PATHS)
PATIENCE = 1500.0
NOTE = """\
What this shows: how much work each way of carrying a guest's frames is, generator, guest's
stack and far end included, on the same kernel and counted alike; and that frames get through.
What it does not show: time. An instruction that misses the cache, a system call with its
mitigations, an interrupt, a wake-up on another processor cost many times a plain one, and
here all cost the same; there is one processor, so nothing runs side by side; and the wire is
a veth pair. docs/performance.md has the figures of real processors."""


def measure(version, programs):
    """Runs the benchmark there; returns what one takes, by what it is, workload and datapath."""
    # One processor, as instructions can be counted of one only.
    machine = Machine(version, cpus=1, arguments=["-icount", "shift=0,sleep=off"])
    for path in programs.values():
        machine.add(path, str(path))
    runs = (AS_FAST_AS_IT_GOES, TRICKLE, PORTS)
    command = "\n".join(f"{run.words(programs)}; echo; tr -d '\\n' < {RESULTS}; echo; rm {RESULTS}" for run in runs)
    reports = []

    def say(line):
        if line.startswith("{"):
            reports.append(json.loads(line))
        elif line:
            print(f"    {line}", flush=True)

    code = machine.run(command, PATIENCE, say)
    if code is None or len(reports) != len(runs):
        print(machine.console[-2000:])
        sys.exit(f"kernel {version}: the benchmark did not get to the end")
    costs = {}
    for run, report in zip(runs, reports):
        for failure in report["failures"]:
            print(f"    not measured: {failure}")
        for made in report["measurements"]:
            for name, what, _, cost in run.rows:
                if made["workload"].startswith(name):
                    costs.setdefault((what, made["workload"], made["datapath"]), []).append(cost(made["figures"]))
    return {key: statistics.median(each) for key, each in costs.items()}


def table(version, measured):
    lines = [
        f"Linux {version}, instructions counted by QEMU; in brackets the ratio to macvtap on a VLAN device",
        f"{'':23} {'':21} {'macvtap on VLAN':>16} {'macvtap, no VLAN':>18} {'packet path':>18} {'kernel path':>18}",
    ]
    for workload, what, unit, _ in (*AS_FAST_AS_IT_GOES.rows, *TRICKLE.rows):
        base = measured.get((what, workload, BASE))
        cells = [f"{what:23} {unit:21}", f"{base:16.0f}" if base else f"{'-':>16}"]
        for name in ("macvtap", *PATHS):
            own = measured.get((what, workload, name))
            cells.append(f"{own:10.0f} ({own / base:.2f})".rjust(18) if own and base else f"{'-':>18}")
        lines.append(" ".join(cells))
    lines += ["", f"{'with ports':30} {'':21} {'1':>9} {'1000':>18}"]
    for name in PATHS:
        for workload, what, unit, _ in PORTS.rows:
            one, many = (measured.get((what, f"ports-{count}", name)) for count in (1, 1000))
            cells = f"{one:9.0f} {f'{many:.0f} ({many / one:.2f})':>18}" if one and many else f"{'-':>9} {'-':>18}"
            lines.append(f"{f'{what}, {name}':30} {unit:21} {cells}")
    return "\n".join(lines)


def compare(versions):
    """Measures on each of these kernels, and prints a table for it."""
    programs = {name: path for (_, name), path in static("versus_macvtap").items()}
    tables = [table(version, measure(version, programs)) for version in versions or kernels.SUITES]
    print("\n\n".join(["", *tables]))
    print(f"\n{NOTE}")
