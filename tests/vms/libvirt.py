"""A libvirtd of the lab's own, which neither sees nor disturbs one of the host's.

It has folders of its own where libvirt keeps files, and an empty /run: no pid file but
its own, no D-Bus by which the host's systemd would be told of its guests.
"""

import os
import pathlib
import signal
import subprocess

import image
from guest import KERNEL_ARGUMENTS, connect
from lab import PREFIX, LabError, eventually, run

# What libvirt must not do where there is no systemd, no cgroup and nobody but root.
CONFIGURATION = """
user = "root"
group = "root"
security_driver = "none"
cgroup_controllers = []
namespaces = []
remember_owner = 0
stdio_handler = "file"
"""
# The device in the XML of docs/libvirt.md.
TAP = "tap-web1"
PRIVATE = ("/etc/libvirt", "/var/lib/libvirt", "/var/cache/libvirt", "/var/log/libvirt", "/run/libvirt")


class Libvirt:
    """libvirtd in the lab's host; all it starts ends with it."""

    def __init__(self, lab, name="libvirt"):
        self.lab, self.folder = lab, lab.folder / name
        mounts = ["mount -t tmpfs tmpfs /run"]
        for place in PRIVATE:
            mine = self.folder / place.strip("/").replace("/", "-")
            mine.mkdir(parents=True)
            mounts.append(f"mkdir -p {place} && mount --bind {mine} {place}")
        (self.folder / "etc-libvirt/qemu.conf").write_text(CONFIGURATION)
        self.socket = self.folder / "run-libvirt/libvirt-sock"
        # A process namespace, so that no guest outlives it; its first process reaps them.
        script = " && ".join([*mounts, f"PATH={image.HERE}/bin:$PATH libvirtd; :"])
        self.output = self.folder / "libvirtd.out"
        with open(self.output, "w") as output:
            self.process = subprocess.Popen(
                lab.host.command(
                    "unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", script
                ),
                stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            )
        eventually(lambda: f"libvirtd answers: {self.output.read_text()}", self.answers)

    def answers(self):
        if self.process.poll() is not None:
            raise LabError(f"libvirtd ended: {self.output.read_text()}")
        return self.socket.exists() and run(*self.virsh_words("version"), check=False)

    def virsh_words(self, *words):
        return ["virsh", "--quiet", "--connect", f"qemu+unix:///system?socket={self.socket}", *words]

    def virsh(self, *words):
        return run(*self.virsh_words(*words))

    def close(self):
        self.process.kill()
        self.process.wait()


class Domain:
    """A transient domain with the interface given."""

    numbers = 0

    def __init__(self, libvirt, interface, processors=1):
        Domain.numbers += 1
        self.libvirt, self.name = libvirt, f"{PREFIX}-{os.getpid()}-{Domain.numbers}"
        folder = libvirt.folder
        self.channel, self.console_file = folder / f"{self.name}.agent", folder / f"{self.name}.console"
        self.xml = folder / f"{self.name}.xml"
        self.xml.write_text(f"""
<domain type='qemu'>
  <name>{self.name}</name>
  <memory unit='MiB'>192</memory>
  <vcpu>{processors}</vcpu>
  <os>
    <type arch='x86_64' machine='pc'>hvm</type>
    <kernel>{image.kernel() / 'vmlinux'}</kernel>
    <initrd>{image.CACHE / 'initrd'}</initrd>
    <cmdline>{KERNEL_ARGUMENTS}</cmdline>
  </os>
  <features><acpi/></features>
  <on_reboot>restart</on_reboot>
  <devices>
    {interface}
    <serial type='file'><source path='{self.console_file}'/><target port='0'/></serial>
    <serial type='unix'><source mode='bind' path='{self.channel}'/><target port='1'/></serial>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
  </devices>
</domain>
""")
        self.agent = None

    def start(self):
        """Starts it; it boots meanwhile."""
        self.channel.unlink(missing_ok=True)
        self.libvirt.virsh("create", self.xml)

    def ready(self):
        """Waits until it has booted; returns its agent."""
        self.agent = connect(self.channel)
        self.booted()
        return self.agent

    def booted(self):
        eventually(lambda: f"the guest boots: {self.console()}", self.agent.ready.done)

    def console(self):
        return self.console_file.read_text(errors="replace")[-2000:]

    def reboot(self):
        """Has the guest reboot itself, and waits for it."""
        self.agent.ready = self.agent.expect(0)
        self.agent.start("run", command="reboot -f")
        self.booted()

    def tune(self, *limits):
        """Changes `<bandwidth>` while it runs."""
        self.libvirt.virsh("domiftune", self.name, TAP, *limits, "--live")

    def destroy(self):
        self.libvirt.virsh("destroy", self.name)

    def kill(self):
        """SIGKILL to its QEMU, behind libvirt's back."""
        for entry in pathlib.Path("/proc").glob("[0-9]*"):
            try:
                command = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"qemu-system" in command[0] and f"guest={self.name},".encode() in b"\0".join(command):
                os.kill(int(entry.name), signal.SIGKILL)
                return
        raise LabError(f"no QEMU of {self.name}")

    def gone(self):
        """Waits until libvirt has noticed that it is no more."""
        eventually(f"{self.name} is gone", lambda: self.name not in self.libvirt.virsh("list", "--name"))
