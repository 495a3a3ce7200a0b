"""Debian's stock kernels by version, from the mirror this machine is configured with.

Each comes from a suite of its own. apt is given a source list, list folder and cache of
ours, so that what the machine itself installs from stays as it is.
"""

import pathlib
import re
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "vms"))

import image

SUITES = {"5.10": "bullseye", "6.1": "bookworm", "6.12": "trixie"}
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"


def mirror():
    """The address of the mirror that this machine has its main Debian packages from."""
    words = "$(COMPONENT) $(LABEL) $(REPO_URI)"
    listing = image.output("apt-get", "indextargets", "--format", words, "Created-By: Packages")
    found = re.search(r"^main Debian (\S+)$", listing, re.MULTILINE)
    if not found:
        raise SystemExit("no Debian mirror is configured here (apt-get indextargets): run apt-get update first")
    return found[1]


def apt_options(version):
    """What makes apt look at one suite, and at files of ours only."""
    folder = image.CACHE.parent / "kernels/apt" / SUITES[version]
    for name in ("lists/partial", "cache/archives/partial"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    source = folder / "sources.list"
    if not source.exists():
        source.write_text(f"deb [signed-by={KEYRING}] {mirror()} {SUITES[version]} main\n")
    options = {
        "Dir::Etc::sourcelist": source,
        "Dir::Etc::sourceparts": "-",
        "Dir::State::lists": folder / "lists",
        "Dir::Cache": folder / "cache",
        "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled": "false",
        "Acquire::Languages": "none",
    }
    return [word for key, value in options.items() for word in ("-o", f"{key}={value}")]


def kernel(version):
    """Downloads and unpacks a kernel; returns a folder with `vmlinux` and `lib/modules`."""
    if version not in SUITES:
        raise SystemExit(f"no kernel {version} here: {', '.join(SUITES)}")
    options = apt_options(version)
    if not any((image.CACHE.parent / "kernels/apt" / SUITES[version] / "lists").glob("*_Packages*")):
        subprocess.run(["apt-get", *options, "-qq", "update"], check=True)
    return image.kernel(*options)
