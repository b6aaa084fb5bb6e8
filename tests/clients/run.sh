#!/usr/bin/env bash
# Other people's clients on an OCI runtime: podman as root and as an unprivileged user,
# buildah, and containerd's runc shim through ctr.
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

# Both clients set limits that root without CAP_SYS_RESOURCE may not raise; the file is for
# the containers that podman makes by itself.
cat >"$WORK/containers.conf" <<T
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]
[engine]
runtime_supports_nocgroup = ["$(basename "$RUNTIME")"]
T
export CONTAINERS_CONF=$WORK/containers.conf
GLOBAL=(--root "$WORK/podman" --runroot "$WORK/podman-run" --storage-driver vfs
    --cgroup-manager cgroupfs --runtime "$RUNTIME" --log-level error)
podman() { command podman "${GLOBAL[@]}" "$@"; }
PODLIMITS=(--ulimit nofile=1024:1024 --ulimit nproc=4096:4096)
LIMITS=("${PODLIMITS[@]}" --network none --cgroup-parent "/$ID")

cleanup() {
    podman pod rm -fa -t 0 >/dev/null 2>&1
    podman rm -fa -t 0 >/dev/null 2>&1
    [ -n "${ROOTLESS:-}" ] && { as_user rm -fa -t 0; pkill -KILL -u "$ROOTLESS"; sleep 0.5; userdel "$ROOTLESS"; }
    [ -n "${CONTAINERD:-}" ] && { ctr tasks kill -s KILL "$ID" >/dev/null 2>&1; kill "$CONTAINERD"; wait "$CONTAINERD"; }
    find /sys/fs/cgroup -depth -type d \( -path "*/$ID/*" -o -name "$ID" -o -name "libpod_parent" \) -exec rmdir {} \; 2>/dev/null
    # Where a controller of v1 is not mounted podman makes plain directories.
    for dir in /sys/fs/cgroup/*/; do
        [ "$(stat -fc %T "$dir")" = tmpfs ] && rm -rf "$dir$ID"
    done
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
    check 'podman: exec -it' '*/dev/pts/*[[]0]' on_terminal podman exec -it one tty
    check 'podman: a change of the CPU weight' '*[[]0]' podman update --cpu-shares 512 one
    check 'podman: it reached the kernel' '512 [[]0]' weight_of one
    check 'podman: pause' '*[[]0]' podman pause one
    check 'podman: is paused' 'paused [[]0]' podman inspect -f '{{.State.Status}}' one
    check 'podman: resume' '*[[]0]' podman unpause one
    check 'podman: top' '*sleep 1000*[[]0]' podman top one args
    check 'podman: logs' 'started [[]0]' podman logs one
    check 'podman: stop' '*[[]0]' podman stop -t 1 one
    check 'podman: start again' '*[[]0]' podman start one
    check 'podman: kill' '*[[]0]' podman kill one
    check 'podman: remove' '*[[]0]' podman rm -f -t 0 one
    check 'podman: a health check' '*[[]0]' podman run -d --name health --health-cmd 'cat /etc/group' \
        --health-interval disable "${LIMITS[@]}" box:1 sleep 1000
    check 'podman: is healthy' '*[[]0]' podman healthcheck run health
    check 'podman: mapped users' '*0*100000*65536* [[]0]' podman run --rm "${LIMITS[@]}" --uidmap 0:100000:65536 --gidmap 0:100000:65536 box:1 cat /proc/self/uid_map
    check 'podman: root is somebody else outside' '0 [[]0]' podman run --rm "${LIMITS[@]}" --uidmap 0:100000:65536 --gidmap 0:100000:65536 box:1 id -u
    check 'podman: a pod' '*[[]0]' podman pod create --name pod --network none --cgroup-parent "/$ID" \
        --infra-image box:1 --infra-command 'sleep 1000' --share ipc,uts,net
    check 'podman: a container in the pod' '*[[]0]' podman run -d --pod pod --name inpod "${PODLIMITS[@]}" box:1 sleep 1000
    check 'podman: shares the network of the pod' 'same [[]0]' shares_network
    check 'podman: the pod stops' '*[[]0]' podman pod stop -t 0 pod
    check 'podman: and goes' '*[[]0]' remove_pod
    check 'podman: systemd-like cgroup access is refused' '*[[]1]' podman run --rm "${LIMITS[@]}" box:1 touch /sys/fs/cgroup/x
}

# A command with a terminal of its own.
on_terminal() {
    shift # podman
    script -qec "$(printf '%q ' podman "${GLOBAL[@]}" "$@")" /dev/null </dev/null
}

weight_of() {
    local pid
    pid=$(podman inspect -f '{{.State.Pid}}' "$1")
    local v1
    v1=$(awk -F: '$2 ~ /(^|,)cpu(,|$)/ {print $3}' "/proc/$pid/cgroup")
    if [ -n "$v1" ]; then
        cat "$(ls -d /sys/fs/cgroup/cpu /sys/fs/cgroup/cpu,cpuacct 2>/dev/null | head -1)$v1/cpu.shares"
    else
        # 512 shares of v1 are a weight of 20 (1 + 510 * 9999 / 262142), or 59 by runc's newer curve.
        case $(cat "/sys/fs/cgroup$(cut -d: -f3 "/proc/$pid/cgroup")/cpu.weight") in 20 | 59) echo 512 ;; esac
    fi
}

# podman gives up when a conmon that is ending still holds its cgroup.
remove_pod() {
    for _ in 1 2 3 4 5; do
        podman pod rm -f pod && return
        podman pod exists pod || return 0
        sleep 0.3
    done
    return 1
}

shares_network() {
    local infra own
    infra=$(podman inspect -f '{{.State.Pid}}' "$(podman pod inspect -f '{{.InfraContainerID}}' pod)")
    own=$(podman inspect -f '{{.State.Pid}}' inpod)
    [ "$(readlink "/proc/$infra/ns/net")" = "$(readlink "/proc/$own/ns/net")" ] && echo same
}

with_buildah() {
    local base=(buildah --root "$WORK/podman" --runroot "$WORK/podman-run" --storage-driver vfs --log-level error)
    local container
    container=$("${base[@]}" from --pull-never localhost/box:1) || container=failed
    check 'buildah: run' '*built*[[]0]' "${base[@]}" run --runtime "$RUNTIME" --isolation oci --network none "$container" echo built
    check 'buildah: what it writes stays' '*kept*[[]0]' "${base[@]}" run --runtime "$RUNTIME" --isolation oci --network none "$container" sh -c 'echo kept >/kept; cat /kept'
    check 'buildah: exit codes come back' '*[[][13]*]' "${base[@]}" run --runtime "$RUNTIME" --isolation oci --network none "$container" sh -c 'exit 3'
    "${base[@]}" rm "$container" >/dev/null 2>&1
}

# podman of a user who is nobody: user namespaces by newuidmap, no rights on cgroups, no D-Bus.
# The containers' state is where the runtime puts it by itself: in the user's XDG_RUNTIME_DIR.
with_rootless_podman() {
    if ! command -v newuidmap >/dev/null; then
        echo 'not possible here: rootless podman needs newuidmap (package uidmap)'
        return
    fi
    local user=pinionclients home=$WORK/home
    useradd --no-create-home --home-dir "$home" --shell /bin/sh "$user" || return
    ROOTLESS=$user
    grep -q "^$user:" /etc/subuid || { usermod --add-subuids 400000-465535 --add-subgids 400000-465535 "$user"; }
    mkdir -p "$home/run" "$home/volume" && echo mine >"$home/volume/file" && chown -R "$user" "$home" && chmod 755 "$WORK" && chmod 700 "$home/run"
    local runtime=$home/$(basename "$RUNTIME")
    install -m 755 "$RUNTIME" "$runtime" && cp "$WORK/rootfs.tar" "$home/" && chown "$user" "$home/rootfs.tar"
    local words=(env -u DBUS_SESSION_BUS_ADDRESS HOME="$home" XDG_RUNTIME_DIR="$home/run" PATH="$PATH" podman --root "$home/podman"
        --runroot "$home/run/podman" --storage-driver vfs --cgroup-manager cgroupfs
        --runtime "$runtime" --events-backend none --log-level error)
    as_user() { (cd "$home" && setpriv --reuid "$user" --regid "$user" --init-groups "${words[@]}" "$@"); }
    check 'rootless podman: image is there' '*[[]0]' as_user import -q "$home/rootfs.tar" box:1
    local limits=(--network none --cgroups disabled)
    check 'rootless podman: output comes back' 'hello [[]0]' as_user run --rm "${limits[@]}" box:1 echo hello
    check 'rootless podman: root inside' '0 [[]0]' as_user run --rm "${limits[@]}" box:1 id -u
    check 'rootless podman: exit codes come back' '* [[]7]' as_user run --rm "${limits[@]}" box:1 sh -c 'exit 7'
    check 'rootless podman: another user inside' '1000 [[]0]' as_user run --rm "${limits[@]}" -u 1000 box:1 id -u
    check 'rootless podman: starts detached' '*[[]0]' as_user run -d --name one "${limits[@]}" box:1 sleep 1000
    check 'rootless podman: exec' 'here [[]0]' as_user exec one echo here
    check 'rootless podman: the state is the own' 'own [[]0]' state_of_user
    check 'rootless podman: exec exit code' '* [[]4]' as_user exec one sh -c 'exit 4'
    check 'rootless podman: a volume of the user' 'mine* [[]0]' as_user run --rm "${limits[@]}" -v "$home/volume:/v" box:1 cat /v/file
    check 'rootless podman: kill' '*[[]0]' as_user kill one
    check 'rootless podman: remove' '*[[]0]' as_user rm -f -t 0 one
}

# Of pinion: runc and crun have other places.
state_of_user() {
    case $(basename "$RUNTIME") in
    pinion*) [ -n "$(ls -A "$WORK/home/run/pinion/runtime")" ] && echo own ;;
    *) echo own ;;
    esac
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
with_buildah
with_containerd
with_rootless_podman
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
