"""What one end of the wire does when it is told to: in a guest, or at the far end.

The same program runs in a guest (on its second serial port) and in the far end's
namespace (on a pipe). It takes one JSON object a line, `{"id": 1, "call": "ping",
"arguments": {...}}`, runs the function of that name below in a thread of its own,
and answers `{"id": 1, "result": ...}` or `{"id": 1, "error": "..."}`. Calls may
overlap, so that one waits for a frame while the next sends it.

Only the standard library, and little of it: the guest carries what this file
imports and nothing else, and its processor is emulated.
"""

import hashlib
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time

PACKET_MULTICAST_MEMBERSHIP = (263, 1, 0)  # SOL_PACKET, PACKET_ADD_MEMBERSHIP, PACKET_MR_MULTICAST
SO_BINDTODEVICE = 25
GROUP_PORT = 5353
CHUNK = 65536

kept = {}


def run(command, patience=60):
    """Runs a shell command; returns its status and all that it said."""
    done = subprocess.run(
        ["/bin/sh", "-c", command],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=patience,
    )
    return {"status": done.returncode, "output": done.stdout.decode(errors="replace")}


def reach(address, port, device=None):
    """A socket address; a link-local one needs its device."""
    if ":" not in address:
        return (address, port)
    return (address, port, 0, socket.if_nametoindex(device) if device else 0)


def internet_checksum(message):
    message += b"\0" * (len(message) % 2)
    total = sum(struct.unpack(f"!{len(message) // 2}H", message))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def ping(address, device=None, size=56, count=1, patience=8):
    """Pings until `count` answers came back whole; returns the number of tries.

    Of our own, because busybox's has no deadline for the first answer and does not
    compare what comes back.
    """
    six = ":" in address
    family, protocol = (
        (socket.AF_INET6, socket.IPPROTO_ICMPV6) if six else (socket.AF_INET, socket.IPPROTO_ICMP)
    )
    request, reply = (128, 129) if six else (8, 0)
    identity = threading.get_native_id() & 0xFFFF
    body = bytes(index & 0xFF for index in range(size))
    answered, tries, last = 0, 0, "no answer"
    with socket.socket(family, socket.SOCK_RAW, protocol) as raw:
        if device:
            raw.setsockopt(socket.SOL_SOCKET, SO_BINDTODEVICE, device.encode() + b"\0")
        while answered < count:
            # Tries, not time: the whole machine may be suspended now and then.
            if tries >= 2 * patience:
                raise TimeoutError(
                    f"{address}: {answered} of {count} pings of {size} bytes answered in {tries} tries: {last}"
                )
            tries += 1
            header = struct.pack("!BBHHH", request, 0, 0, identity, tries)
            if not six:
                checksum = internet_checksum(header + body)
                header = struct.pack("!BBHHH", request, 0, checksum, identity, tries)
            try:
                raw.sendto(header + body, reach(address, 0, device))
                until = time.monotonic() + 0.5
                while (left := until - time.monotonic()) > 0:
                    raw.settimeout(left)
                    got = raw.recv(CHUNK)
                    got = got if six else got[(got[0] & 15) * 4:]
                    if got[0] == reply and struct.unpack("!HH", got[4:8]) == (identity, tries):
                        if got[8:] != body:
                            raise ValueError(f"{address}: the answer differs from what was sent")
                        answered += 1
                        break
            except OSError as error:
                last = str(error)
                # Neighbour discovery that has failed fails at once from then on.
                if not isinstance(error, TimeoutError):
                    time.sleep(0.1)
    return tries


def group_address(number):
    """Groups whose MAC addresses differ."""
    return f"ff02::1:{0x8000 + number:x}"


def join_groups(device, count):
    """Joins so many multicast groups and starts to note which ones are heard."""
    index = socket.if_nametoindex(device)
    listener = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    listener.bind(("::", GROUP_PORT))
    for number in range(count):
        group = socket.inet_pton(socket.AF_INET6, group_address(number))
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, group + struct.pack("@I", index))
    kept["groups"] = (listener, set())


def heard_groups(count, patience=1):
    """The number of groups heard, once they are so many or no more come for `patience` seconds."""
    listener, heard = kept["groups"]
    listener.settimeout(patience)
    try:
        while len(heard) < count:
            heard.add(listener.recv(2048))
    except TimeoutError:
        pass
    return len(heard)


def leave_groups():
    """Leaves them all."""
    kept.pop("groups")[0].close()


def send_to_groups(device, count):
    """Sends one datagram to each group, naming the group in it."""
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sender:
        for number in range(count):
            group = group_address(number)
            sender.sendto(group.encode(), reach(group, GROUP_PORT, device))
            # The receiver may be an emulated NIC with a ring of a few frames.
            time.sleep(0.002)


def watch(name, device, protocol, multicast=None):
    """Notes all frames of an EtherType from now on, those to `multicast` included."""
    raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(protocol))
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    raw.bind((device, protocol))
    if multicast:
        level, option, kind = PACKET_MULTICAST_MEMBERSHIP
        request = struct.pack("@iHH8s", socket.if_nametoindex(device), kind, 6, bytes.fromhex(multicast))
        raw.setsockopt(level, option, request)
    kept[name] = (raw, [])


def watched(name, frame=None, patience=10):
    """The frames noted, in hexadecimal; waits until `frame` is among them."""
    raw, frames = kept[name]
    deadline = time.monotonic() + patience
    while True:
        raw.settimeout(0.2)
        try:
            frames.append(raw.recv(CHUNK).hex())
        except TimeoutError:
            if frame is None or time.monotonic() > deadline:
                return frames
        if frame in frames:
            return frames


def unwatch(name):
    """Ends a watch."""
    kept.pop(name)[0].close()


def send_frame(device, frame, seconds=0):
    """Sends a frame, given in hexadecimal, once, or until `enough` is said; returns how often."""
    sent, end = 0, time.monotonic() + seconds
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
        raw.bind((device, 0))
        while not sent or time.monotonic() < end and not kept.pop("enough", False):
            raw.send(bytes.fromhex(frame))
            sent += 1
    return sent


def enough():
    """Ends a `send_frame`."""
    kept["enough"] = True


def tcp_listen(name, address, port, buffer=0):
    """Opens a port for `tcp_receive`; `buffer` bounds TCP's window."""
    listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if buffer:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    listener.bind(reach(address, port))
    listener.listen(1)
    kept[name] = listener


def tcp_receive(name, patience=60):
    """Takes one connection; returns the length and digest of what came."""
    listener = kept.pop(name)
    listener.settimeout(patience)
    with listener:
        connection = listener.accept()[0]
    connection.settimeout(patience)
    digest, length = hashlib.sha256(), 0
    with connection:
        while chunk := connection.recv(CHUNK):
            digest.update(chunk)
            length += len(chunk)
    return [length, digest.hexdigest()]


def tcp_send(address, port, length, patience=60):
    """Sends random bytes; returns their length and digest."""
    digest, left = hashlib.sha256(), length
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as connection:
        connection.settimeout(patience)
        connection.connect(reach(address, port))
        while left:
            chunk = os.urandom(min(left, CHUNK))
            connection.sendall(chunk)
            digest.update(chunk)
            left -= len(chunk)
    return [length, digest.hexdigest()]


def flood(address, port, size, seconds):
    """Sends datagrams as fast as it can; returns how many."""
    sent, end = 0, time.monotonic() + seconds
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as sender:
        while time.monotonic() < end:
            try:
                sender.sendto(bytes(size), (address, port))
                sent += 1
            except OSError:
                time.sleep(0.01)
    return sent


def answer(out, writing, request):
    try:
        reply = {"id": request["id"], "result": globals()[request["call"]](**request["arguments"])}
    except Exception as error:
        reply = {"id": request["id"], "error": f"{type(error).__name__}: {error}"}
    with writing:
        out.write(json.dumps(reply).encode() + b"\n")
        out.flush()


def main():
    """Serves on a device named as an argument, else on standard input and output."""
    port = sys.argv[1] if len(sys.argv) > 1 else None
    incoming = open(port, "rb", buffering=0) if port else sys.stdin.buffer
    out = open(port, "wb", buffering=0) if port else sys.stdout.buffer
    writing = threading.Lock()
    with writing:
        out.write(b'{"id": 0, "result": "ready"}\n')
        out.flush()
    waiting = b""
    while chunk := os.read(incoming.fileno(), CHUNK):
        *lines, waiting = (waiting + chunk).split(b"\n")
        for line in lines:
            threading.Thread(target=answer, args=(out, writing, json.loads(line)), daemon=True).start()


if __name__ == "__main__":
    main()
