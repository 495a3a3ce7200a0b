"""A tap as a VMM has it: the descriptor's side."""

import fcntl
import itertools
import os
import select
import struct
import time

TUNSETIFF, TUNSETOFFLOAD = 0x400454CA, 0x400454D0
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6 = 0x01, 0x02, 0x04
VNET_HDR_LEN = 10
# An EtherType for local experiments (IEEE 802): nobody else's frames look like these.
ETHER_TYPE = 0x88B5

numbers = itertools.count(1)


def experiment(source, length=60):
    """A frame like no other before it."""
    return f"ffffffffffff{source}{ETHER_TYPE:04x}{next(numbers):08x}".ljust(2 * length, "0")


class Tap:
    """Opens a tap by name as QEMU does, and makes it if there is none."""

    def __init__(self, namespace, name):
        with namespace.entered():
            self.descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            request = struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR)
            try:
                fcntl.ioctl(self.descriptor, TUNSETIFF, request)
            except OSError:
                os.close(self.descriptor)
                raise
        self.made_at = time.time()

    def send(self, frame):
        os.write(self.descriptor, bytes(VNET_HDR_LEN) + bytes.fromhex(frame))

    def receive(self, frame, patience=10):
        """Waits until this frame comes; returns whether it did."""
        deadline = time.monotonic() + patience
        while (left := deadline - time.monotonic()) > 0:
            if select.select([self.descriptor], [], [], left)[0]:
                if os.read(self.descriptor, 65550)[VNET_HDR_LEN:].hex() == frame:
                    return True
        return False

    def offload(self, features):
        """What QEMU says when the guest's driver has negotiated its offloads."""
        fcntl.ioctl(self.descriptor, TUNSETOFFLOAD, features)

    def close(self):
        """A tap that is not persistent vanishes with it."""
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None
