# shellcheck shell=sh
# What the scripts with real guests share; to be sourced from the repository's root,
# after lib.sh.

# Checks that guests can run here, and installs what they need.
prepare_guests() {
    has_namespaces || die 'needs root, with network namespaces'
    need ip:iproute2 ethtool:ethtool setpriv:util-linux depmod:kmod cpio:cpio busybox:busybox-static dash:dash \
        unzstd:zstd /usr/bin/python3:python3 qemu-system-x86_64:qemu-system-x86 ovs-vswitchd:openvswitch-switch "$@" ||
        die 'cannot install what guests need'
    # The guest's kernel comes from the same lists, though it is never installed.
    apt-cache show linux-image-amd64 >/dev/null 2>&1 || apt-get -qq update
    [ -n "${VLANSWITCHD:-}" ] || cargo build --locked --release --quiet || die 'cannot build vlanswitchd'
}

# Checks that machines with other kernels can run here, and installs what they need.
prepare_kernels() {
    need ip:iproute2 ethtool:ethtool setpriv:util-linux ping:iputils-ping depmod:kmod cpio:cpio \
        busybox:busybox-static dash:dash unzstd:zstd /usr/bin/python3:python3 qemu-system-x86_64:qemu-system-x86 ||
        die 'cannot install what emulated machines need'
}
