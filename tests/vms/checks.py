"""What tests ask of a guest that is reachable, and of a host that must not be."""

import contextlib
import socket
import struct
import unittest

from agent import internet_checksum
from lab import Daemon, far_address, guest_address, shared

TCP_LENGTH = 1 << 20
HOST_ADDRESS, HOST_PORT = "10.9.9.9", 9999


class Checks(unittest.TestCase):
    """For tests with a guest: `agent` obeys in it. Nothing of it outlives its test."""

    agent = None

    @property
    def lab(self):
        return shared()

    def configure(self, device="eth0", label="101"):
        """Sets a device of the guest up, with its addresses."""
        self.agent.run(
            f"until ip link set {device} up; do sleep 0.1; done; ip address flush dev {device} scope global;"
            f"ip address add {guest_address(4, label)}/24 dev {device};"
            f"ip address add {guest_address(6, label)}/64 dev {device} nodad"
        )

    def both_ways(self, label="101", mtu=1500):
        """Pings small and full-size, each from scratch, from both ends, by both families."""
        far, agent = self.lab.far, self.agent
        for family, headers in ((4, 28), (6, 48)):
            far_side, guest_side = far_address(family, label), guest_address(family, label)
            for size in (56, mtu - headers):
                with self.subTest(family=family, size=size):
                    far.run(f"ip neighbour flush dev v{label}")
                    far.call("ping", address=guest_side, size=size)
                    agent.run("ip neighbour flush all")
                    agent.call("ping", address=far_side, size=size)

    # Bytes the guest's TCP takes unread; 0 for what its kernel chooses.
    guest_buffer = 0

    def tcp(self, label="101"):
        """A stream each way, compared by its digest."""
        for family in (4, 6):
            for sender, receiver, address in (
                (self.lab.far, self.agent, guest_address(family, label)),
                (self.agent, self.lab.far, far_address(family, label)),
            ):
                with self.subTest(family=family, sender=sender.name):
                    buffer = self.guest_buffer if receiver is self.agent else 0
                    receiver.call("tcp_listen", name="tcp", address=address, port=5001, buffer=buffer)
                    receiving = receiver.start("tcp_receive", name="tcp")
                    sent = sender.call("tcp_send", address=address, port=5001, length=TCP_LENGTH)
                    self.assertEqual(receiver.result(receiving), sent)

    def serve(self, *arguments, taps=()):
        """Starts vlanswitchd; at the end of the test it must account for every frame."""
        daemon = Daemon(self.lab.host, *arguments)
        self.addCleanup(self.remove, taps)
        self.addCleanup(daemon.stop)
        self.lab.switch.forget()
        return daemon

    def remove(self, taps):
        for tap in taps:
            self.lab.host.ip("link", "del", tap, check=False)


@contextlib.contextmanager
def listening_host(lab):
    """An address of the host's, and a socket there: what reaches it has passed the seal."""
    lab.host.ip("address", "replace", f"{HOST_ADDRESS}/32", "dev", "lo")
    with lab.host.entered():
        ear = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        ear.bind((HOST_ADDRESS, HOST_PORT))
    with ear:
        ear.setblocking(False)
        yield ear


def heard(ear):
    """All that has come so far."""
    said = []
    with contextlib.suppress(BlockingIOError):
        while True:
            said.append(ear.recv(2048))
    return said


def datagram_to_host(text, source="525400123456"):
    """A broadcast frame that any IP stack in its way with the host's address would take."""
    body = struct.pack("!HHHH", HOST_PORT, HOST_PORT, 8 + len(text), 0) + text
    addresses = socket.inet_aton("10.9.8.8") + socket.inet_aton(HOST_ADDRESS)
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 1, 0, 64, socket.IPPROTO_UDP, 0) + addresses
    header = header[:10] + struct.pack("!H", internet_checksum(header)) + header[12:]
    return ("ff" * 6 + source + "0800" + (header + body).hex()).ljust(120, "0")
