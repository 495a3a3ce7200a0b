"""What docs/libvirt.md tells people to type, for the tests to type it."""

import image
import re

TEXT = (image.ROOT / "docs/libvirt.md").read_text()


def section(title):
    """The text below a heading."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL)
    if not found:
        raise AssertionError(f"docs/libvirt.md has no section {title!r}")
    return found[1]


def xml(title):
    """The XML of a section, block by block."""
    return re.findall(r"^```xml\n(.*?)^```", section(title), re.MULTILINE | re.DOTALL)


def maps(title):
    """The values of `--map` in a section's command lines."""
    return re.findall(r"^ {4}vlanswitchd .*?--map (\S+)", section(title), re.MULTILINE)
