#!/usr/bin/python3 -B
"""A machine with one of Debian's kernels, emulated by QEMU, for whatever is to run there.

    tests/kernels/machine.py [--cpus N] [--memory MIB] [--add FILE]... VERSION COMMAND [WORD...]

Its files are an initrd of two archives: the kernel's modules and the tools, made once, and
what this run brings along. The command's output comes out of the second serial port line by
line; what the kernel says, out of the first one, goes into a file.
"""

import argparse
import hashlib
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading

import kernels

import image

HERE = pathlib.Path(__file__).resolve().parent
FOLDER = image.CACHE.parent / "kernels"
# The last five because busybox's would run its own `ip` instead of iproute2's.
TOOLS = [
    "/usr/sbin/ip", "/usr/sbin/tc", "/usr/sbin/bridge", "/usr/sbin/ethtool", "/usr/bin/ping", "/usr/bin/setpriv",
    "/usr/bin/nsenter", "/usr/bin/unshare", "/usr/bin/env", "/bin/dash",
]
# What hosts and guests have, loaded at the start in this order.
MODULES = [
    # Which openvswitch asks for without saying so.
    "crc32c_generic",
    "virtio_pci", "virtio_net", "virtio_blk", "virtio_console", "tun", "tap", "veth", "dummy", "macvlan", "macvtap", "8021q",
    "bonding", "bridge", "vhost_net", "openvswitch", "sch_netem", "sch_ingress", "sch_prio", "cls_bpf", "act_mirred", "act_gact",
    "cls_matchall", "cls_u32", "act_vlan", "cls_flower", "vxlan", "ip_gre", "ipip", "ip6_gre", "unix_diag", "e1000",
]
KERNEL_ARGUMENTS = (
    "console=ttyS0 quiet panic=-1 mitigations=off nokaslr cryptomgr.notests random.trust_cpu=on oops=panic init_on_alloc=0"
)
# All that QEMU can do but what makes it slow: `rep movsb` goes byte by byte, a deeper page table
# and checks of user addresses cost each access, and the kernel does without them.
CPU = "max,erms=off,fsrm=off,la57=off,smap=off,smep=off"
MARK = "machine: exit "


def archive(root, target):
    """Packs a folder as the kernel unpacks it, and not compressed: that would take it longer."""
    names = subprocess.run(["find", ".", "-print0"], cwd=root, check=True, stdout=subprocess.PIPE)
    with open(target, "wb") as file:
        subprocess.run(
            ["cpio", "-0", "-o", "-H", "newc", "-R", "0:0", "--quiet"],
            cwd=root, input=names.stdout, stdout=file, check=True,
        )
    return target


def base(version):
    """The archive of tools and modules of this kernel; made anew when it would differ."""
    folder = kernels.kernel(version)
    recipe = [pathlib.Path(__file__), HERE / "init", HERE / "kernels.py"]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in recipe) + folder.name.encode()).hexdigest()[:16]
    target = FOLDER / f"base-{version}-{digest}.cpio"
    if target.exists():
        return target
    for old in FOLDER.glob(f"base-{version}-*.cpio"):
        old.unlink()
    modules = pathlib.Path("lib/modules") / image.release(folder)
    with tempfile.TemporaryDirectory(dir=FOLDER) as scratch:
        tree = image.Tree(scratch)
        tree.program("/bin/busybox")
        own = {pathlib.Path(tool).name for tool in TOOLS} | {"busybox", "sh", "ipaddr", "iplink", "ipneigh", "iproute", "iprule", "iptunnel"}
        for applet in image.output("/bin/busybox", "--list").split():
            if applet not in own:
                tree.path(f"/bin/{applet}").symlink_to("/bin/busybox")
        for name in ("proc", "sys", "dev", "tmp", "run", "root", "var/lib", "etc"):
            tree.path(f"/{name}").mkdir(parents=True)
        for tool in TOOLS:
            tree.program(tool)
        tree.path("/bin/sh").symlink_to("dash")
        tree.path("/etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n")
        tree.path("/etc/group").write_text("root:x:0:\nkvm:x:104:\nnogroup:x:65534:\n")
        there = {image.module_name(path) for path in (folder / modules).rglob("*.ko")}
        built_in = (folder / modules / "modules.builtin").read_text()
        built_in = {image.module_name(line) for line in built_in.split()}
        for name in MODULES:
            if name not in there | built_in:
                raise SystemExit(f"kernel {version} has no module {name}")
        wanted = [name for name in MODULES if name in there]
        for path in image.with_dependencies(folder / modules, wanted):
            tree.copy(folder / modules / path, modules / path)
        subprocess.run(["depmod", "-b", scratch, modules.name], check=True, stderr=subprocess.DEVNULL)
        tree.path("/etc/modules").write_text("\n".join(wanted) + "\n")
        shutil.copy(HERE / "init", tree.path("/init"))
        tree.path("/init").chmod(0o755)
        return archive(scratch, target.with_suffix(".new")).rename(target)


class Machine:
    """What is to run on it, and how it is made."""

    def __init__(self, version, cpus=2, memory=1536, arguments=()):
        self.version, self.cpus, self.memory = version, cpus, memory
        # Further words for QEMU.
        self.arguments = list(arguments)
        self.files = {}
        self.console = ""

    def add(self, source, name=None):
        """A file to bring along, with the libraries it asks for; by default into the root."""
        self.files[name or f"/{pathlib.Path(source).name}"] = source

    def run(self, command, patience, say=print):
        """Runs a shell command there and gives `say` its lines; returns its exit code.

        None if the machine ended by itself before the command did, or took longer than
        `patience` seconds.
        """
        FOLDER.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=FOLDER) as scratch:
            scratch = pathlib.Path(scratch)
            initrd = self.initrd(scratch, command)
            process = subprocess.Popen(
                self.qemu(initrd, scratch / "console"), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            timer = threading.Timer(patience, process.kill)
            timer.start()
            code = None
            try:
                for line in process.stdout:
                    line = line.decode(errors="replace").rstrip("\r\n")
                    if line.startswith(MARK):
                        code = int(line.removeprefix(MARK))
                    else:
                        say(line)
            finally:
                timer.cancel()
                process.kill()
                process.wait()
                if (scratch / "console").exists():
                    self.console = (scratch / "console").read_text(errors="replace")
            return code

    def initrd(self, scratch, command):
        tree = image.Tree(scratch / "tree")
        for name, source in self.files.items():
            tree.copy(source, name)
            tree.path(name).chmod(0o755)
            for library in image.libraries(source):
                tree.copy(library)
        tree.path("/command").write_text(command + "\n")
        whole = scratch / "initrd"
        added = archive(tree.root, scratch / "added.cpio")
        with open(whole, "wb") as file:
            for part in (base(self.version), added):
                file.write(part.read_bytes())
                # The kernel looks for the next archive at a multiple of four.
                file.write(bytes(-file.tell() % 4))
        return whole

    def qemu(self, initrd, console):
        threads = "single" if "-icount" in self.arguments else "multi"
        # PVH: see image.decompressed.
        return [
            "qemu-system-x86_64", "-accel", f"tcg,thread={threads}", "-machine", "pc", "-cpu", CPU, "-m", str(self.memory),
            "-smp", str(self.cpus), "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
            "-kernel", kernels.kernel(self.version) / "vmlinux", "-initrd", initrd, "-append", KERNEL_ARGUMENTS,
            "-serial", f"file:{console}", "-serial", "stdio", *self.arguments,
        ]


def main():
    parser = argparse.ArgumentParser(description="Runs a command on a machine with one of Debian's kernels.")
    parser.add_argument("version", help=", ".join(kernels.SUITES))
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--memory", type=int, default=1536, help="MiB")
    parser.add_argument("--patience", type=float, default=300, help="seconds until it is given up")
    parser.add_argument("--add", action="append", default=[], metavar="FILE[:NAME]", help="a file to bring along, by default as /NAME")
    parser.add_argument("--console", action="store_true", help="show what the kernel said, in the end")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what to run; a file of that name here is brought along")
    options = parser.parse_args()
    if not options.command:
        parser.error("no command")
    machine = Machine(options.version, options.cpus, options.memory)
    for added in options.add:
        machine.add(*added.split(":", 1))
    words = options.command
    if "/" in words[0] and os.path.isfile(words[0]):
        machine.add(words[0])
        words = [f"/{pathlib.Path(words[0]).name}", *words[1:]]
    command = shlex.join(words) if len(words) > 1 else words[0]
    code = machine.run(command, options.patience, lambda line: print(line, flush=True))
    if options.console or code is None:
        print(re.sub(r"^", "    ", machine.console[-8000:], flags=re.MULTILINE), file=sys.stderr)
    if code is None:
        sys.exit(f"the machine did not get to the end (within {options.patience:g} s)")
    return code


if __name__ == "__main__":
    sys.exit(main())
