#!/usr/bin/env python3
"""Numbered frames both ways through a switch, until standard input ends.

    traffic.py WIRE VLAN GUEST

On WIRE frames are tagged with VLAN, on GUEST they are not. Prints `flowing` when the first
have arrived both ways, and at the end what was sent, what is missing, and what came twice
or out of order, as JSON.
"""

import json
import select
import socket
import struct
import sys
import threading
import time

MAGIC = b"vlanswitchd-test"
INTERVAL = 0.001
ETH_P_ALL, PACKET_OUTGOING = 3, 4


class End:
    """One end: what it sends, and what it got from the other."""

    def __init__(self, device, vlan, number):
        self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
        self.socket.bind((device, 0))
        self.number = number
        addresses = bytes([2, 0, 0, 0, 0, 1 - number, 2, 0, 0, 0, 0, number])
        self.header = addresses + (struct.pack("!HH", 0x8100, vlan) if vlan else b"") + b"\x88\xb5" + MAGIC
        self.sent = 0
        self.got = []
        self.last = None
        self.pause = 0.0

    def send(self):
        self.socket.send(self.header + struct.pack("!BI", self.number, self.sent) + bytes(40))
        self.sent += 1

    def receive(self):
        frame, address = self.socket.recvfrom(2048)
        place = frame.find(MAGIC)
        if address[2] != PACKET_OUTGOING and place > 0:
            sender, count = struct.unpack_from("!BI", frame, place + len(MAGIC))
            if sender != self.number:
                now = time.monotonic()
                self.pause = max(self.pause, now - (self.last or now))
                self.last = now
                self.got.append(count)


def receive(ends, stop):
    by_socket = {end.socket: end for end in ends}
    while not stop.is_set():
        for ready in select.select(list(by_socket), [], [], 0.1)[0]:
            by_socket[ready].receive()


def verdict(sender, receiver):
    got = set(receiver.got)
    missing = [number for number in range(sender.sent) if number not in got]
    return {
        "sent": sender.sent,
        "missing": len(missing),
        "first_missing": missing[:1],
        "last_missing": missing[-1:],
        "longest_pause_ms": round(1000 * receiver.pause),
        "twice": len(receiver.got) - len(got),
        "unordered": sum(1 for one, next in zip(receiver.got, receiver.got[1:]) if next < one),
    }


def main():
    wire, vlan, guest = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    ends = [End(wire, vlan, 0), End(guest, None, 1)]
    stop = threading.Event()
    reader = threading.Thread(target=receive, args=(ends, stop))
    reader.start()
    told, due = False, time.monotonic()
    while not select.select([sys.stdin], [], [], 0)[0]:
        for end in ends:
            end.send()
        if not told and all(end.got for end in ends):
            print("flowing", flush=True)
            told = True
        due += INTERVAL
        time.sleep(max(0.0, due - time.monotonic()))
    # What is still on its way.
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and any(len(one.got) < other.sent for one, other in (ends, ends[::-1])):
        time.sleep(0.02)
    stop.set()
    reader.join()
    print(json.dumps({"to_guest": verdict(*ends), "to_wire": verdict(*ends[::-1])}), flush=True)


main()
