"""What vlanswitchd, QEMU and the documents say when something does not fit."""

import pwd
import socket

import documents
from checks import Checks
from guest import Guest, tap_devices
from lab import UPLINK, Daemon, eventually, run
from tap import ETHER_TYPE, Tap, experiment

TAP = "tap-web1"
QEMU = "QEMU without libvirt"
# Someone who may do nothing; Debian has them everywhere.
USER, GROUP = "nobody", "nogroup"
# BR_STATE_FORWARDING, include/uapi/linux/if_bridge.h
FORWARDING = "3"


class WhatVlanswitchdSays(Checks):
    """The messages name what is wrong and what to do about it."""

    def warned(self, mapping, *parts):
        daemon = self.serve("--map", mapping, taps=[TAP])
        message = daemon.says(parts[0])
        for part in parts:
            self.assertIn(part, message)
        self.assertIn("WARN", next(line for line in daemon.log if parts[0] in line))
        return daemon

    def existing_tap(self, *words):
        self.lab.host.ip("tuntap", "add", TAP, "mode", "tap", *words)
        self.addCleanup(self.remove, [TAP])

    def refused(self, mapping, *parts):
        daemon = Daemon(self.lab.host, "--map", mapping, wait=False)
        self.addCleanup(daemon.kill)
        eventually("it ends", lambda: daemon.process.poll() is not None)
        daemon.finish()
        self.assertEqual(daemon.process.returncode, 2)
        for part in parts:
            self.assertIn(part, daemon.log[-1])

    def test_a_tap_without_queues_for_a_guest_with_some(self):
        self.existing_tap()
        self.warned(f"101={TAP},queues=4", "queues=4", "one queue", f"ip link delete {TAP}")

    def test_a_tap_with_queues_for_a_guest_without(self):
        self.existing_tap("multi_queue")
        self.warned(f"101={TAP}", "multiqueue", "queues=N", f"ip link delete {TAP}")

    def test_a_tap_of_another_users(self):
        self.existing_tap("user", USER)
        self.warned(f"101={TAP},owner=root", "owner", str(pwd.getpwnam(USER).pw_uid), f"ip link delete {TAP}")

    def test_a_name_that_libvirt_reserves(self):
        for name in ("vnet0", "vif1", "macvtap2", "macvlan3"):
            with self.subTest(name):
                self.refused(f"101={name}", name, "reserved by libvirt", "create=no")

    def test_a_tap_in_a_bridge(self):
        self.existing_tap()
        self.lab.host.ip("link", "add", "br-lan", "type", "bridge")
        self.addCleanup(self.remove, ["br-lan"])
        self.lab.host.ip("link", "set", TAP, "master", "br-lan")
        daemon = self.warned(f"101={TAP}", "a port of br-lan", f"ip link set {TAP} nomaster")
        with self.subTest("what the warning says is so"):
            self.lab.host.ip("link", "set", "br-lan", "up")
            tap = Tap(self.lab.host, TAP)
            self.addCleanup(tap.close)
            daemon.attached(TAP)
            eventually("the port forwards", lambda: self.lab.host.run(
                "cat", f"/sys/class/net/{TAP}/brport/state").strip() == FORWARDING)
            with self.lab.host.entered():
                bridge = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETHER_TYPE))
                bridge.bind(("br-lan", ETHER_TYPE))
            self.addCleanup(bridge.close)
            flooded, sent = experiment("0200000000c1"), experiment("0200000000c2")
            bridge.send(bytes.fromhex(flooded))
            self.assertTrue(tap.receive(flooded), "the guest hears what the bridge floods")
            before = daemon.port(TAP)["from_guest"]["out_frames"]
            tap.send(sent)
            eventually("it is carried", lambda: daemon.port(TAP)["from_guest"]["out_frames"] > before)
            bridge.setblocking(False)
            with self.assertRaises(BlockingIOError):
                bridge.recv(2048)

    def test_a_tap_with_an_address_of_the_hosts(self):
        self.existing_tap()
        self.lab.host.ip("address", "add", "192.0.2.1/24", "dev", TAP)
        self.warned(f"101={TAP}", "192.0.2.1", f"ip address flush dev {TAP}", "internal:")

    def test_a_vm_on_a_tap_that_is_set_down(self):
        daemon = self.serve("--map", f"101={TAP}", taps=[TAP])
        tap = Tap(self.lab.host, TAP)
        self.addCleanup(tap.close)
        daemon.attached(TAP)
        self.lab.host.ip("link", "set", TAP, "down")
        self.assertIn(f"ip link set {TAP} up", daemon.says(f"{TAP}: down"))
        self.lab.host.ip("link", "set", TAP, "up")
        daemon.says(f"{TAP}: up")

    def test_an_uplink_whose_mtu_is_too_small_for_two_tags(self):
        self.warned(f"101.5={TAP}", "1504", "--set-uplink-mtu", f"ip link set {UPLINK} mtu 1504")


class WhatQemuSays(Checks):
    """The table of docs/libvirt.md, row by row."""

    def said(self, mapping, devices=(), wrapper=()):
        """What QEMU says when it does not start on this."""
        self.serve("--map", mapping, taps=[TAP])
        guest = Guest(self.lab, devices or tap_devices(TAP, "e1000"), wrapper=wrapper)
        self.addCleanup(guest.close)
        eventually("QEMU gives up", lambda: guest.process.poll() is not None)
        return guest.errors.read_text()

    def documented(self, error):
        said = "could not configure /dev/net/tun (tap-web1):"
        text = documents.section(QEMU)
        self.assertIn(said, text)
        self.assertIn(f"| `{error}` |", text)
        return f"{said} {error}"

    def test_not_the_owner(self):
        error = self.documented("Operation not permitted")
        self.assertIn(error, self.said(f"101={TAP},owner=root", wrapper=without_privileges()))

    def test_queues_that_disagree(self):
        error = self.documented("Invalid argument")
        with self.subTest("the tap has several"):
            self.assertIn(error, self.said(f"101={TAP},queues=2"))
        self.doCleanups()
        with self.subTest("the guest has several"):
            devices = tap_devices(TAP, "virtio-net-pci", netdev=",queues=2", device=",mq=on")
            self.assertIn(error, self.said(f"101={TAP}", devices))

    def test_another_process_has_it(self):
        error = self.documented("Device or resource busy")
        self.lab.host.ip("tuntap", "add", TAP, "mode", "tap")
        tap = Tap(self.lab.host, TAP)
        self.addCleanup(tap.close)
        self.assertIn(error, self.said(f"101={TAP}"))


class QemuWithoutPrivileges(Checks):
    """A QEMU that may do nothing but open the tap it was given."""

    def boots(self, options, wrapper):
        self.serve("--map", f"101={TAP},{options}", taps=[TAP])
        guest = Guest(self.lab, tap_devices(TAP, "virtio-net-pci"), wrapper=wrapper)
        self.addCleanup(guest.close)
        self.agent = guest.ready()
        self.configure()
        self.both_ways()

    def test_as_owner(self):
        self.assertIn("owner=qemu-user", documents.maps(QEMU)[0])
        # As documented, to the letter.
        self.assertIn(" ".join(tap_devices(TAP, "e1000")[:2]), documents.section(QEMU))
        self.boots(f"owner={USER}", without_privileges())

    def test_as_a_member_of_the_group(self):
        self.boots(f"group={GROUP}", without_privileges())


def without_privileges():
    """Words that drop what root has, where /dev/net/tun is open to all, as Debian's udev makes it."""
    opened = 'mount -t tmpfs tmpfs /dev/net && mknod -m 666 /dev/net/tun c 10 200 && exec "$@"'
    return [
        "unshare", "--mount", "sh", "-c", opened, "sh",
        "setpriv", f"--reuid={USER}", f"--regid={GROUP}", "--clear-groups", "--inh-caps=-all", "--no-new-privs", "--pdeathsig", "KILL",
    ]
