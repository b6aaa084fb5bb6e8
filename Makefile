# Pinion. `make demo` shows it, `make test` proves it; `make help` lists the rest.
SHELL := /bin/bash
.DEFAULT_GOAL := help

CACHE  ?= $(HOME)/.cache/pinion
PREFIX ?= /usr/local
TARGET := $(shell if rustup target list --installed 2>/dev/null | grep -qx x86_64-unknown-linux-musl \
	|| ! command -v rustup >/dev/null || rustup -q target add x86_64-unknown-linux-musl >/dev/null 2>&1; \
	then echo x86_64-unknown-linux-musl; else echo x86_64-unknown-linux-gnu; fi)

export CARGO_TARGET_DIR ?= $(CACHE)/target
export CARGO_BUILD_TARGET := $(TARGET)
export PINION_CACHE := $(CACHE)
# Where the binaries under test are gathered: what the node and the suites install.
STAGE := $(CARGO_TARGET_DIR)/$(TARGET)/stage
export PINION_BIN := $(STAGE)
PATH := $(STAGE):$(CACHE)/bin:/usr/local/go/bin:$(PATH):$(CACHE)/criu/bin
export PATH
HARNESS := $(STAGE)/pinion-tests

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

.PHONY: build
build: setup-build ## build all binaries into one directory
	cargo build --release --locked --workspace --bins
	@# They abort on a panic: nothing unwinds, and the tables for it are a tenth of the size.
	RUSTFLAGS="$$RUSTFLAGS -C force-unwind-tables=no" cargo build --profile dist --locked -p pinion -p pinion-monitor
	@mkdir -p $(STAGE)
	@for b in piniond pinctl pinion-agent pinion-tests pinion-bench; do \
		install -C -m 755 $(CARGO_TARGET_DIR)/$(TARGET)/release/$$b $(STAGE)/$$b; done
	@for b in pinion pinion-monitor; do \
		install -C -m 755 $(CARGO_TARGET_DIR)/$(TARGET)/dist/$$b $(STAGE)/$$b; done
	@ls -l $(STAGE) | awk 'NR > 1 { printf "%10d %s\n", $$5, $$9 }'

.PHONY: setup-build setup-demo setup-test setup-browser
setup-build setup-demo setup-test setup-browser: setup-%:
	@tests/setup.sh $*

.PHONY: demo
demo: setup-demo build ## a pod with exclusive CPUs and pinned hugepages, in a virtual two-node machine
	$(HARNESS) demo node

.PHONY: demo-host
demo-host: setup-demo build ## the same on this machine, with an honest receipt of what it cannot give
	$(HARNESS) demo host

.PHONY: demo-vm
demo-vm: setup-demo build ## a pod with a kernel of its own: guest and host side by side, receipt, times
	$(HARNESS) demo-vm

.PHONY: test
test: setup-test build ## everything; ends with one line of totals
	$(HARNESS) all

.PHONY: check
check: setup-build ## format, lints and layering
	cargo fmt --all -- --check
	cargo clippy --release --locked --workspace --all-targets -- -D warnings
	tests/layering.sh

.PHONY: unit
unit: setup-test build ## unit and integration tests of every crate
	cargo test --release --locked --workspace

.PHONY: critest
critest: setup-test build ## critest against piniond on this machine
	$(HARNESS) critest host

.PHONY: critest-variants
critest-variants: setup-test build ## critest in full over WebSocket, then in parallel, then in the virtual node (an hour)
	$(HARNESS) critest host --websocket
	$(HARNESS) critest host --parallel 4
	$(HARNESS) critest node

.PHONY: kubelet
kubelet: setup-test build ## kubelet itself against piniond, in the virtual node
	$(HARNESS) kubelet

.PHONY: undisturbed
undisturbed: setup-demo build ## fifty pods come and go beside exclusive CPUs, in the virtual node
	$(HARNESS) undisturbed

.PHONY: screenshot
screenshot: setup-browser build ## the page of a virtual node in a real browser, and docs/topology.png
	$(HARNESS) page look --picture docs/topology.png

.PHONY: test-node
test-node: setup-test build ## everything that runs in the virtual node
	$(HARNESS) node suite

.PHONY: node
node: setup-demo build ## a command in the virtual node, with Pinion installed: make node CMD='pinctl topology'
	$(HARNESS) node run -- sh -c '$(CMD)'

# Tables, charts and numbers of the last run; the README shows the medians.
RESULTS := bench/results
results = --markdown $(RESULTS)/$(1).md --json $(RESULTS)/$(1).json --svg $(RESULTS)/$(1).svg --insert README.md

.PHONY: bench bench-oci bench-cri
bench: bench-oci bench-cri ## all benchmarks side by side with the peers: make bench BENCH_ARGS='-n 20'
bench-oci: setup-test build ## create, start, exec, state, delete against runc and crun
	@mkdir -p $(RESULTS)
	$(STAGE)/pinion-bench oci --runtime pinion=$(STAGE)/pinion --runtime runc=runc --runtime crun=crun $(call results,oci) $(BENCH_ARGS)
bench-cri: setup-test build ## pods through CRI against containerd and runc
	@mkdir -p $(RESULTS)
	$(HARNESS) bench cri -- $(call results,cri) $(BENCH_ARGS) $(BENCH_CRI_ARGS)

.PHONY: churn
churn: setup-test build ## 110 pods at once, 2,000 in sequence: what stays, and how long lists take
	$(HARNESS) churn host $(CHURN_ARGS)

.PHONY: test-faults
test-faults: setup-test build ## pinion made to fail at every system call in turn (an hour)
	PINION_FAULTS=all cargo test --release --locked -p pinion --test runtime faults -- --nocapture --test-threads=1

.PHONY: test-crashes
test-crashes: setup-test build ## piniond killed at every system call that ends a step of a call (many minutes)
	$(HARNESS) crash host --every

.PHONY: install
install: build ## install binaries, unit file, man pages and completions below PREFIX (/usr/local)
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/lib/systemd/system $(DESTDIR)$(PREFIX)/share/bash-completion/completions
	install -m 755 $(STAGE)/pinion $(STAGE)/pinion-monitor $(STAGE)/piniond $(STAGE)/pinion-agent $(STAGE)/pinctl $(DESTDIR)$(PREFIX)/bin/
	sed 's|/usr/local|$(PREFIX)|g' cri-shim/server/piniond.service >$(DESTDIR)$(PREFIX)/lib/systemd/system/piniond.service
	$(HARNESS) manual $(DESTDIR)$(PREFIX)/share
	$(STAGE)/pinctl completions bash >$(DESTDIR)$(PREFIX)/share/bash-completion/completions/pinctl

.PHONY: fmt
fmt: ## format the code
	cargo fmt --all

.PHONY: clean
clean: ## remove what was built; downloads stay
	rm -rf $(CARGO_TARGET_DIR)
