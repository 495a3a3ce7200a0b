"""docs/kernels.md: what the runs found, in tables between two marks of the document."""

import collections
import re
import subprocess

import image

FILE = image.ROOT / "docs/kernels.md"
BEGIN = "<!-- written by scripts/test-kernels --document -->"
END = "<!-- end of what is written -->"
# As tests/features.rs names them: what it is, how the switch finds out, what it does without.
FEATURES = {
    "tagged-gso": (
        "super-frames with one tag are segmented", "start-up probe, by sending one",
        "cut in userspace: a copy and checksums for each byte",
    ),
    "double-tagged-gso": ("the same with two tags", "start-up probe", "the same"),
    "udp-gso": (
        "UDP super-frames are segmented", "start-up probe",
        "cut in userspace; TCP is not concerned",
    ),
    "tap-uso": ("guests can send UDP super-frames", "nothing: the VMM asks its tap", "not offered to the guest, which cuts them itself"),
    "tcx": ("tc programs by TCX", "start-up probe, by asking for the programs of a hook", "clsact: 80 ns a frame"),
    "fanout-ignore-outgoing": (
        "a group of packet sockets is spared what the host sends", "start-up probe, by sending a frame",
        "the socket filter refuses it: some instructions for each frame the host sends",
    ),
    "xdp-redirect": (
        "the kernel tells what drivers take by XDP, so `offload=off` is served by it", "by netlink, once a second",
        "the kernel path as without the option",
    ),
    "datapath-auto": ("datapath that `auto` takes", "at start, by loading the programs", "packet path"),
}


def of_this_machine():
    """What the test finds on the machine's own kernel, built as usual: a static glibc cannot
    look users up by the modules of every machine's nsswitch.conf."""
    words = ["cargo", "test", "--locked", "--quiet", "--test", "features", "--", "--include-ignored", "--nocapture"]
    done = subprocess.run(words, cwd=image.ROOT, capture_output=True, text=True)
    found = dict(re.findall(r"^feature (\S+): (.*)$", done.stdout, re.MULTILINE))
    if done.returncode or not found:
        raise SystemExit(f"the features of this machine's own kernel: {done.stdout}{done.stderr}")
    return found


def row(*cells):
    return f"| {' | '.join(cells)} |"


def features(columns):
    lines = [
        row("feature", *(found["kernel"] for found in columns), "how the switch finds out", "without it"),
        row(*["---"] * (len(columns) + 3)),
    ]
    for key, (what, how, without) in FEATURES.items():
        lines.append(row(what, *(found.get(key, "?") for found in columns), how, without))
    return lines


def tests(every):
    """How many tests passed, by file and datapath."""
    counts = collections.defaultdict(collections.Counter)
    for results in every:
        for name in results.passed:
            file, datapath, _ = name.split(" ", 2)
            counts[file, datapath][results.version] += 1
    lines = [
        row("tests", "datapath", *(results.version for results in every)),
        row(*["---"] * (len(every) + 2)),
    ]
    for (file, datapath), by_version in counts.items():
        lines.append(row(f"`tests/{file}.rs`", datapath, *(str(by_version[results.version]) for results in every)))
    failed = [(results.version, name) for results in every for name in results.failed]
    lines.append("")
    lines += [f"- {version}: **failed** {name}" for version, name in failed] or ["None failed."]
    return lines


def write(every):
    """Puts the tables of these runs into the document, beside what is found here."""
    own = of_this_machine()
    text = FILE.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    lines = [*features([*(results.features for results in every), own]), "", *tests(every)]
    FILE.write_text(f"{before}{BEGIN}\n\n" + "\n".join(lines) + f"\n\n{END}{after}")
    print(f"wrote {FILE.relative_to(image.ROOT)}")
