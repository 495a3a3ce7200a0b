# shellcheck shell=sh
# Common parts of the scripts here; to be sourced (POSIX sh).

say() {
    printf '== %s\n' "$*" >&2
}

die() {
    printf '%s: error: %s\n' "${0##*/}" "$*" >&2
    exit 1
}

is_root() {
    [ "$(id -u)" = 0 ]
}

# Whether network namespaces can be made here: root, and not in a container that
# was denied them.
has_namespaces() {
    is_root && unshare --net true 2>/dev/null
}

# need COMMAND:PACKAGE... installs with apt the packages whose command is missing.
# Fails if something is missing and cannot be installed.
need() {
    missing=
    for pair in "$@"; do
        PATH="$PATH:/usr/sbin:/sbin" command -v "${pair%%:*}" >/dev/null || missing="$missing ${pair#*:}"
    done
    [ -z "$missing" ] && return 0
    if is_root && command -v apt-get >/dev/null; then
        say "installing$missing"
        # shellcheck disable=SC2086 # a list of package names
        if DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $missing >/dev/null 2>&1; then
            return 0
        fi
        # A fresh machine has no package lists yet.
        apt-get update -qq >/dev/null 2>&1 || true
        # shellcheck disable=SC2086
        DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $missing >&2 && return 0
    fi
    printf '%s: missing packages, install them as root:%s\n' "${0##*/}" "$missing" >&2
    return 1
}

# tool CRATE VERSION installs a cargo subcommand into target/tools if it is missing there,
# and puts that folder on the path.
tool() {
    PATH="$PWD/target/tools/bin:$PATH"
    export PATH
    [ -x "target/tools/bin/$1" ] && return 0
    say "installing $1 $2 into target/tools"
    # Not into the folder of our own artifacts: two builds would wait for each other.
    CARGO_TARGET_DIR=target/tools/build RUSTFLAGS='' cargo install --quiet --locked --root target/tools "$1@$2" ||
        die "cannot install $1 (is there a network?)"
}
