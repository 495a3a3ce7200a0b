"""A guest in QEMU, on an emulated processor."""

import contextlib
import os
import socket
import subprocess

import image
from lab import Agent, LabError, eventually

# What the emulated processor need not do: it shares no cache, verifies no module.
KERNEL_ARGUMENTS = "console=ttyS0 quiet panic=-1 mitigations=off nokaslr cryptomgr.notests"
MAC = "52:54:00:12:34:56"


def qemu_command(folder, devices):
    """The words that start a guest with these devices and with its files in a folder."""
    return [
        "qemu-system-x86_64", "-accel", "tcg", "-machine", "pc", "-m", "192", "-smp", "1", "-nodefaults",
        "-no-user-config", "-display", "none", "-kernel", image.kernel() / "vmlinux", "-initrd", image.CACHE / "initrd",
        "-append", KERNEL_ARGUMENTS,
        "-serial", f"file:{folder}/console",
        "-chardev", f"socket,id=agent,path={folder}/agent,server=on,wait=off", "-serial", "chardev:agent",
        *devices,
    ]


def tap_devices(tap, model, mac=MAC, netdev="", device=""):
    """A NIC of a model on a tap by name, as documented for QEMU without libvirt."""
    return [
        "-netdev", f"tap,id=net0,ifname={tap},script=no,downscript=no{netdev}",
        "-device", f"{model},netdev=net0,mac={mac}{device}",
    ]


class Guest:
    """A running guest; its agent obeys once `ready` has returned."""

    numbers = 0

    def __init__(self, lab, devices, wrapper=(), pass_fds=()):
        Guest.numbers += 1
        self.folder = lab.folder / f"guest{Guest.numbers}"
        self.folder.mkdir()
        # For a QEMU that is not root.
        self.folder.chmod(0o777)
        self.errors = self.folder / "errors"
        with open(self.errors, "w") as errors:
            self.process = subprocess.Popen(
                lab.host.command(*wrapper, *qemu_command(self.folder, devices)),
                stdin=subprocess.DEVNULL, stdout=errors, stderr=errors, pass_fds=pass_fds,
            )
        self.agent = None

    def ready(self):
        """Waits until the guest has booted; returns its agent."""
        self.agent = connect(self.folder / "agent", self.alive)
        eventually(lambda: f"the guest boots: {self.console()}", lambda: self.alive() or self.agent.ready.done())
        return self.agent

    def alive(self):
        if self.process.poll() is not None:
            raise LabError(f"QEMU ended with {self.process.returncode}: {self.errors.read_text()}")

    def console(self):
        """The end of what the guest's kernel said."""
        with contextlib.suppress(OSError):
            return (self.folder / "console").read_text(errors="replace")[-2000:]
        return ""

    def close(self):
        """Ends it as a crash would."""
        self.process.kill()
        self.process.wait()


def connect(path, alive=lambda: None):
    """An agent behind a unix socket that QEMU opens soon."""
    channel = socket.socket(socket.AF_UNIX)

    def connected():
        alive()
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
            channel.connect(os.fspath(path))
            return True

    eventually(f"QEMU opens {path}", connected)
    return Agent("guest", channel.makefile("rb"), channel.makefile("wb"))
