# What scripts with real guests share; to be sourced, from the repository's root.

VMS_PACKAGES='busybox-static cpio ethtool iproute2 kmod libvirt-clients libvirt-daemon-system
openvswitch-switch python3 qemu-system-x86 util-linux'

need_root() {
    [ "$(id -u)" -eq 0 ] && return
    echo "$0: needs root, for network namespaces and taps" >&2
    exit 1
}

# Installs what is missing, and nothing that would bring a daemon's configuration along.
need_packages() {
    missing=
    for package in $VMS_PACKAGES; do
        [ "$(dpkg-query -W -f '${db:Status-Abbrev}' "$package" 2>/dev/null)" = 'ii ' ] || missing="$missing $package"
    done
    # The guest's kernel comes from the lists as well, though it is never installed.
    apt-cache show linux-image-amd64 >/dev/null 2>&1 || apt-get -qq update
    [ -n "$missing" ] || return 0
    echo "installing$missing" >&2
    apt-get -qq update
    # shellcheck disable=SC2086 # a list
    DEBIAN_FRONTEND=noninteractive apt-get -qq install --yes --no-install-recommends $missing >/dev/null
}
