"""Taps that come and go, as libvirt's do, and are changed by others meanwhile.

The VMM is played by this process, which opens the tap's descriptor as QEMU does.
"""

import datetime
import fcntl
import json
import socket
import statistics
import struct
import time

from checks import Checks, datagram_to_host, heard, listening_host
from lab import PATIENCE, Namespace, eventually, far_address, guest_address, run
from tap import ETHER_TYPE, TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6, Tap, experiment

TAP, OTHER = "tap-web1", "tap-other"
LIFETIMES, FLIPS = 30, 200
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1
# What a tap holds for its guest (TUN_READQ_SIZE, drivers/net/tun.c).
TAP_QUEUE = 1000


class TapsThatAppear(Checks):
    def setUp(self):
        self.daemon = self.serve("--map", f"101={TAP},create=no")
        self.lab.far.call("watch", name="taps", device="v101", protocol=ETHER_TYPE)
        self.addCleanup(self.lab.far.call, "unwatch", name="taps")

    def tap(self, name=TAP):
        tap = Tap(self.lab.host, name)
        self.addCleanup(tap.close)
        return tap

    def is_now(self, state):
        eventually(f"{TAP} is {state}", lambda: self.daemon.port(TAP)["state"] == state)

    def passes(self, tap):
        """A frame arrives each way, and none reaches the host."""
        far, frame = self.lab.far, experiment("0200000000b1")
        with listening_host(self.lab) as ear:
            tap.send(datagram_to_host(b"from a tap"))
            tap.send(frame)
            self.assertIn(frame, far.call("watched", name="taps", frame=frame))
            self.assertEqual(heard(ear), [])
        frame = experiment("0200000000a1")
        far.call("send_frame", device="v101", frame=frame)
        self.assertTrue(tap.receive(frame), "a frame to the guest arrives")

    def messages_with(self, text):
        return [line for line in list(self.daemon.log) if text in line]

    def test_attached_soon_after_it_appears(self):
        delays = []
        for number in range(1, LIFETIMES + 1):
            tap = self.tap()
            eventually("it is attached", lambda: len(self.messages_with(f"{TAP}: attached")) == number)
            said = json.loads(self.messages_with(f"{TAP}: attached")[-1])["timestamp"]
            said = datetime.datetime.fromisoformat(said.replace("Z", "+00:00")).timestamp()
            delays.append(1000 * (said - tap.made_at))
            self.passes(tap)
            tap.close()
            eventually("it is gone", lambda: len(self.messages_with(f"{TAP}: gone")) == number)
        middle, worst = statistics.median(delays), max(delays)
        print(f"     from a tap's appearance to attached: median {middle:.1f} ms, worst {worst:.1f} ms of {LIFETIMES}")

    def test_deleted_and_made_again_in_haste(self):
        for _ in range(LIFETIMES):
            self.tap().close()
        tap = self.tap()
        self.is_now("attached")
        self.passes(tap)

    def test_set_up_by_its_maker_meanwhile(self):
        """As libvirt does: it reads the flags, and writes them with one more."""
        with self.lab.host.entered():
            requests = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.addCleanup(requests.close)
        for number in range(1, LIFETIMES + 1):
            tap = self.tap()

            def is_attached():
                flags = fcntl.ioctl(requests, SIOCGIFFLAGS, struct.pack("16sH22x", TAP.encode(), 0))
                value = struct.unpack("16sH22x", flags)[1]
                fcntl.ioctl(requests, SIOCSIFFLAGS, struct.pack("16sH22x", TAP.encode(), value | IFF_UP))
                return len(self.messages_with(f"{TAP}: attached")) == number

            deadline = time.monotonic() + PATIENCE
            while not is_attached():
                self.assertLess(time.monotonic(), deadline, self.daemon.messages())
            tap.close()
            eventually("it is gone", lambda: len(self.messages_with(f"{TAP}: gone")) == number)
        tap = self.tap()
        self.is_now("attached")
        self.passes(tap)

    def test_renamed(self):
        tap = self.tap()
        self.is_now("attached")
        self.rename(TAP, OTHER)
        self.is_now("absent")
        with listening_host(self.lab) as ear:
            # It is no port any more: the host has it back as it was, and hears it.
            self.lab.host.ip("link", "set", OTHER, "up")
            tap.send(datagram_to_host(b"no port"))
            eventually("the host hears a tap that is no port", lambda: heard(ear))
        self.rename(OTHER, TAP)
        self.is_now("attached")
        self.passes(tap)

    def rename(self, old, new):
        # Before Linux 6.2 a device must be down for it.
        self.lab.host.ip("link", "set", old, "down")
        self.lab.host.ip("link", "set", old, "name", new)
        self.lab.host.ip("link", "set", new, "up")

    def test_another_takes_its_name(self):
        first, second = self.tap(), self.tap(OTHER)
        self.is_now("attached")
        first.close()
        self.rename(OTHER, TAP)
        eventually("the other is attached", lambda: len(self.messages_with(f"{TAP}: attached")) == 2)
        self.is_now("attached")
        self.passes(second)

    def test_moved_to_another_namespace_and_back(self):
        tap = self.tap()
        self.is_now("attached")
        elsewhere = Namespace("elsewhere")
        self.addCleanup(elsewhere.close)
        self.lab.host.ip("link", "set", TAP, "netns", elsewhere.name)
        self.is_now("absent")
        elsewhere.ip("link", "set", TAP, "netns", self.lab.host.name)
        self.is_now("attached")
        self.passes(tap)

    def test_set_down_and_up(self):
        tap = self.tap()
        self.is_now("attached")
        self.lab.host.ip("link", "set", TAP, "down")
        self.is_now("down")
        self.lab.far.call("send_frame", device="v101", frame=experiment("0200000000a1"))
        self.lab.host.ip("link", "set", TAP, "up")
        self.is_now("attached")
        self.passes(tap)

    def test_its_mtu_is_changed(self):
        """Frames that no longer fit are counted, and fit again later."""
        tap = self.tap()
        self.is_now("attached")
        self.lab.host.ip("link", "set", TAP, "mtu", 600)
        eventually("a frame is counted as too long", lambda: (
            self.lab.far.call("send_frame", device="v101", frame=experiment("0200000000a1", 1400)),
            self.daemon.port(TAP)["to_guest"]["drops"].get("too_long"),
        )[1])
        self.passes(tap)
        self.lab.host.ip("link", "set", TAP, "mtu", 9000)
        frame = experiment("0200000000a1", 1400)
        # Netlink tells the switch in its own time.
        eventually("a long frame arrives again", lambda: (
            self.lab.far.call("send_frame", device="v101", frame=frame), tap.receive(frame, 0.2)
        )[1])
        self.passes(tap)

    def test_its_offloads_flip_under_traffic(self):
        """As when a guest's driver is reset."""
        tap = self.tap()
        self.is_now("attached")
        flood = self.lab.far.start("flood", address=f"{far_address(4, '101')[:-1]}255", port=9, size=1400, seconds=2)
        for number in range(FLIPS):
            tap.offload(0 if number % 2 else TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6)
            tap.receive("", 0.005)
        self.lab.far.result(flood)
        self.passes(tap)


class Seals(Checks):
    """What stands at a tap's tc ingress is taken away by somebody."""

    def test_a_seal_that_is_removed_is_put_back(self):
        self.lab.host.ip("tuntap", "add", TAP, "mode", "tap")
        self.lab.host.ip("link", "set", TAP, "up")
        self.addCleanup(self.remove, [TAP])
        tap = Tap(self.lab.host, TAP)
        self.addCleanup(tap.close)
        for command, cause in (
            ("qdisc del dev {} clsact", "a qdisc was removed"),
            ("filter del dev {} ingress", "a tc filter was removed"),
        ):
            with self.subTest(command):
                # Where a device is found at start, the seal stands where tc reaches it.
                daemon = self.serve("--map", f"101={TAP}")
                daemon.attached(TAP)
                self.tc(command.format(TAP))
                self.assertIn(f"{TAP}: {cause}", daemon.says("sealed again"))
                with listening_host(self.lab) as ear:
                    tap.send(datagram_to_host(b"after that"))
                    eventually("it is carried", lambda: daemon.port(TAP)["from_guest"]["out_frames"])
                    self.assertEqual(heard(ear), [])
                # Now it stands where tc does not reach it.
                self.tc(f"qdisc replace dev {TAP} clsact")
                self.tc(f"qdisc del dev {TAP} clsact")
                daemon.port(TAP)
                self.assertEqual(len([text for text in daemon.messages() if "sealed again" in text]), 1)
                daemon.stop()
                self.assertNotIn("clsact", self.tc(f"qdisc show dev {TAP}"))
                with listening_host(self.lab) as ear:
                    tap.send(datagram_to_host(b"no port"))
                    eventually("the host hears a tap that was given back", lambda: heard(ear))

    def test_queueing_that_is_removed_is_put_back(self):
        """With the kernel's default queueing a full guest queue would drop uncounted."""
        daemon = self.serve("--map", f"101={TAP}", taps=[TAP])
        tap = Tap(self.lab.host, TAP)
        self.addCleanup(tap.close)
        daemon.attached(TAP)
        root = lambda: self.tc(f"qdisc show dev {TAP} root")
        self.assertIn("noqueue", root())
        self.tc(f"qdisc del dev {TAP} root")
        self.assertNotIn("noqueue", root())
        # The report also has the daemon look at the clock.
        eventually("it is noqueue again", lambda: daemon.port(TAP) and "noqueue" in root())
        before = daemon.port(TAP)["to_guest"]
        self.lab.far.call("send_frame", device="v101", frame=experiment("0200000000a1"), seconds=1)
        eventually("a full queue is told", lambda: daemon.port(TAP)["to_guest"]["drops"].get("guest_queue_full"))
        after = daemon.port(TAP)["to_guest"]
        self.assertLessEqual(after["out_frames"] - before["out_frames"], TAP_QUEUE)
        self.tc(f"qdisc replace dev {TAP} root pfifo")
        self.assertIn("pfifo", root())

    def tc(self, words):
        return run("tc", "-netns", self.lab.host.name, *words.split())


class Containers(Checks):
    """One end of a veth pair is mapped; the other is a container's."""

    def test_a_container(self):
        device = "web2"
        daemon = self.serve("--map", f"101={device},create=no", taps=[device])
        for number in range(2):
            with self.subTest("the container comes and goes", number=number):
                box = Namespace(f"box{number}")
                self.addCleanup(box.close)
                box.sysctl("net/ipv6/conf/default/accept_dad", 0)
                self.lab.host.ip("link", "add", device, "type", "veth", "peer", "name", "eth0", "netns", box.name)
                box.ip("link", "set", "eth0", "up")
                for family, length in ((4, 24), (6, 64)):
                    box.ip("address", "add", f"{guest_address(family, '101')}/{length}", "dev", "eth0")
                daemon.attached(device)
                for family in (4, 6):
                    self.lab.far.run("ip neighbour flush dev v101")
                    self.lab.far.call("ping", address=guest_address(family, "101"), size=1400)
                box.close()
                eventually("it is gone", lambda: daemon.port(device)["state"] == "absent")
