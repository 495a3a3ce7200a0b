"""Calls the control interface with an independent client, PyPI's `varlink`.

    api.py methods SOCKET INTERFACE_FILE   every method and every error
    api.py streams SOCKET                  GetStats, Monitor and Capture with `more`
    api.py rights SOCKET UID GID GROUPS    prints: refused, reads or changes

What the daemon answers is held against the types of its own interface file before
the client's lenient reading of them. Ends with `ok` or a traceback.
"""

import base64
import os
import sys

import varlink
from varlink import scanner


class Recorder:
    """An interface, with each answer checked as it came."""

    def __init__(self, client):
        self.handler = client.open("org.vlanswitchd")
        self.interface = self.handler._interface
        inner = self.handler._next_varlink_message

        def record():
            self.answer, more = inner()
            return self.answer, more

        self.handler._next_varlink_message = record
        self.called = set()

    def __call__(self, method, **parameters):
        self.called.add(method)
        getattr(self.handler, method)(**parameters)
        conforms(self.interface, self.out_type(method), self.answer, method)
        return self.answer

    def more(self, method, **parameters):
        self.called.add(method)
        for _ in getattr(self.handler, method)(_more=True, **parameters):
            conforms(self.interface, self.out_type(method), self.answer, method)
            yield self.answer

    def out_type(self, method):
        return self.interface.get_method(method).out_type

    def close(self):
        self.handler.close()


def conforms(interface, kind, value, place):
    """Whether a value has the type, field by field, and no field besides."""
    if isinstance(kind, scanner._Maybe):
        if value is not None:
            conforms(interface, kind.element_type, value, place)
    elif isinstance(kind, scanner._CustomType):
        conforms(interface, interface.members[kind.name].type, value, f"{place}: {kind.name}")
    elif isinstance(kind, scanner._Array):
        assert isinstance(value, list), (place, value)
        for item in value:
            conforms(interface, kind.element_type, item, place)
    elif isinstance(kind, scanner._Dict):
        assert isinstance(value, dict), (place, value)
        for item in value.values():
            conforms(interface, kind.element_type, item, place)
    elif isinstance(kind, scanner._Struct):
        assert isinstance(value, dict), (place, value)
        assert set(value) <= set(kind.fields), (place, set(value) - set(kind.fields))
        for name, field in kind.fields.items():
            assert name in value or isinstance(field, scanner._Maybe), f"{place}: {name} is missing"
            conforms(interface, field, value.get(name), f"{place}.{name}")
    else:
        wanted = (int, float) if type(kind) is float else type(kind)
        assert isinstance(value, wanted), (place, kind, value)
        assert type(kind) is bool or not isinstance(value, bool), (place, value)


def refused(call, error, **parameters):
    """Calls, and expects this error with these parameters."""
    try:
        call()
    except varlink.VarlinkError as answer:
        assert answer.error() == error, (answer.error(), answer.parameters())
        given = answer.parameters() or {}
        for key, part in parameters.items():
            assert part in given[key], (error, given)
        return
    raise AssertionError(f"no {error}")


def methods(address, file):
    client = varlink.Client(address)
    interface = client.get_interface("org.vlanswitchd")
    with open(file) as text:
        assert interface.get_description() == text.read(), "the daemon ships another file"
    service = client.open("org.varlink.service")
    info = service.GetInfo()
    assert set(info["interfaces"]) == {"org.varlink.service", "org.vlanswitchd"}, info
    assert client.get_interface("org.varlink.service").get_method("GetInfo")

    api = Recorder(client)
    status = api("GetStatus")["status"]
    assert status["uplink"] == "up0" and status["ports"] == {"no_carrier": 1}, status
    assert [port["name"] for port in api("ListPorts")["ports"]] == ["tap-a1"]
    assert api("GetPort", name="tap-a1")["port"]["vlans"] == "101"

    added = api("AddPort", map="102=tap-a2,mode=access")
    assert added["port"]["mode"] == "access" and added["notes"] == [], added
    changes = [{"key": "vlan", "value": "103"}, {"key": "pcp", "value": "5"}]
    port = api("SetPort", name="tap-a2", changes=changes)["port"]
    assert (port["vlans"], port["options"]["pcp"]) == ("103", "5"), port
    # There is one worker: it stays with it.
    assert api("MovePort", name="tap-a2", worker=0)["port"]["name"] == "tap-a2"
    toml = api("GetConfig")["toml"]
    assert 'device = "tap-a2"' in toml and "103" in toml, toml
    assert len(api("GetStats")["stats"]["ports"]) == 2
    assert isinstance(api("ListDrops")["drops"], list)
    findings = api("Examine")["findings"]
    assert any(finding["about"] == "tap-a1" for finding in findings), findings
    removed = api("RemovePort", name="tap-a2")
    # The tap it made may have a VM on it by now: it stays, and that is said.
    assert len(removed["notes"]) == 1 and "ip link delete tap-a2" in removed["notes"][0], removed
    assert len(api("ListPorts")["ports"]) == 1

    # The lab has this one on the packet path, or on the other.
    assert isinstance(api("Detach")["notes"], list)
    assert api("GetStatus")["status"]["datapath"] == "packet"

    # The file the daemon was started with has another port by now.
    plan = api("ReloadConfig", dry_run=True)
    assert plan["added"] == ["tap-a3"], plan
    assert len(api("ListPorts")["ports"]) == 1
    assert api("ReloadConfig")["added"] == ["tap-a3"]
    assert api("AddPort", map="104=tap-a4", persist=True)["notes"] == []

    ours, service = "org.vlanswitchd.", "org.varlink.service."
    for method in ("GetPort", "RemovePort"):
        refused(lambda: api(method, name="nobody"), ours + "NoSuchPort", name="nobody")
    refused(lambda: api("MovePort", name="nobody", worker=0), ours + "NoSuchPort", name="nobody")
    refused(lambda: api("MovePort", name="tap-a1", worker=1), ours + "Refused", message="no worker 1")
    refused(lambda: api("SetPort", name="nobody", changes=[]), ours + "NoSuchPort", name="nobody")
    refused(lambda: api("AddPort", map="5000=t"), ours + "Refused", message="5000")
    refused(lambda: api("AddPort", map="101=tap-a9"), ours + "Refused", message="101")
    changes = [{"key": "colour", "value": "red"}]
    refused(lambda: api("SetPort", name="tap-a1", changes=changes), ours + "Refused", message="colour")
    refused(lambda: api("Monitor"), service + "ExpectedMore")
    refused(lambda: api("Capture"), service + "ExpectedMore")
    wrong = lambda: list(api.more("Capture", filter="no program"))
    refused(wrong, ours + "Refused", message="filter")
    refused(lambda: list(api.more("Capture", port="nobody")), ours + "NoSuchPort", name="nobody")

    other = lambda: api("HandOver", format=1, uplink="other0")
    refused(other, ours + "Refused", message="other0")
    refused(lambda: api("HandOver", format=99, uplink="up0"), ours + "OtherFormat")

    # What the client would not let through.
    handler = api.handler

    def send(method, parameters):
        handler._send_message(varlink.VarlinkEncoder().encode(
            {"method": method, "parameters": parameters}).encode())
        return handler._next_varlink_message()

    refused(lambda: send(ours + "GetPort", {}), service + "InvalidParameter", parameter="name")
    refused(lambda: send(ours + "Fly", {}), service + "MethodNotFound", method="Fly")
    refused(lambda: send("org.other.Fly", {}), service + "InterfaceNotFound", interface="org.other")
    # No answer to a call that wants none; the next is answered.
    handler.GetStatus(_oneway=True)
    assert api("GetPort", name="tap-a1")["port"]["name"] == "tap-a1"

    every = {name for name, member in interface.members.items() if isinstance(member, scanner._Method)}
    streams_only = {"Monitor", "Capture"}
    assert api.called == every, every ^ api.called
    assert every - streams_only, "the interface file has no methods"
    api.close()


def streams(address):
    client = varlink.Client(address)
    caller = Recorder(client)

    api = Recorder(client)
    times = []
    for reply in api.more("GetStats", interval=100):
        times.append(reply["stats"]["time"])
        if len(times) == 4:
            break
    assert times == sorted(set(times)), times
    api.close()

    api = Recorder(client)
    events = api.more("Monitor")
    # The first answer is an event: it is asked for before there is one, and the call
    # is on its way when the next line runs only if it was sent.
    import threading

    seen = []
    listening = threading.Thread(target=lambda: seen.append(next(events)["event"]))
    listening.start()
    while not seen:
        caller("AddPort", map="105=tap-s1")
        caller("RemovePort", name="tap-s1")
        listening.join(0.05)
    assert seen[0]["kind"] in ("port_added", "port_removed"), seen
    assert seen[0]["device"] == "tap-s1", seen
    api.close()

    api = Recorder(client)
    caller("AddPort", map="106=tap-s2")
    pieces = b""
    for reply in api.more("Capture", port="uplink", limit=3):
        pieces += base64.b64decode(reply["pcapng"])
    # A section header, an interface, and at least three packets.
    assert pieces[:4] == b"\x0a\x0d\x0d\x0a", pieces[:16]
    order = "big" if pieces[8:12] == b"\x1a\x2b\x3c\x4d" else "little"
    kinds, place = [], 0
    while place < len(pieces):
        kinds.append(int.from_bytes(pieces[place:place + 4], order))
        length = int.from_bytes(pieces[place + 4:place + 8], order)
        assert length >= 12 and length % 4 == 0, (place, length)
        place += length
    assert place == len(pieces) and kinds.count(6) == 3, kinds
    # The limit ended the capture, and the connection goes with it.
    caller("RemovePort", name="tap-s2")
    caller.close()


def rights(address, uid, gid, groups):
    os.setgroups([int(group) for group in groups.split(",") if group])
    os.setresgid(int(gid), int(gid), int(gid))
    os.setresuid(int(uid), int(uid), int(uid))
    client = varlink.Client.new_with_address(address)
    try:
        api = Recorder(client)
    except (PermissionError, varlink.error.ConnectionError, ConnectionError):
        print("refused")
        return
    changing = [
        lambda: api("AddPort", map="107=tap-r1"),
        lambda: api("SetPort", name="tap-r1", changes=[{"key": "pcp", "value": "1"}]),
        lambda: api("RemovePort", name="tap-r1"),
        lambda: api("ReloadConfig", dry_run=True),
        lambda: api("Detach"),
    ]
    # Everything that only reads works for all who get in.
    for method in ("GetStatus", "ListPorts", "GetStats", "ListDrops", "GetConfig", "Examine"):
        api(method)
    try:
        for change in changing:
            change()
        print("changes")
    except varlink.VarlinkError as answer:
        assert answer.error() == "org.varlink.service.PermissionDenied", answer
        for change in changing + [lambda: next(api.more("Capture"))]:
            refused(change, "org.varlink.service.PermissionDenied")
        print("reads")
    api.close()


if __name__ == "__main__":
    {"methods": methods, "streams": streams, "rights": rights}[sys.argv[1]](*sys.argv[2:])
    print("ok")
