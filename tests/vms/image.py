"""The guest: Debian's kernel, unpacked, and an initrd with what a test needs.

Everything is made from packages of the machine that runs the tests and cached in
`target/vms`; nothing is installed into the guest's image by hand.
"""

import lzma
import os
import pathlib
import py_compile
import re
import shutil
import struct
import subprocess
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CACHE = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "vms"
PYTHON = "/usr/bin/python3"
PROGRAMS = ["/usr/sbin/ip", "/usr/sbin/ethtool", PYTHON]
# Drivers of the NICs QEMU emulates on a PCI bus, and VLAN devices.
MODULES = [
    "e1000", "e1000e", "8139cp", "virtio_net", "virtio_pci", "vmxnet3", "pcnet32", "ne2k-pci",
    "tulip", "e100", "8021q",
]


def output(*command):
    return subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.decode()


def kernel_package(*apt_options):
    """The package that Debian's `linux-image-amd64` stands for."""
    listing = output("apt-cache", *apt_options, "depends", "--important", "linux-image-amd64")
    return re.search(r"Depends: (linux-image-\S+)", listing)[1]


def kernel(*apt_options):
    """Downloads and unpacks the kernel; returns a folder with `vmlinux` and `lib/modules`."""
    name = kernel_package(*apt_options)
    folder = CACHE / name
    if folder.exists():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        scratch = pathlib.Path(scratch)
        # apt downloads as a user of its own, where it may.
        scratch.chmod(0o777)
        subprocess.run(["apt-get", *apt_options, "-qq", "download", name], cwd=scratch, check=True)
        unpacked = scratch / "unpacked"
        subprocess.run(["dpkg", "-x", next(scratch.glob("*.deb")), unpacked], check=True)
        image = next((unpacked / "boot").glob("vmlinuz-*"))
        (unpacked / "vmlinux").write_bytes(decompressed(image.read_bytes()))
        if not (unpacked / "lib/modules").exists():
            # From Debian 13 on nothing is left in /lib.
            (unpacked / "usr/lib").rename(unpacked / "lib")
        for module in (unpacked / "lib/modules").rglob("*.ko.xz"):
            # Compressed since Debian 13; the guest's processor is the slower one.
            module.with_suffix("").write_bytes(lzma.decompress(module.read_bytes()))
            module.unlink()
        subprocess.run(["depmod", "-b", unpacked, release(unpacked)], check=True)
        unpacked.rename(folder)
    return folder


def release(folder):
    """The kernel's version, as in `uname -r`."""
    return next((folder / "lib/modules").iterdir()).name


def decompressed(image):
    """The ELF kernel inside a bzImage (Documentation/arch/x86/boot.rst).

    QEMU starts it by its PVH entry, which spares the guest three seconds of
    unpacking itself on an emulated processor.
    """
    setup_sectors = image[0x1F1]
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = (setup_sectors + 1) * 512 + offset
    # The last four bytes are the size of what comes out.
    payload = image[start:start + length - 4]
    if payload.startswith(b"\xfd7zXZ\0"):
        return lzma.LZMADecompressor().decompress(payload)
    return subprocess.run(["unzstd", "-q", "-c"], input=payload, check=True, stdout=subprocess.PIPE).stdout


def module_name(path):
    """A module's name as the kernel says it, of its file or of how people write it."""
    return pathlib.Path(path).stem.replace("-", "_")


def with_dependencies(modules, names):
    """The files of modules by name and of what they depend on, below the folder `modules`."""
    needs, paths = {}, {}
    for line in (modules / "modules.dep").read_text().splitlines():
        path, dependencies = line.split(":")
        needs[path] = dependencies.split()
        paths[module_name(path)] = path
    wanted, todo = set(), [paths[module_name(name)] for name in names]
    while todo:
        path = todo.pop()
        if path not in wanted:
            wanted.add(path)
            todo += needs[path]
    return sorted(wanted)


def libraries(program):
    """The shared libraries a program asks for, its loader included; none if it is static."""
    listing = subprocess.run(["ldd", program], capture_output=True, text=True).stdout
    return re.findall(r"(/\S+) \(0x", listing)


def python_modules():
    """The files of the standard library that the agent imports."""
    listing = output(
        PYTHON, "-ISB", "-c",
        f"import sys, runpy; runpy.run_path({str(HERE / 'agent.py')!r})\n"
        "for module in list(sys.modules.values()): print(getattr(module, '__file__', None) or '')",
    )
    return sorted({line for line in listing.split() if line.startswith("/usr/lib/")})


class Tree:
    """A folder that becomes an initrd."""

    def __init__(self, root):
        self.root = pathlib.Path(root)

    def path(self, name):
        path = self.root / str(name).lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def copy(self, source, name=None):
        shutil.copy(os.path.realpath(source), self.path(name or source))

    def program(self, source):
        self.copy(source)
        for library in libraries(source):
            self.copy(library)

    def python(self):
        encodings = output(PYTHON, "-ISB", "-c", "import encodings; print(encodings.__path__[0])").strip()
        needed = [f"{encodings}/{name}.py" for name in ("idna", "ascii", "latin_1")]
        for source in python_modules() + needed:
            if source.endswith(".so"):
                self.copy(source)
            else:
                self.compile(source, f"{source}c")
        self.compile(HERE / "agent.py", "/agent.pyc")

    def compile(self, source, name):
        """Compiled here: the guest would take seconds."""
        py_compile.compile(
            str(source), cfile=str(self.path(name)), doraise=True,
            invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
        )


def initrd():
    """Builds the initrd; returns its path."""
    folder = kernel()
    modules = pathlib.Path("lib/modules") / release(folder)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        tree = Tree(scratch)
        tree.program("/bin/busybox")
        for applet in output("/bin/busybox", "--list").split():
            # Its shell would prefer its own `ip` to iproute2's.
            if applet not in ("busybox", "ip", "sh"):
                tree.path(f"/bin/{applet}").symlink_to("/bin/busybox")
        for name in ("proc", "sys", "dev", "tmp", "run"):
            tree.path(f"/{name}").mkdir()
        for program in PROGRAMS:
            tree.program(program)
        tree.program("/bin/dash")
        tree.path("/bin/sh").symlink_to("dash")
        tree.python()
        for path in with_dependencies(folder / modules, MODULES):
            tree.copy(folder / modules / path, modules / path)
        # An index of these alone: reading the whole one takes the guest a second.
        subprocess.run(["depmod", "-b", scratch, modules.name], check=True, stderr=subprocess.DEVNULL)
        shutil.copy(HERE / "init", tree.path("/init"))
        archive = CACHE / "initrd.new"
        names = subprocess.run(["find", ".", "-print0"], cwd=scratch, check=True, stdout=subprocess.PIPE)
        with open(archive, "wb") as file:
            subprocess.run(
                ["cpio", "-0", "-o", "-H", "newc", "-R", "0:0", "--quiet"],
                cwd=scratch, input=names.stdout, stdout=file, check=True,
            )
    # Not compressed: unpacking would take the guest longer than QEMU takes to read it.
    return archive.rename(CACHE / "initrd")
