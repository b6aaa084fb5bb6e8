#!/usr/bin/env bash
# Installs what building and testing need on a Debian machine with Rust. Repeating it is
# cheap; nothing is installed that is already there.
#   setup.sh build   a linker and the static target: enough for `make build`
#   setup.sh demo    and what the virtual node is made of
#   setup.sh test    and the peers, clients and tools that the tests use
#   setup.sh browser what the demo needs, and Chromium (124 MB to fetch) to look at the page
set -euo pipefail
want=${1:-test}

packages=(gcc libc6-dev ca-certificates)
case $want in
demo | test | browser)
    packages+=(e2fsprogs iproute2 iptables containernetworking-plugins)
    ;;&
browser)
    packages+=(chromium)
    ;;
test)
    # busybox-static and busybox exclude each other; the bundles of tests want the static one.
    packages+=(runc crun containerd podman buildah conmon docker-registry busybox-static strace
        procps openssl uidmap)
    ;;
esac

missing=()
for package in "${packages[@]}"; do
    dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed ||
        missing+=("$package")
done
if [ ${#missing[@]} -gt 0 ]; then
    echo "setup: installing ${missing[*]}"
    [ "$(id -u)" = 0 ] || { echo "setup: needs root to install packages" >&2; exit 1; }
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -q >/dev/null || true # a broken third-party source must not stop us
    apt-get install -y -q --no-install-recommends "${missing[@]}" >/dev/null
fi

command -v cargo >/dev/null || { echo "setup: cargo is missing; install Rust 1.90 or newer from rustup" >&2; exit 1; }
if command -v rustup >/dev/null; then
    rustup target list --installed | grep -qx x86_64-unknown-linux-musl ||
        rustup -q target add x86_64-unknown-linux-musl ||
        echo "setup: no musl target to be had; building statically with glibc instead"
fi

# bookworm's CRIU (3.17) fails on recent kernels, whose vDSO it does not know. That of
# Debian's next release runs from a tree of its own, and nothing of the system changes.
criu=${CACHE:-$HOME/.cache/pinion}/criu
if [ "$want" = test ] && ! criu check >/dev/null 2>&1 && [ ! -x "$criu/bin/criu" ]; then
    echo "setup: fetching CRIU into $criu"
    rm -rf "$criu" && mkdir -p "$criu"/{bin,tree,apt/lists/partial,apt/archives/partial}
    mirror=$(sed -n 's/^URIs: *//p' /etc/apt/sources.list.d/debian.sources | head -1)
    echo "deb $mirror trixie main" >"$criu/apt/sources.list"
    touch "$criu/apt/status"
    apt=(-o "Dir::State=$criu/apt" -o "Dir::State::lists=$criu/apt/lists" -o "Dir::Cache=$criu/apt"
        -o "Dir::Etc::sourcelist=$criu/apt/sources.list" -o Dir::Etc::sourceparts=-
        -o "Dir::State::status=$criu/apt/status" -o APT::Sandbox::User=root)
    if apt-get "${apt[@]}" update -q >/dev/null &&
        apt-get "${apt[@]}" install -y -q --no-install-recommends --download-only criu >/dev/null; then
        for deb in "$criu"/apt/archives/*.deb; do dpkg -x "$deb" "$criu/tree"; done
        printf '#!/bin/sh\nexec %s --library-path %s %s "$@"\n' "$criu/tree/usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2" \
            "$criu/tree/usr/lib/x86_64-linux-gnu" "$criu/tree/usr/sbin/criu" >"$criu/bin/criu"
        chmod +x "$criu/bin/criu"
    else
        echo "setup: no CRIU to be had; the tests of checkpoint and restore will say so" >&2
    fi
fi

# critest, crictl and kubelet want a newer Go than bookworm has; any Go from 1.21 on
# fetches the version that tests/go asks for.
if [ "$want" = test ] && ! command -v go >/dev/null && [ ! -x /usr/local/go/bin/go ]; then
    echo "setup: installing Go"
    suite=$(. /etc/os-release && echo "$VERSION_CODENAME")-backports
    if ! apt-cache policy golang-go | grep -q "$suite"; then
        mirror=$(sed -n 's/^URIs: *//p' /etc/apt/sources.list.d/debian.sources | head -1)
        echo "deb $mirror $suite main" >/etc/apt/sources.list.d/pinion-backports.list
        apt-get update -q >/dev/null || true
    fi
    DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends -t "$suite" golang-go >/dev/null
fi
