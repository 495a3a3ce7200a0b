"""What cargo builds, and where it is."""

import json
import os
import pathlib
import subprocess
import sys

import kernels  # noqa: F401  which says where `image` is

import image


def executables(*words, **environment):
    """Builds by these words of cargo, or of a script like it; returns paths by kind and name."""
    done = subprocess.run(
        [*words, "--message-format", "json-render-diagnostics"], cwd=image.ROOT, stdout=subprocess.PIPE, check=False,
        env={**os.environ, **environment},
    )
    if done.returncode:
        sys.exit("cannot build what is to run there")
    programs = {}
    for line in done.stdout.splitlines():
        message = json.loads(line)
        if message.get("executable"):
            kind = message["target"]["kind"][0]
            programs[kind, message["target"]["name"]] = pathlib.Path(message["executable"])
    return programs


def static(bench):
    """Builds this benchmark and the product as they run on a host of any distribution."""
    return executables("scripts/bench-static", "--no-run", "--bench", bench)
