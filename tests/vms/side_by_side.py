#!/usr/bin/python3 -B
"""The problem that vlanswitchd was written for: one guest, on macvtap and on vlanswitchd.

An e1000 tells its host nothing about what it listens to, so macvtap filters by what it
knows: the guest's first MAC address and broadcast. IPv6 asks for an address by a
multicast group made from that address, and nobody hears it.
"""

import contextlib
import os
import re
import stat
import sys

import image
from guest import MAC, Guest, tap_devices
from lab import Daemon, far_address, guest_address, run, shared

MODEL, VID, TAP, MACVTAP, LOWER = "e1000", "101", "tap-web1", "macvtap0", "nic0"
OTHER_MAC = "02:00:5e:10:20:30"
ADDRESSES, GROUPS = 8, 100
# A try for each address is enough where nothing is lost; this many seconds is generous.
PING_PATIENCE = 3
LLDP_ADDRESS, ETH_P_LLDP = "0180c200000e", 0x88CC
COLUMNS = ("macvtap", "+allmulti", "vlanswitchd")


def compare(lab):
    """Rows of a table: what was tried, and how it went in each of COLUMNS."""
    ways = (macvtap(lab, ()), macvtap(lab, ("allmulticast", "on")), vlanswitchd(lab))
    columns = []
    for way in ways:
        with way as guest:
            columns.append(try_all(lab, guest.ready()))
    return [(what, [column[what] for column in columns]) for what in columns[0]]


@contextlib.contextmanager
def macvtap(lab, settings):
    """The guest on a macvtap as libvirt makes it, on a device that carries the VLAN untagged."""
    # An access port in place of a VLAN device, which not every kernel has.
    lab.wire(lab.host, LOWER, f"a-{LOWER}")
    lab.switch.port("br0", f"a-{LOWER}", f"tag={VID}")
    try:
        # IPv6 as on any host: it makes the host itself join groups on the macvtap.
        lab.host.sysctl("net/ipv6/conf/default/disable_ipv6", 0)
        lab.host.ip("link", "add", "link", LOWER, "name", MACVTAP, "address", MAC, "type", "macvtap", "mode", "bridge")
        lab.host.sysctl("net/ipv6/conf/default/disable_ipv6", 1)
        lab.host.ip("link", "set", MACVTAP, "up", *settings)
        with open_macvtap(lab) as descriptor:
            devices = [
                "-netdev", f"tap,id=net0,fd={descriptor}", "-device", f"{MODEL},netdev=net0,mac={MAC}",
            ]
            guest = Guest(lab, devices, pass_fds=(descriptor,))
            try:
                yield guest
            finally:
                guest.close()
    finally:
        lab.switch.vsctl("del-port", f"a-{LOWER}")
        lab.host.ip("link", "del", LOWER)


@contextlib.contextmanager
def open_macvtap(lab):
    """Its character device, which a host's udev would have made."""
    number = lab.host.link(MACVTAP)["ifindex"]
    major, minor = lab.host.run("cat", f"/sys/class/net/{MACVTAP}/tap{number}/dev").split(":")
    node = lab.folder / f"tap{number}"
    os.mknod(node, 0o600 | stat.S_IFCHR, os.makedev(int(major), int(minor)))
    with lab.host.entered():
        descriptor = os.open(node, os.O_RDWR)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
        node.unlink()


@contextlib.contextmanager
def vlanswitchd(lab):
    """The guest on a tap of vlanswitchd's, behind the trunk."""
    daemon = Daemon(lab.host, "--map", f"{VID}={TAP}")
    try:
        guest = Guest(lab, tap_devices(TAP, MODEL))
        try:
            yield guest
        finally:
            guest.close()
        daemon.stop()
    finally:
        daemon.kill()
        lab.host.ip("link", "del", TAP, check=False)


def try_all(lab, agent):
    """What reaches the guest; each value is (how much, of how much)."""
    far, device = lab.far, f"v{VID}"
    own = [f"{guest_address(6, VID)[:-1]}{number:x}" for number in range(0x10, 0x10 + ADDRESSES)]
    agent.run(f"ip link set eth0 up; ip address add {guest_address(4, VID)}/24 dev eth0")
    agent.run("".join(f"ip address add {address}/64 dev eth0 nodad;" for address in own))
    # Both ends are up when one has heard the other; the neighbours it learnt are forgotten.
    agent.call("ping", address=far_address(4, VID))
    results = {}

    def reached(what, *addresses):
        far.run(f"ip neighbour flush dev {device}")
        calls = [far.start("ping", address=address, patience=PING_PATIENCE) for address in addresses]
        results[what] = (sum(succeeded(far, call) for call in calls), len(calls))

    reached("IPv4 ping (by ARP, a broadcast)", guest_address(4, VID))
    reached(f"IPv6 pings to {ADDRESSES} addresses (by multicast)", *own)
    agent.call("join_groups", device="eth0", count=GROUPS)
    far.call("send_to_groups", device=device, count=GROUPS)
    results["IPv6 multicast groups, joined and heard"] = (agent.call("heard_groups", count=GROUPS), GROUPS)
    agent.call("leave_groups")
    frame = (LLDP_ADDRESS + "0000000000aa" + f"{ETH_P_LLDP:04x}" + "0207040000000000aa0403074506020078").ljust(120, "0")
    agent.call("watch", name="lldp", device="eth0", protocol=ETH_P_LLDP, multicast=LLDP_ADDRESS)
    far.call("send_frame", device=device, frame=frame)
    results["LLDP from the switch"] = (len(agent.call("watched", name="lldp", frame=frame, patience=2)), 1)
    agent.run(f"ip link set eth0 down; ip link set eth0 address {OTHER_MAC}; ip link set eth0 up")
    # The NIC takes seconds to find its link again.
    agent.run("until [ $(cat /sys/class/net/eth0/operstate) = up ]; do sleep 0.1; done")
    reached("IPv4 ping after a MAC change in the guest", guest_address(4, VID))
    return results


def succeeded(agent, call):
    with contextlib.suppress(AssertionError):
        agent.result(call)
        return True
    return False


def text(lab, rows):
    """The table for people, with all that is needed to judge it."""
    release = os.uname().release
    qemu = re.search(r"version ([\d.]+)", run("qemu-system-x86_64", "--version"))[1]
    switch = run("ovs-vswitchd", "--version").split("\n")[0].split(")")[-1].strip()
    width, cell_width = max(len(what) for what, _ in rows), max(map(len, COLUMNS))
    table = [("", COLUMNS)] + [(what, [f"{got} of {wanted}" for got, wanted in results]) for what, results in rows]
    lines = [
        f"A guest with an {MODEL} NIC in VLAN {VID}, asked from the far side of the switch.",
        f"Linux {release}; QEMU {qemu}; Open vSwitch {switch} as the switch.",
        "",
        *(f"{what:{width}}" + "".join(f"  {cell:>{cell_width}}" for cell in cells) for what, cells in table),
        "",
        "+allmulti: macvtap after `ip link set macvtap0 allmulticast on`.",
    ]
    return "\n".join(lines) + "\n"


def main():
    image.initrd()
    lab = shared()
    rows = compare(lab)
    print(text(lab, rows), end="")
    return 0 if all(got == wanted for _, results in rows for got, wanted in results[-1:]) else 1


if __name__ == "__main__":
    sys.exit(main())
