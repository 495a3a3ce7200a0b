# What stands before the commands of a page (tests/docs_live.rs): a host of its own, in
# network, mount and process namespaces that vanish with it. $1 is an empty folder, $2 the
# repository, $3 the folder of the programs, $4 the page's own setting.

set -u
scratch=$1 repo=$2 programs=$3 setting=$4
mount --make-rprivate /
mount -t tmpfs tmpfs "$scratch"
file=/etc/vlanswitchd/vlanswitchd.toml
pid=

overlay() {
    mkdir -p "$scratch$1/upper" "$scratch$1/work"
    mount -t overlay overlay -o "lowerdir=$1,upperdir=$scratch$1/upper,workdir=$scratch$1/work" "$1"
}

fail() {
    echo "FAILED: $step: $*"
    tail -n 15 "$scratch"/*.log "$scratch/cwd/out.log" 2>/dev/null
    exit 1
}

# stand_in NAME TEXT: a program that does what the text says.
stand_in() {
    printf '#!/bin/sh\n%s\n' "$2" >"$scratch/bin/$1"
    chmod +x "$scratch/bin/$1"
}

wait_for() {
    tries=0
    until eval "$1"; do
        tries=$((tries + 1))
        [ $tries -lt 400 ] || fail "waited in vain: $1"
        sleep 0.05
    done
}

stop() {
    if [ -n "$pid" ]; then
        kill "$pid" 2>/dev/null
        wait "$pid"
        pid=
    fi
    ip -o link show | grep 'alias vlanswitchd' | sed 's/^[0-9]*: \([^:@]*\).*/\1/' | while read -r tap; do
        ip link delete "$tap"
    done
}

forwards() {
    grep -q '^forwarding:' "$scratch/daemon.out" || ! kill -0 "$pid" 2>/dev/null
}

# A vlanswitchd that stays, in the place of the one before.
daemon() {
    case " $* " in *' --takeover '*) old=$pid ;; *) stop; old= ;; esac
    : >"$scratch/daemon.out"
    vlanswitchd "$@" >"$scratch/daemon.out" 2>"$scratch/daemon.log" &
    pid=$!
    wait_for forwards
    grep -q '^forwarding:' "$scratch/daemon.out" || fail 'it did not start'
    [ -z "$old" ] || wait "$old" || fail 'the one before did not end well'
}

# A command that is told all by its command line.
without_file() {
    mv "$file" "$file.aside"
    "$@" || fail "status $?"
    mv "$file.aside" "$file"
}

# A device that is there to be deleted; not every kernel has VLAN devices.
there() {
    ip link show "$1" >/dev/null 2>&1 || ip link add "$1" type veth peer name other
}

overlay /etc
overlay /usr
mount -t tmpfs tmpfs /run
mkdir -p "$scratch/bin" "$scratch/cwd/scripts" "$scratch/cwd/target/release" /etc/vlanswitchd /run/netns \
    /usr/share/vlanswitchd /usr/share/doc/vlanswitchd /usr/local/sbin /etc/apparmor.d /etc/systemd/system
for name in vlanswitchd vlanswitchctl; do
    cp "$programs/$name" "$scratch/cwd/target/release/$name"
    ln -s "$programs/$name" "$scratch/bin/$name"
done
cp "$programs/vlanswitchd" /usr/local/sbin/
cp "$repo/dist/systemd/metrics-tcp.conf" /usr/share/vlanswitchd/
cp "$repo/dist/apparmor/usr.sbin.vlanswitchd" /usr/share/doc/vlanswitchd/apparmor
cp "$repo/dist/libvirt/qemu-hook" /usr/share/vlanswitchd/
for name in demo macvtap-to-vlanswitchd; do ln -s "$repo/scripts/$name" "$scratch/cwd/scripts/$name"; done
PATH=$scratch/bin:$PATH
export PATH
export VLANSWITCHD="$programs/vlanswitchd"

stand_in sudo 'exec "$@"'
# By the units' own command lines.
stand_in systemctl '
for word in "$@"; do unit=$word; done
case $* in enable*|start*|restart*) ;; *) exit 0 ;; esac
pkill -x vlanswitchd
while pgrep -x vlanswitchd >/dev/null; do sleep 0.05; done
instance=${unit#vlanswitchd}; instance=${instance#@}
file='"$repo"'/dist/systemd/vlanswitchd${instance:+@}.service
line=$(sed -n "s,^ExecStart=/usr/sbin/,,p" "$file" | sed "s/%i/$instance/g")
mkdir -p "/run/vlanswitchd/$instance"
$line >'"$scratch"'/unit.out 2>'"$scratch"'/unit.log &
until grep -q ^forwarding: '"$scratch"'/unit.out; do kill -0 $! || { cat '"$scratch"'/unit.log; exit 1; }; sleep 0.05; done'
stand_in virsh '
case $1 in
    dumpxml) cat '"$repo"'/tests/migration/web1.xml ;;
    define) grep -q "<interface type=.ethernet.>" "$2" ;;
esac'
# A container is a process in a namespace of its own.
stand_in docker '
case $1 in
    run) unshare --net sleep 1000 >/dev/null 2>&1 & echo $! >'"$scratch"'/container; sleep 0.2 ;;
    inspect) cat '"$scratch"'/container ;;
esac'
cp "$repo/tests/migration/web1.xml" "$scratch/cwd/web1.xml"
sed 's/web1/db1/; s/eth0[.]1/eth0.2/' "$repo/tests/migration/web1.xml" >"$scratch/cwd/db1.xml"
ip link set lo up
ip netns add CONTAINER

printf '[uplink]\ndevice = "eth0"\n' >"$file"
[ "$setting" = no-ports ] || printf '[[port]]\nvlan = 101\ndevice = "tap-web1"\n' >>"$file"
printf '[[port]]\nvlan = 201\ndevice = "tap-db1"\n' >/etc/vlanswitchd/eth0.toml
cd "$scratch/cwd" || exit 1
step='the beginning'
daemon --config "$file"
