#!/usr/bin/env python3
"""The packages in fresh Debian roots: installed, started, upgraded, purged.

    tests/packages/run.py OLD.deb NEW.deb ROOT OLD.rpm NEW.rpm [PART...]

The RPM packages are compared with the Debian ones, and installed in the same root by rpm, whose
order of scripts is another. ROOT is what debootstrap made; it is not changed: each part has an
overlay on it, and a systemd of its own in namespaces, or none. Prints a line a check and at the
end `packages: N passed, N failed`. scripts/test-packages makes all of it.
"""

import json
import os
import re
import select
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
OLD, NEW, ROOT, RPM, NEWER_RPM = (os.path.abspath(argument) for argument in sys.argv[1:6])
UNITS = ["vlanswitchd", "vlanswitchd@eth1", "vlanswitchd-found", "vlanswitchd-found@eth1"]
CONFIGURATION = '[uplink]\ndevice = "eth0"\n[[port]]\nvlan = 101\ndevice = "tap-web1"\n[[port]]\nvlan = 102\ndevice = "web2"\n'

# Everything is in the namespaces' own mounts, and goes with them.
BOOT = r"""
set -e
mount --make-rprivate /
work=$(mktemp -d)
mount -t tmpfs tmpfs "$work"
mkdir "$work/upper" "$work/work" "$work/root"
mount -t overlay overlay -o "lowerdir=$1,upperdir=$work/upper,workdir=$work/work" "$work/root"
cd "$work/root"
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t tmpfs -o mode=755 tmpfs run
mount -t tmpfs tmpfs tmp
mount -t tmpfs -o mode=755 tmpfs dev
for device in null zero full random urandom tty; do touch dev/$device; mount --bind /dev/$device dev/$device; done
mkdir -p dev/net dev/pts dev/shm
touch dev/net/tun
mount --bind /dev/net/tun dev/net/tun
mount -t devpts devpts dev/pts -o newinstance,ptmxmode=0666,mode=620
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
if [ "$2" = systemd ]; then
    mount -t tmpfs -o mode=755 tmpfs sys/fs/cgroup
    mount -t cgroup2 cgroup2 sys/fs/cgroup
    # As systemd mounts it on a real machine.
    mount -t bpf -o mode=0700 bpf sys/fs/bpf
fi
mkdir -p old
pivot_root . old
umount -l /old
rmdir /old
if [ "$2" = systemd ]; then
    exec env -i container=test PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd
fi
exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin sleep infinity
"""

passed = failed = 0


def check(words, good, detail=""):
    global passed, failed
    if good:
        passed += 1
        print(f"  ok      {words}", flush=True)
    else:
        failed += 1
        print(f"  FAILED  {words}", flush=True)
        for line in str(detail).splitlines()[-15:]:
            print(f"          {line}", flush=True)


def eventually(what, condition, limit=30):
    deadline = time.monotonic() + limit
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {limit} s in vain: {what}")
        time.sleep(0.05)


class Done:
    def __init__(self, done):
        self.ok = done.returncode == 0
        self.out = done.stdout
        self.all = done.stdout + done.stderr


class Machine:
    """A Debian of its own, with systemd as process 1 or without."""

    def __init__(self, kind):
        words = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--net", "--uts", "--ipc", "--cgroup"]
        # The console of its process 1 is nobody's.
        self.unshare = subprocess.Popen([*words, "sh", "-c", BOOT, "boot", ROOT, kind], stdin=subprocess.DEVNULL)
        children = f"/proc/{self.unshare.pid}/task/{self.unshare.pid}/children"
        eventually("its first process", lambda: open(children, encoding="ascii").read().strip())
        self.pid = open(children, encoding="ascii").read().strip()
        waits_for = "systemd" if kind == "systemd" else "sleep"
        eventually("its start", lambda: open(f"/proc/{self.pid}/comm", encoding="ascii").read().strip() == waits_for)
        if kind == "systemd":
            eventually("systemd", lambda: self.run("systemctl is-system-running").out.strip() in ("running", "degraded"), 60)
        self.run("ip link set lo up")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.unshare.kill()
        self.unshare.wait()

    def run(self, script, data=None):
        words = ["nsenter", "-t", self.pid, "-m", "-p", "-n", "-u", "-i", "-C", "env", "-i"]
        words += ["PATH=/usr/sbin:/usr/bin:/sbin:/bin", "DEBIAN_FRONTEND=noninteractive", "LC_ALL=C", "sh", "-c", script]
        return Done(subprocess.run(words, input=data, capture_output=True, text=not isinstance(data, bytes), timeout=120))

    def write(self, path, text):
        self.run(f"cat > {path}", text)

    def install(self, package):
        with open(package, "rb") as file:
            self.run("cat > /tmp/package.deb", file.read())
        return self.run("dpkg --install /tmp/package.deb")

    def rpm(self, words, package=None):
        """Debian's own rpm; what the package requires has other names here."""
        if package:
            with open(package, "rb") as file:
                self.run("cat > /tmp/package.rpm", file.read())
            words += " /tmp/package.rpm"
        return self.run(f"rpm --nodeps {words}")

    def files(self):
        """Every file with what it is, but for logs and what dpkg writes down."""
        skipped = r"-path ./proc -o -path ./sys -o -path ./dev -o -path ./tmp -o -path ./var/lib/dpkg -o -path ./var/log -o -path ./var/cache -o -path ./var/lib/systemd -o -path ./run/systemd -o -path ./run/udev -o -path ./run/log"
        lines = self.run(rf"cd / && find . \( {skipped} \) -prune -o -printf '%p %y %m %U %G\n'").out
        # Copies that adduser keeps of what was there before.
        return {line for line in lines.splitlines() if not re.match(r"\./(etc/(passwd|group|shadow|gshadow|subuid|subgid)-|run/adduser|etc/\.pwd\.lock)", line)}

    def accounts(self):
        return self.run("sort /etc/passwd /etc/group").out

    def property(self, name, unit="vlanswitchd"):
        return self.run(f"systemctl show -P {name} {unit}").out.strip()


class Traffic:
    def __init__(self, machine, wire, vlan, guest):
        words = ["nsenter", "-t", machine.pid, "-n", sys.executable, os.path.join(HERE, "traffic.py"), wire, str(vlan), guest]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        readable, _, _ = select.select([self.process.stdout], [], [], 30)
        if not readable or self.process.stdout.readline() != "flowing\n":
            self.process.kill()
            raise RuntimeError("no traffic flows")

    def end(self):
        out, _ = self.process.communicate("end\n", timeout=60)
        return json.loads(out)


def whole(result):
    return all(flow["sent"] > 100 and not (flow["missing"] or flow["twice"] or flow["unordered"]) for flow in result.values())


def without_systemd():
    print("in a root where systemd does not run:", flush=True)
    with Machine("plain") as machine:
        before, accounts = machine.files(), machine.accounts()
        done = machine.install(OLD)
        check("it installs", done.ok, done.all)
        check("nothing but what is to be seen is printed", "rror" not in done.all and "arning" not in done.all, done.all)
        done = machine.run("id vlanswitchd")
        check("the user is there", done.ok, done.all)
        done = machine.run("stat -c '%a %U %G' /etc/vlanswitchd")
        check("the group may write the configuration", done.out == "775 root vlanswitchd\n", done.all)
        done = machine.run("vlanswitchd --check")
        check("the default configuration lacks an uplink only", not done.ok and "no uplink" in done.all, done.all)
        for page in ("vlanswitchd.8", "vlanswitchctl.1", "vlanswitchd.toml.5", "vlanswitchctl-port-add.1"):
            section = page[-1]
            check(f"the man page {page}", machine.run(f"zcat /usr/share/man/man{section}/{page}.gz | grep -q '^.TH'").ok)
        done = machine.run("bash -n /usr/share/bash-completion/completions/vlanswitchctl")
        check("completions for bash can be read", done.ok, done.all)
        done = machine.run("apparmor_parser --skip-kernel-load --skip-cache /usr/share/doc/vlanswitchd/apparmor")
        check("the AppArmor profile can be read", done.ok, done.all)
        # By hand, as another manager would.
        machine.run("ip link add eth0 type veth peer name far0; ip link set eth0 up; ip link set far0 up")
        machine.write("/etc/vlanswitchd/vlanswitchd.toml", CONFIGURATION)
        machine.run("vlanswitchd --user vlanswitchd >/tmp/out 2>/tmp/log & echo $! >/tmp/pid")
        try:
            eventually("forwarding", lambda: "forwarding:" in machine.run("cat /tmp/out").out)
            check("it runs by hand, as the user", machine.run("vlanswitchctl status").ok)
        except TimeoutError:
            check("it runs by hand, as the user", False, machine.run("cat /tmp/out /tmp/log").all)
        domain = '<domain><name>db9</name><metadata>\n<vlanswitchd:ports xmlns:vlanswitchd="x">\n<vlanswitchd:port map="109=tap-db9,rate=1G"/>\n<vlanswitchd:port map=\'110=tap-db9b\'/></vlanswitchd:ports></metadata></domain>'
        hook = "/usr/share/vlanswitchd/qemu-hook db9"
        done = machine.run(f"{hook} prepare begin -", domain)
        ports = machine.run("vlanswitchctl port list").out
        check("the hook for libvirt adds ports", done.ok and "tap-db9 " in ports and "tap-db9b" in ports, done.all + ports)
        check("and again, as after a crash", machine.run(f"{hook} prepare begin -", domain).ok)
        done = machine.run(f"{hook} prepare begin -", domain.replace("109=tap-db9,", "101=tap-db8,"))
        check("one that cannot be added stops the domain", not done.ok and "was not added" in done.all, done.all)
        done = machine.run(f"{hook} release end -", domain)
        check("and removes them", done.ok and "tap-db9" not in machine.run("vlanswitchctl port list").out, done.all)
        done = machine.install(NEW)
        check("an upgrade leaves it in peace", done.ok and machine.run("vlanswitchctl status").ok, done.all)
        machine.run("kill $(cat /tmp/pid)")
        eventually("its end", lambda: not machine.run("vlanswitchctl status").ok)
        machine.run("ip link del eth0")
        check("its tap is there", machine.run("ip link show tap-web1").ok)
        done = machine.run("dpkg --purge vlanswitchd")
        check("it is purged", done.ok, done.all)
        check("its tap is gone", not machine.run("ip link show tap-web1").ok)
        check("accounts are as before", machine.accounts() == accounts, machine.accounts())
        left = machine.files() ^ before
        check("files are as before", not left, "\n".join(sorted(left)))


def with_systemd(path):
    with Machine("systemd") as machine:
        version = int(machine.run("systemctl --version").out.split()[1])
        print(f"under systemd {version}, datapath {path}:", flush=True)
        before, accounts = machine.files(), machine.accounts()
        machine.run("ip link add eth0 type veth peer name far0; ip link add eth1 type veth peer name far1")
        machine.run("ip link add web2 type veth peer name guest2")
        for device in ("eth0", "far0", "eth1", "far1", "web2", "guest2"):
            machine.run(f"ip link set {device} up")
        # It may give devices other addresses.
        machine.run("udevadm settle")
        found = machine.run("ip -d link show web2").out
        done = machine.install(OLD)
        check("it installs", done.ok, done.all)
        check("it is not started", machine.property("ActiveState") == "inactive")

        units = " ".join(f"{unit}.service" for unit in UNITS)
        done = machine.run(f"systemd-analyze verify --man=no {units}")
        # systemd before 253 says this, and takes the line before.
        said = [line for line in done.all.splitlines() if "Failed to parse service type, ignoring: notify-reload" not in line or version >= 253]
        check("systemd-analyze verify has nothing to say", done.ok and not said, "\n".join(said))
        for unit in UNITS:
            done = machine.run(f"systemd-analyze security --offline=yes --no-pager --threshold=19 /usr/lib/systemd/system/{re.sub('@eth1', '@', unit)}.service")
            exposure = re.findall(r"exposure level .*", done.all)
            check(f"systemd-analyze security: {(exposure or ['?'])[0]}", done.ok, done.all)

        machine.write("/etc/vlanswitchd/vlanswitchd.toml", f'[switch]\ndatapath = "{path}"\n' + CONFIGURATION)
        done = machine.run("systemctl enable --now vlanswitchd")
        check("it starts", done.ok, machine.run("journalctl --no-pager -u vlanswitchd").out)
        check("it says that it forwards", "2: 1 attached" in machine.run("vlanswitchctl status").out, machine.run("vlanswitchctl status").all)
        status = machine.run(f"cat /proc/{machine.property('MainPID')}/status").out
        uid = machine.run("id -u vlanswitchd").out.strip()
        log = machine.run("journalctl --no-pager -u vlanswitchd").out
        check("the kernel path has its place, if the kernel can", "Permission denied" not in log, log)
        check("as its user", re.search(rf"^Uid:\t{uid}\t{uid}\t{uid}\t{uid}$", status, re.M), status)
        # CAP_NET_ADMIN, CAP_NET_RAW, CAP_BPF.
        check("with three capabilities", "CapEff:\t0000008000003000" in status, status)
        check("and a sandbox", "Seccomp:\t2" in status and "NoNewPrivs:\t1" in status, status)

        traffic = Traffic(machine, "far0", 102, "guest2")
        done = machine.run("vlanswitchctl port add 103=tap-web3 --persist")
        text = machine.run("cat /etc/vlanswitchd/vlanswitchd.toml").out
        check("a port is added, and written down", done.ok and "tap-web3" in text, done.all)
        done = machine.run("systemctl reload vlanswitchd")
        check("it reloads", done.ok, done.all)
        machine.run("sed 's/^vlan = 101/vlan = 5000/' /etc/vlanswitchd/vlanswitchd.toml > /tmp/bad && cp /etc/vlanswitchd/vlanswitchd.toml /tmp/good && cat /tmp/bad > /etc/vlanswitchd/vlanswitchd.toml")
        done = machine.run("systemctl reload vlanswitchd")
        check("a wrong file makes the reload fail, and nothing else", not done.ok and machine.property("ActiveState") == "active", done.all)
        machine.run("cat /tmp/good > /etc/vlanswitchd/vlanswitchd.toml")
        first = machine.property("MainPID")
        done = machine.install(NEW)
        check("it is upgraded", done.ok, done.all)
        second = machine.property("MainPID")
        check("another process goes on", first != second and machine.property("ActiveState") == "active", machine.run("journalctl --no-pager -u vlanswitchd").out)
        done = machine.run("systemctl restart vlanswitchd")
        check("it restarts", done.ok and machine.property("MainPID") != second, done.all)
        check("found devices stay ports meanwhile", machine.property("ActiveState", "vlanswitchd-found") == "active")
        result = traffic.end()
        check(f"no frame was lost through all that: {result}", whole(result), machine.run("journalctl --no-pager -o short-precise -u vlanswitchd").out)
        check("no start was a cold one", "NRestarts=0" in machine.run("systemctl show vlanswitchd").out)

        machine.run("kill -ABRT $(systemctl show -P MainPID vlanswitchd)")
        eventually("a new process", lambda: machine.property("NRestarts") == "1" and machine.run("vlanswitchctl status").ok)
        check("after a crash it is started again", True)

        machine.write("/etc/vlanswitchd/eth1.toml", '[[port]]\nvlan = 201\ndevice = "tap-db1"\n')
        done = machine.run("systemctl start vlanswitchd@eth1")
        check("a second uplink has a switch of its own", done.ok, machine.run("journalctl --no-pager -u vlanswitchd@eth1").out)
        done = machine.run("vlanswitchctl --instance eth1 port list")
        check("vlanswitchctl --instance finds it", "tap-db1" in done.out, done.all)
        done = machine.run("systemctl reload vlanswitchd@eth1")
        check("it reloads too", done.ok, done.all)

        done = machine.run("systemctl stop vlanswitchd")
        eventually("devices are given back", lambda: machine.property("ActiveState", "vlanswitchd-found") == "inactive")
        now = machine.run("ip -d link show web2").out
        check("a stop gives found devices back", now == found, now + found)
        machine.run("systemctl start vlanswitchd; ip link del guest2; systemctl disable vlanswitchd")

        done = machine.run("dpkg --purge vlanswitchd")
        check("it is purged", done.ok, done.all)
        check("no process is left", not machine.run("pidof vlanswitchd").ok)
        for device in ("tap-web1", "tap-web3", "tap-db1"):
            check(f"{device} is gone", not machine.run(f"ip link show {device}").ok)
        check("accounts are as before", machine.accounts() == accounts, machine.accounts())
        left = machine.files() ^ before
        check("files are as before", not left, "\n".join(sorted(left)))


def read(*words):
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def rpm():
    """The same files, in the places of the other distributions, and scripts a shell can read."""
    print("the RPM package:", flush=True)

    def place(path):
        path = path.removeprefix(".").removesuffix(".gz").replace("/zsh/site-functions/", "/zsh/vendor-completions/")
        only = ("/usr/share/lintian/", "/usr/share/licenses/", "/usr/share/doc/vlanswitchd/copyright", "/usr/share/doc/vlanswitchd/changelog.Debian")
        return None if path.startswith(only) or path.endswith("/") else path

    deb = {place(line.split(maxsplit=5)[5]) for line in read("dpkg-deb", "--contents", OLD).splitlines()}
    rpm = {place(path) for path in read("rpm", "-qlp", RPM).splitlines()}
    check("it has the files of the Debian package", deb == rpm and len(rpm) > 40, "\n".join(sorted(map(str, deb ^ rpm))))
    check("the configuration is kept", "/etc/vlanswitchd/vlanswitchd.toml\n" == read("rpm", "-qp", "--configfiles", RPM))
    scripts = read("rpm", "-qp", "--scripts", RPM)
    names = re.findall(r"^(\w+) scriptlet:$", scripts, re.M)
    check(f"it has scripts: {', '.join(names)}", len(names) == 4, scripts)
    bodies = re.sub(r"^\w+ scriptlet:$", "", scripts, flags=re.M)
    done = subprocess.run(["sh", "-n"], input=bodies, capture_output=True, text=True)
    check("a shell can read them", done.returncode == 0, done.stderr)


def by_rpm():
    print("the RPM package under systemd:", flush=True)
    with Machine("systemd") as machine:
        machine.run("ip link add eth0 type veth peer name far0; ip link add web2 type veth peer name guest2")
        for device in ("eth0", "far0", "web2", "guest2"):
            machine.run(f"ip link set {device} up")
        machine.run("udevadm settle")
        found = machine.run("ip -d link show web2").out
        # Its database is made by the first call.
        machine.rpm("--initdb")
        before = machine.files()
        done = machine.rpm("--install", RPM)
        check("it installs", done.ok and "warning" not in done.all and "rror" not in done.all, done.all)
        check("it is not started", machine.property("ActiveState") == "inactive")
        done = machine.run("stat -c '%a %U %G' /etc/vlanswitchd")
        check("the group may write the configuration", done.out == "775 root vlanswitchd\n", done.all)
        machine.write("/etc/vlanswitchd/vlanswitchd.toml", CONFIGURATION)
        done = machine.run("systemctl enable --now vlanswitchd")
        check("it starts", done.ok, machine.run("journalctl --no-pager -u vlanswitchd").out)
        traffic = Traffic(machine, "far0", 102, "guest2")
        first = machine.property("MainPID")
        done = machine.rpm("--upgrade", NEWER_RPM)
        check("it is upgraded", done.ok, done.all)
        check("another process goes on", machine.property("MainPID") != first and machine.property("ActiveState") == "active", machine.run("journalctl --no-pager -u vlanswitchd").out)
        check("the configuration is as it was written", CONFIGURATION == machine.run("cat /etc/vlanswitchd/vlanswitchd.toml").out)
        result = traffic.end()
        check(f"no frame was lost: {result}", whole(result), machine.run("journalctl --no-pager -u vlanswitchd").out)
        check("no start was a cold one", "NRestarts=0" in machine.run("systemctl show vlanswitchd").out)
        done = machine.rpm("--erase vlanswitchd")
        check("it is removed", done.ok, done.all)
        check("no process is left", not machine.run("pidof vlanswitchd").ok)
        done = machine.run("ip -d link show tap-web1")
        check("its tap is gone", not done.ok, done.all)
        now = machine.run("ip -d link show web2").out
        check("a device it found is given back", now == found, now + found)
        # As usual there: the user stays, and what was written into the configuration. Folders of
        # others' are there on a machine that has those.
        kept = r"\./(etc/(vlanswitchd|passwd|group|g?shadow|subuid|subgid)|var/lib/rpm|usr/share/(fish|zsh|licenses))\b"
        left = {line for line in machine.files() ^ before if not re.match(kept, line)}
        check("files are as before", not left, "\n".join(sorted(left)))


def by_the_packet_path():
    with_systemd("packet")


def by_the_kernel_path():
    with_systemd("auto")


for part in (rpm, by_rpm, without_systemd, by_the_packet_path, by_the_kernel_path):
    if sys.argv[6:] and part.__name__ not in sys.argv[6:]:
        continue
    try:
        part()
    except (TimeoutError, subprocess.SubprocessError, RuntimeError, OSError) as error:
        check(f"{part.__name__} to its end", False, error)
print(f"packages: {passed} passed, {failed} failed")
sys.exit(1 if failed else 0)
