"""The lab: a host, a switch nobody here wrote, and a far end, in namespaces of their own.

    guest == tap == vlanswitchd == uplink0 ---- trunk0 == Open vSwitch == aN ---- vN
    |------------- host -----------------|     |------- switch --------|     |- far -|

Open vSwitch runs its userspace datapath. Its trunk port carries every VLAN to the
uplink; each further port is an access port of one VLAN, or the dot1q-tunnel port of
one, behind which a second bridge plays the customer's switch. The veth pairs have
checksum and segmentation offloads off, so that what the wire carries is whole frames,
as on a wire.

All that is made here bears the process's id, dies with it, and is swept up by the
next run if it was killed.
"""

import atexit
import concurrent.futures
import contextlib
import ctypes
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

import image

PREFIX = "vsvm"
PATIENCE = 60.0
CLONE_NEWNET = 0x40000000
UPLINK = "uplink0"
# Room on the switch's side of the wire for two tags; the host's side is the test's.
SWITCH_MTU = 2000
AGENT = pathlib.Path(__file__).resolve().parent / "agent.py"


class LabError(Exception):
    """Something of the lab's own went wrong."""


def run(*command, check=True):
    """Runs a command; returns its standard output."""
    done = subprocess.run([str(word) for word in command], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if check and done.returncode:
        raise LabError(f"{' '.join(map(str, command))}: status {done.returncode}: {done.stderr}{done.stdout}")
    return done.stdout


def eventually(what, condition, patience=PATIENCE):
    """Waits until `condition` returns something true; returns that.

    Time in which this process did not run does not count: the machine may have been
    suspended, and all that is waited for with it.
    """
    waited, before = 0.0, time.monotonic()
    while True:
        if value := condition():
            return value
        if waited > patience:
            raise AssertionError(f"not within {patience:.0f} s: {what() if callable(what) else what}")
        time.sleep(0.01)
        now = time.monotonic()
        waited, before = waited + min(now - before, 1.0), now


def binary():
    """The daemon under test; VLANSWITCHD names another one."""
    default = image.CACHE.parent / "release/vlanswitchd"
    return os.environ.get("VLANSWITCHD", str(default))


class Namespace:
    """A network namespace, gone when closed."""

    def __init__(self, role):
        self.name = f"{PREFIX}-{os.getpid()}-{role}"
        run("ip", "netns", "add", self.name)
        self.ip("link", "set", "lo", "up")

    def close(self):
        run("ip", "netns", "del", self.name, check=False)

    def ip(self, *words, check=True):
        return run("ip", "-n", self.name, *words, check=check)

    def command(self, *words):
        """The words of a command that runs inside and dies with this process."""
        return ["ip", "netns", "exec", self.name, "setpriv", "--pdeathsig", "KILL", *map(str, words)]

    def run(self, *words, check=True):
        return run(*self.command(*words), check=check)

    def sysctl(self, key, value):
        self.run("sh", "-c", f"echo {value} > /proc/sys/{key}")

    def link(self, name):
        """What `ip` tells about a device, or None."""
        text = self.ip("-details", "-statistics", "-json", "link", "show", "dev", name, check=False)
        return json.loads(text)[0] if text.strip() else None

    @contextlib.contextmanager
    def entered(self):
        """This thread inside; sockets opened here stay here."""
        libc = ctypes.CDLL(None, use_errno=True)
        with open("/proc/thread-self/ns/net") as home, open(f"/run/netns/{self.name}") as there:
            if libc.setns(there.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")
            try:
                yield
            finally:
                libc.setns(home.fileno(), CLONE_NEWNET)


class Agent:
    """agent.py somewhere, and the two files that lead to it."""

    def __init__(self, name, reading, writing):
        self.name, self.writing = name, writing
        self.pending, self.numbers, self.lock = {}, 0, threading.Lock()
        self.ready = self.expect(0)
        threading.Thread(target=self.read, args=(reading,), daemon=True).start()

    def expect(self, number):
        self.pending[number] = concurrent.futures.Future()
        return self.pending[number]

    def read(self, reading):
        try:
            for line in reading:
                # A serial port may carry rubbish while the guest starts.
                with contextlib.suppress(ValueError):
                    reply = json.loads(line[line.index(b"{"):])
                    if future := self.pending.pop(reply["id"], None):
                        if "error" in reply:
                            future.set_exception(AssertionError(f"{self.name}: {reply['error']}"))
                        else:
                            future.set_result(reply["result"])
        except OSError:
            pass
        for future in list(self.pending.values()):
            if not future.done():
                future.set_exception(LabError(f"{self.name} is gone"))

    def start(self, function, **arguments):
        """Starts a call; its result can be waited for."""
        with self.lock:
            self.numbers += 1
            future = self.expect(self.numbers)
            request = {"id": self.numbers, "call": function, "arguments": arguments}
            self.writing.write(json.dumps(request).encode() + b"\n")
            self.writing.flush()
        return future

    def call(self, function, **arguments):
        """Calls a function of agent.py and waits for its result."""
        return self.result(self.start(function, **arguments))

    def result(self, future):
        """Waits for the result of a call."""
        eventually(f"{self.name} answers", future.done)
        return future.result()

    def run(self, command):
        """A shell command that must succeed; returns what it said."""
        done = self.call("run", command=command)
        if done["status"]:
            raise AssertionError(f"{self.name}: {command}: status {done['status']}: {done['output']}")
        return done["output"]


class Daemon:
    """vlanswitchd, followed by its output."""

    def __init__(self, namespace, *arguments, wait=True):
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            namespace.command(binary(), "--uplink", UPLINK, "--log-format", "json", "-v", "--control", "none", *arguments),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        self.out, self.log = [], []
        self.readers = [
            threading.Thread(target=self.collect, args=(stream, lines), daemon=True)
            for stream, lines in ((self.process.stdout, self.out), (self.process.stderr, self.log))
        ]
        for reader in self.readers:
            reader.start()
        if wait:
            eventually("vlanswitchd says `forwarding:`", self.is_forwarding)

    @staticmethod
    def collect(stream, lines):
        with stream:
            for line in stream:
                lines.append(line.rstrip("\n"))

    def is_forwarding(self):
        if self.process.poll() is not None:
            self.finish()
            raise AssertionError(f"vlanswitchd ended with {self.process.returncode}: {self.log}")
        return any(line.startswith("forwarding: ") for line in self.out)

    def finish(self):
        for reader in self.readers:
            reader.join()

    def summaries(self):
        return [json.loads(line) for line in self.out if line.startswith("{")]

    def messages(self):
        """The log's messages."""
        return [
            json.loads(line).get("fields", {}).get("message", "") if line.startswith("{") else line
            for line in self.log
        ]

    def says(self, text, patience=PATIENCE, after=0):
        """Waits for a log message with this text in it, not among the first `after`."""
        return eventually(
            lambda: f"vlanswitchd says {text!r}; it said {self.messages()}",
            lambda: next((message for message in self.messages()[after:] if text in message), None),
            patience,
        )

    def summary(self):
        """Its counters now."""
        before = len(self.summaries())
        self.process.send_signal(signal.SIGUSR1)
        return eventually("a summary after SIGUSR1", lambda: self.summaries()[before:])[0]

    def port(self, name):
        return next(port for port in self.summary()["ports"] if port["name"] == name)

    def attached(self, name):
        """Waits until a port is attached, with a VMM on its other side."""
        eventually(f"{name} is attached", lambda: self.port(name)["state"] == "attached")

    def stop(self):
        """Stops it; it must end well and account for every frame."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(PATIENCE)
        finally:
            self.kill()
        self.finish()
        if self.process.returncode:
            raise AssertionError(f"vlanswitchd ended with {self.process.returncode}: {self.log[-20:]}")
        summary = self.summaries()[-1]
        for place, flow in flows(summary):
            accounted = flow["out_frames"] + sum(flow["drops"].values())
            if flow["in_frames"] + flow["split_frames"] != accounted:
                raise AssertionError(f"{place}: frames unaccounted for: {flow}")
        return summary

    def kill(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def flows(summary):
    yield "uplink from_wire", summary["uplink"]["from_wire"]
    for port in summary["ports"]:
        yield f"{port['name']} from_guest", port["from_guest"]
        yield f"{port['name']} to_guest", port["to_guest"]


class FarSwitch:
    """Open vSwitch's userspace datapath, with a database of its own."""

    def __init__(self, namespace, folder):
        self.folder = folder
        # Its programs find all they need by these.
        self.environment = dict(os.environ, OVS_RUNDIR=str(folder), OVS_LOGDIR=str(folder), OVS_DBDIR=str(folder))
        database, self.remote = folder / "conf.db", f"unix:{folder}/db.sock"
        run("ovsdb-tool", "create", database, "/usr/share/openvswitch/vswitch.ovsschema")
        self.processes = [self.start(namespace, "ovsdb-server", database, f"--remote=p{self.remote}")]
        eventually("ovsdb-server listens", (folder / "db.sock").exists)
        self.vsctl("--no-wait", "init")
        self.vsctl("--no-wait", "set", "Open_vSwitch", ".", "other_config:vlan-limit=2")
        self.processes.append(self.start(namespace, "ovs-vswitchd", self.remote))

    def start(self, namespace, program, *arguments):
        with open(self.folder / f"{program}.out", "w") as out:
            return subprocess.Popen(
                namespace.command(program, *arguments, "--log-file", "--pidfile"),
                env=self.environment, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
            )

    def vsctl(self, *words):
        done = subprocess.run(
            ["ovs-vsctl", "--timeout=30", f"--db={self.remote}", *words],
            env=self.environment, capture_output=True, text=True,
        )
        if done.returncode:
            raise LabError(f"ovs-vsctl {' '.join(words)}: {done.stderr}")
        return done.stdout

    def bridge(self, name):
        # Reserved multicast addresses, such as LLDP's, pass a bridge only on request.
        self.vsctl("add-br", name, "--", "set", "bridge", name, "datapath_type=netdev", "other-config:forward-bpdu=true")

    def port(self, bridge, name, *columns):
        self.vsctl("add-port", bridge, name, "--", "set", "port", name, *columns or ["trunks=[]"])

    def forget(self):
        """Drops all it has learnt about flows."""
        socket_path = next(self.folder.glob("ovs-vswitchd.*.ctl"))
        run("ovs-appctl", "-t", socket_path, "revalidator/purge")

    def close(self):
        for process in reversed(self.processes):
            process.kill()
            process.wait()


class Lab:
    """The whole of it. `vlans` become access ports, each with a device at the far end."""

    ACCESS = (101, 200, 201)
    # VLANs of dot1q-tunnel ports, with the outer tag's kind. None is an access port's
    # too: this Open vSwitch wildcards the inner tag of what it learnt from two tags,
    # and then sends frames with one tag the same way.
    TUNNELS = {102: "802.1ad", 103: "802.1q"}
    # The customer's VLAN inside them.
    INNER = 5

    def __init__(self):
        sweep()
        self.cleanup = contextlib.ExitStack()
        try:
            self.build()
        except BaseException:
            self.close()
            raise

    def build(self):
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix=f"{PREFIX}-{os.getpid()}-"))
        self.folder.chmod(0o711)
        self.cleanup.callback(shutil.rmtree, self.folder, ignore_errors=True)
        self.host, self.switch_side, self.far_side = (self.namespace(role) for role in ("host", "switch", "far"))
        # Addresses that are of use at once.
        self.far_side.sysctl("net/ipv6/conf/default/accept_dad", 0)
        self.host.sysctl("net/ipv6/conf/default/disable_ipv6", 1)
        self.switch_side.sysctl("net/ipv6/conf/default/disable_ipv6", 1)
        self.switch = FarSwitch(self.switch_side, self.folder)
        self.cleanup.callback(self.switch.close)
        self.switch.bridge("br0")
        self.wire(self.host, UPLINK, "trunk0")
        self.switch.port("br0", "trunk0")
        for vid in self.ACCESS:
            self.far_port("br0", f"{vid}", f"tag={vid}")
        for vid, ethertype in self.TUNNELS.items():
            self.customer(f"br{vid}", vid, ethertype)
        self.far = self.far_agent()

    def namespace(self, role):
        namespace = Namespace(role)
        self.cleanup.callback(namespace.close)
        return namespace

    def wire(self, namespace, name, switch_port):
        """A veth pair from the switch to somewhere, with nothing but whole frames on it."""
        self.switch_side.ip(
            "link", "add", switch_port, "mtu", SWITCH_MTU, "type", "veth", "peer", "name", name,
            "mtu", 1500, "netns", namespace.name,
        )
        for side, end in ((self.switch_side, switch_port), (namespace, name)):
            side.run("ethtool", "-K", end, "tx", "off", "tso", "off", "gso", "off", "gro", "off")
            side.ip("link", "set", end, "up")

    def far_port(self, bridge, label, *columns):
        """A port of the switch with a device `vLABEL` at the far end, and its addresses."""
        self.wire(self.far_side, f"v{label}", f"a{label}")
        self.switch.port(bridge, f"a{label}", *columns)
        for address in (f"{far_address(4, label)}/24", f"{far_address(6, label)}/64"):
            self.far_side.ip("address", "add", address, "dev", f"v{label}")

    def customer(self, bridge, vid, ethertype):
        """A second bridge behind the dot1q-tunnel port of a VLAN."""
        self.switch.bridge(bridge)
        inside, outside = f"{bridge}-q", f"br0-{bridge}"
        self.switch.vsctl(
            "add-port", "br0", outside, "--", "set", "interface", outside, "type=patch", f"options:peer={inside}",
            "--", "set", "port", outside, f"tag={vid}", "vlan_mode=dot1q-tunnel", f"other_config:qinq-ethtype={ethertype}",
            "--", "add-port", bridge, inside, "--", "set", "interface", inside, "type=patch", f"options:peer={outside}",
        )
        self.far_port(bridge, f"{vid}q", f"tag={self.INNER}")

    def far_agent(self):
        process = subprocess.Popen(
            self.far_side.command(sys.executable, AGENT), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )
        self.cleanup.callback(process.wait)
        self.cleanup.callback(process.kill)
        agent = Agent("far end", process.stdout, process.stdin)
        agent.result(agent.ready)
        return agent

    def close(self):
        self.cleanup.close()


def far_address(family, label):
    """The far end's address behind a port of the switch."""
    vid = int(label.rstrip("q"))
    network = vid % 100 + (50 if label.endswith("q") else 0) + (100 if vid >= 200 else 0)
    return f"10.1.{network}.1" if family == 4 else f"fd00:1:{network:x}::1"


def guest_address(family, label):
    """The guest's, in the same network."""
    return far_address(family, label)[:-1] + "2"


def sweep():
    """Removes what a killed run has left behind."""
    for path in [*pathlib.Path("/run/netns").glob(f"{PREFIX}-*"), *pathlib.Path("/tmp").glob(f"{PREFIX}-*")]:
        owner = path.name.split("-")[1]
        if not pathlib.Path(f"/proc/{owner}").exists():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                run("ip", "netns", "del", path.name, check=False)


_shared = []


def shared():
    """The one lab of this run."""
    if not _shared:
        _shared.append(Lab())
        atexit.register(_shared[0].close)
    return _shared[0]
