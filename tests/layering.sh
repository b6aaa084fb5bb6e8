#!/usr/bin/env bash
# Fails when a crate reaches for something its layer must not have.
#   runtime, isolation   no async runtime, no RPC stack: they fork, and must stay small
#   monitor, server, CLI never link the container library: they execute `pinion`
#   container, isolation know nothing of Kubernetes
set -euo pipefail
cd "$(dirname "$0")/.."
bad=0

closure() { # crate -> names of all crates it links
    cargo tree --locked --offline -q -e normal -p "$1" --prefix none -f '{p}' | sed 's/ .*//' | sort -u
}

forbid() { # crate, forbidden names...
    local crate=$1 names found
    shift
    names=$(closure "$crate")
    for name in "$@"; do
        if found=$(grep -x "$name" <<<"$names"); then
            echo "layering: $crate must not link $found" >&2
            cargo tree --locked --offline -q -e normal -p "$crate" -i "$found" | head -8 >&2 || true
            bad=1
        fi
    done
}

for crate in pinion pinion-container pinion-monitor pinion-sys pinion-topology pinion-placement pinion-lease pinion-device \
    pinion-seccomp pinion-cgroup pinion-monitor-proto; do
    forbid "$crate" tokio tonic hyper h2 reqwest
done
for crate in pinion-monitor piniond pinctl pinion-image pinion-network; do
    forbid "$crate" pinion-container
done
forbid pinctl pinion-store redb

# Code only: comments may say where a rule comes from, and tests may use real names.
words=$(find runtime/container/src isolation/*/src -name '*.rs' -print0 | xargs -0 awk '
    FNR == 1 { testing = 0 }
    /^#\[cfg\(test\)\]/ { testing = 1 }
    testing || /^ *\/\// { next }
    { line = $0; sub(/\/\/.*/, "", line) }
    tolower(line) ~ /(^|[^a-z])(kubernetes|kubelet|k8s|cri)([^a-z]|$)/ { print FILENAME ":" FNR ": " $0 }')
if [ -n "$words" ]; then
    echo "layering: Kubernetes words in the code of runtime/container or isolation/:" >&2
    echo "$words" >&2
    bad=1
fi
[ "$bad" = 0 ] && echo "layering: ok"
exit "$bad"
