#!/usr/bin/env bash
# Other people's clients on an OCI runtime: podman, and containerd's runc shim through ctr.
#   run.sh RUNTIME      RUNTIME is the path of pinion, or of runc, which is the oracle
# Prints a line for each check and ends with `N passed, N failed`.
set -uo pipefail
RUNTIME=$(readlink -f "${1:?usage: run.sh RUNTIME}")
WORK=$(mktemp -d /tmp/pinion-clients.XXXXXX)
ID=pinion-clients-$$
passed=0 failed=0

check() { # name, expected output (a glob), command...
    local name=$1 want=$2 got code
    shift 2
    got=$("$@" 2>&1) && code=0 || code=$?
    got="$got [$code]"
    # shellcheck disable=SC2053
    if [[ $got == $want ]]; then
        passed=$((passed + 1))
        echo "ok      $name"
    else
        failed=$((failed + 1))
        echo "FAILED  $name"
        echo "        wanted: $want"
        echo "        got:    $got"
    fi
}

# Both clients set limits that root without CAP_SYS_RESOURCE may not raise.
podman() {
    command podman --root "$WORK/podman" --runroot "$WORK/podman-run" --storage-driver vfs \
        --cgroup-manager cgroupfs --runtime "$RUNTIME" --log-level error "$@"
}
LIMITS=(--ulimit nofile=1024:1024 --ulimit nproc=4096:4096 --network none
    --cgroup-parent "/$ID")

cleanup() {
    podman rm -fa -t 0 >/dev/null 2>&1
    [ -n "${CONTAINERD:-}" ] && { ctr tasks kill -s KILL "$ID" >/dev/null 2>&1; kill "$CONTAINERD"; wait "$CONTAINERD"; }
    find /sys/fs/cgroup -depth -type d \( -path "*/$ID/*" -o -name "$ID" -o -name "libpod_parent" \) -exec rmdir {} \; 2>/dev/null
    awk -v w="$WORK" '$5 ~ "^" w {print $5}' /proc/self/mountinfo | sort -r | xargs -r -n1 umount -l
    rm -rf "$WORK"
} 2>/dev/null
trap cleanup EXIT

rootfs() {
    mkdir -p "$WORK"/rootfs/{bin,etc,tmp,proc,sys,dev}
    cp /bin/busybox "$WORK/rootfs/bin/"
    for applet in sh ls cat echo id sleep true false grep tty stty env touch kill hostname wc; do
        ln -sf busybox "$WORK/rootfs/bin/$applet"
    done
    echo 'root:x:0:0:root:/:/bin/sh' >"$WORK/rootfs/etc/passwd"
    echo 'root:x:0:' >"$WORK/rootfs/etc/group"
    tar -C "$WORK/rootfs" -cf "$WORK/rootfs.tar" .
}

with_podman() {
    check 'podman: image is there' '*[[]0]' podman import -q "$WORK/rootfs.tar" box:1
    check 'podman: output comes back' 'hello [[]0]' podman run --rm "${LIMITS[@]}" box:1 echo hello
    check 'podman: exit codes come back' '* [[]7]' podman run --rm "${LIMITS[@]}" box:1 sh -c 'exit 7'
    check 'podman: a command that is not there is 127' '*[[]127]' podman run --rm "${LIMITS[@]}" box:1 nothere
    check 'podman: a command that may not run is 126' '*[[]126]' podman run --rm "${LIMITS[@]}" box:1 /etc/passwd
    check 'podman: user and groups' 'uid=1000*gid=1001*groups=1001* [[]0]' podman run --rm "${LIMITS[@]}" -u 1000:1001 box:1 id
    check 'podman: a read-only root' '*Read-only*[[]1]' podman run --rm "${LIMITS[@]}" --read-only box:1 touch /x
    check 'podman: a read-only volume' '*Read-only*[[]1]' podman run --rm "${LIMITS[@]}" -v "$WORK/rootfs:/v:ro" box:1 touch /v/x
    check 'podman: environment' 'A=b* [[]0]' podman run --rm "${LIMITS[@]}" -e A=b box:1 sh -c 'echo A=$A'
    check 'podman: capabilities are dropped' '*0000000000000000 [[]0]' podman run --rm "${LIMITS[@]}" --cap-drop all box:1 grep CapEff /proc/self/status
    check 'podman: seccomp filters' '*2 [[]0]' podman run --rm "${LIMITS[@]}" box:1 grep Seccomp: /proc/self/status
    check 'podman: no_new_privs' '*1 [[]0]' podman run --rm "${LIMITS[@]}" --security-opt no-new-privileges box:1 grep NoNewPrivs /proc/self/status
    check 'podman: a terminal' '/dev/pts/0* [[]0]' podman run --rm -t "${LIMITS[@]}" box:1 tty
    check 'podman: process limit' '*[[]0]' podman run --rm "${LIMITS[@]}" --pids-limit 50 box:1 true
    check 'podman: starts detached' '*[[]0]' podman run -d --name one "${LIMITS[@]}" box:1 sh -c 'echo started; sleep 1000'
    check 'podman: exec' 'here [[]0]' podman exec one echo here
    check 'podman: exec exit code' '* [[]3]' podman exec one sh -c 'exit 3'
    check 'podman: exec with a terminal' '/dev/pts/* [[]0]' podman exec -t one tty
    check 'podman: exec as another user' '5 [[]0]' podman exec -u 5 one id -u
    check 'podman: pause' '*[[]0]' podman pause one
    check 'podman: is paused' 'paused [[]0]' podman inspect -f '{{.State.Status}}' one
    check 'podman: resume' '*[[]0]' podman unpause one
    check 'podman: top' '*sleep 1000*[[]0]' podman top one args
    check 'podman: logs' 'started [[]0]' podman logs one
    check 'podman: stop' '*[[]0]' podman stop -t 1 one
    check 'podman: start again' '*[[]0]' podman start one
    check 'podman: kill' '*[[]0]' podman kill one
    check 'podman: remove' '*[[]0]' podman rm -f -t 0 one
}

ctr() { command ctr --address "$WORK/containerd.sock" "$@"; }
RUN=(--runc-binary "$RUNTIME" --cgroup "/$ID/ctr")

with_containerd() {
    cat >"$WORK/containerd.toml" <<T
version = 2
root = "$WORK/containerd"
state = "$WORK/containerd-run"
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[grpc]
  address = "$WORK/containerd.sock"
T
    containerd --config "$WORK/containerd.toml" >"$WORK/containerd.log" 2>&1 &
    CONTAINERD=$!
    for _ in $(seq 100); do ctr version >/dev/null 2>&1 && break; sleep 0.1; done
    podman save -q --format oci-archive -o "$WORK/box.tar" box:1 >/dev/null 2>&1
    check 'ctr: image is there' '*[[]0]' ctr images import "$WORK/box.tar"
    check 'ctr: output comes back' 'hello [[]0]' ctr run --rm "${RUN[@]}" localhost/box:1 "$ID" echo hello
    check 'ctr: exit codes come back' '*[[]7]' ctr run --rm "${RUN[@]}" localhost/box:1 "$ID" sh -c 'exit 7'
    check 'ctr: errors come back through the log' '*nothere*[[]1]' ctr run --rm "${RUN[@]}" localhost/box:1 "$ID" nothere
    check 'ctr: starts detached' '*[[]0]' ctr run -d "${RUN[@]}" localhost/box:1 "$ID" sleep 1000
    check 'ctr: exec' 'here [[]0]' ctr tasks exec --exec-id e1 "$ID" echo here
    check 'ctr: exec exit code' '*[[]5]' ctr tasks exec --exec-id e2 "$ID" sh -c 'exit 5'
    check 'ctr: processes' '*PID*[[]0]' ctr tasks ps "$ID"
    check 'ctr: pause' '*[[]0]' ctr tasks pause "$ID"
    check 'ctr: is paused' '*PAUSED* [[]0]' ctr tasks ls
    check 'ctr: resume' '*[[]0]' ctr tasks resume "$ID"
    check 'ctr: metrics' '*[[]0]' ctr tasks metrics "$ID"
    check 'ctr: kill' '*[[]0]' ctr tasks kill -s KILL "$ID"
    sleep 0.5
    check 'ctr: delete task' '*code 137* [[]0]' ctr tasks delete "$ID"
    check 'ctr: delete container' '*[[]0]' ctr containers delete "$ID"
}

rootfs
with_podman
with_containerd
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
