# The index of commands. `make` alone lists them.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

CARGO ?= cargo
# Tools that cargo builds are kept over checkouts.
CACHE := $(or $(BAI_AGENT_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/bai-agent)
TOOLS ?= $(CACHE)/tools
DENY := $(TOOLS)/bin/cargo-deny
DENY_VERSION := 0.20.2
NEXTEST := $(shell command -v cargo-nextest || echo $(TOOLS)/bin/cargo-nextest)
NEXTEST_VERSION := 0.9.143
FUZZ_SECONDS ?= 20

.PHONY: help demo test build release install uninstall setup-build setup-demo setup-test check fmt clippy docs deny unit loom \
        integration test-accelerators test-gpu gpu-kit compat bench-agent bench-ports bench-publish bench-stats soak soak-stats setup-bench setup-vm vm-test vm-node verify-units fuzz build-fuzz runner clean

help: ## list the commands
	@grep -hE '^[a-z][a-z-]*:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

demo: setup-demo ## start a node, run the main job end to end, show it, clean up
	deploy/demo

test: setup-test $(NEXTEST) ## install, build and run everything; the counts are the closing line
	PATH="$$PATH:$(TOOLS)/bin" tests/scripts/test-all

build: setup-build ## build both programs (debug)
	$(CARGO) build --locked -p control -p dataplane --bins

release: setup-build ## build both programs (release)
	$(CARGO) build --locked --release -p control -p dataplane --bins

install: ## put the release programs, units and documents on this host (root), or below DESTDIR
	deploy/install

uninstall: ## take them away, and what they leave on the host; kernels, state and configuration stay (root)
	deploy/install --remove

setup-build setup-demo setup-test setup-bench setup-vm: setup-%:
	@deploy/setup $*

check: fmt clippy docs deny ## static checks

fmt: ## formatting
	$(CARGO) fmt --all --check

clippy: setup-build ## lints, warnings denied
	$(CARGO) clippy --locked --workspace --all-targets -- -D warnings

docs: setup-build ## documentation, warnings denied
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --locked --workspace --no-deps --document-private-items -q

deny: $(DENY) ## dependency policy: bans, licenses, sources
	$(DENY) --locked --workspace check bans licenses sources

$(DENY):
	$(CARGO) install cargo-deny --version $(DENY_VERSION) --locked --debug --root $(TOOLS) -q

$(TOOLS)/bin/cargo-nextest:
	$(CARGO) install cargo-nextest --version $(NEXTEST_VERSION) --locked --root $(TOOLS) -q

unit: setup-build $(NEXTEST) ## tests that need no peer: library and binary tests of every crate
	$(NEXTEST) nextest run --locked --workspace --lib --bins

loom: setup-build ## model checks of the shared-memory cell
	RUSTFLAGS="--cfg loom" CARGO_TARGET_DIR=target/loom $(CARGO) test --locked -p shared --lib --release loom_

integration: setup-test build runner $(NEXTEST) ## suites against real Docker, the real runner, the published client
	tests/scripts/with-engine $(NEXTEST) nextest run --locked -p tests --tests

test-accelerators: setup-test build runner $(NEXTEST) ## all about accelerators alone, the manager's view of them too (part of `make test`)
	tests/scripts/with-engine $(NEXTEST) nextest run --locked -p tests --test 'accelerator_*'
	tests/scripts/compat accelerators_are_slots_of_the_manager

test-gpu: build $(NEXTEST) ## on a node with NVIDIA's driver (root): loads against nvidia-smi; writes what it saw into docs/gpu.md
	UPDATE_DOCS=1 $(NEXTEST) nextest run --locked -p tests --test gpu --success-output final

gpu-kit: build ## the same for a machine that can't build: target/gpu-kit/run
	tests/scripts/gpu-kit

compat: setup-test build runner ## an unmodified manager drives the agent through its public API
	tests/scripts/compat

bench-agent: setup-test release runner ## our agent against the Python agent, interleaved; writes target/bench/agent.json
	$(CARGO) build --locked --release -p benches --bin rpc-load
	"$$(tests/scripts/manager-env)" tests/python/bench_agent.py

RUNNER_DIR := $(or $(BAI_RUNNER_DIR),$(CACHE)/runner)

runner: setup-demo build ## install the published runner packages where the suites look for them
	$(or $(CARGO_TARGET_DIR),target)/debug/bai-agent runner install --wheels "$$(tests/scripts/runner-wheels)" --runner-dir $(RUNNER_DIR)

vm-test: setup-vm ## collection and the kernel path on Debian's kernel (6.1) with pure cgroup v2, in an emulated machine
	tests/scripts/vm-test

vm-node: setup-test setup-vm ## a whole node under systemd, installed from here, in an emulated machine (root); VM_RELEASE=trixie
	tests/scripts/vm-node

verify-units: ## check the systemd units
	tests/scripts/verify-units

fuzz: setup-test ## run every fuzz target for FUZZ_SECONDS each
	fuzz/run $(FUZZ_SECONDS)

build-fuzz: setup-test ## build the fuzz targets only
	fuzz/run 0

bench-ports: setup-bench ## service ports against peers (root); BENCH='--rounds 3 --peers direct,kernel' narrows it
	$(CARGO) build --locked --release -p dataplane -p benches --bins
	$(or $(CARGO_TARGET_DIR),target)/release/bench-ports $(BENCH)

bench-publish: setup-bench ## publishing ports by rows and by the engine (root); BENCH='--rounds 3' narrows it
	$(CARGO) build --locked --release -p dataplane -p benches --bins
	$(or $(CARGO_TARGET_DIR),target)/release/bench-publish $(BENCH)

bench-stats: setup-test release runner ## statistics of many containers against other ways (root); BENCH='--ticks 50 --agent-seconds 0' narrows it
	$(CARGO) build --locked --release -p benches --bin bench-stats
	$(or $(CARGO_TARGET_DIR),target)/release/bench-stats $(BENCH)

SOAK_SECONDS ?= 3600

soak: setup-test build runner ## kernels come and go for SOAK_SECONDS, nothing may be left and memory may not grow
	SOAK_SECONDS=$(SOAK_SECONDS) tests/scripts/with-engine $(CARGO) test --locked -p tests --test first_light twenty_cycles -- --nocapture

soak-stats: setup-test build ## containers come and go for SOAK_SECONDS, nothing may be left in the dataplane; one with 10,000 processes (root)
	SOAK_SECONDS=$(SOAK_SECONDS) $(CARGO) test --locked -p tests --test collect_churn -- --nocapture
	BAI_CROWD=10000 $(CARGO) test --locked -p tests --test collect_isolation a_crowd_of_processes -- --nocapture

clean: ## remove build results
	$(CARGO) clean
	rm -rf fuzz/target
