# Everything people and CI run. `make` alone formats, builds, lints and tests; `make help` lists the rest.

PYTHON ?= python3
BIN := .venv/bin
CARGO := cd native && cargo
export PYTHON

NATIVE_SOURCES := $(shell find native \( -name target -o -name fuzz -o -name loom -o -name peers \) -prune -o \( -name '*.rs' -o -name 'Cargo.*' \) -print)

PYTHON_SOURCES := $(shell find src -name '*.py')

.PHONY: all help demo build format lint test test-native restarts guest interop bench docs fuzz loom sanitize oracle mutants kills soak drain restart-costs survival-costs migration-costs instructions packages clean
.DELETE_ON_ERROR:

all: format build lint test

help:
	@echo 'make              format, build, lint and test'
	@echo 'make demo         serve an image to a real guest, which formats, fills, resizes and reboots on it'
	@echo 'make build        the virtual environment .venv with the package in it (native module: profile quick)'
	@echo 'make lint         ruff, mypy --strict, cargo fmt, cargo clippy: no warning passes'
	@echo 'make test         the Python tests, one guest boot per QEMU included, and the native tests'
	@echo 'make test-native  the native tests alone'
	@echo 'make restarts     twenty upgrades and restarts of each kind in a row under load (minutes)'
	@echo 'make guest        the whole matrix of real guests (minutes)'
	@echo 'make interop      real peers: qemu-img over libblkio, storage daemons, the rust-vmm crates, guests that migrate under QEMU 11.1 (minutes)'
	@echo 'make packages     fetches what guests are made of into .cache (test, guest, demo and interop do it by themselves)'
	@echo 'make bench        ours, a storage daemon and the bare loop compared: a table, build/bench.html and .json (long, a quiet machine)'
	@echo 'make docs         the documentation, warnings are errors; needs a passing `make test` for its tables'
	@echo 'make fuzz         the fuzz targets, FUZZ_SECONDS (60) of processor time each, FUZZ_JOBS (1) at a time'
	@echo 'make loom         every order of events of the notifications and the mailbox (a minute)'
	@echo 'make sanitize     the native tests under AddressSanitizer, leaks included (minutes)'
	@echo 'make oracle       the native ring against a slow one in Python, millions of steps (minutes)'
	@echo 'make mutants      plants mistakes into the ring code; the oracle has to find each (half an hour)'
	@echo 'make kills        kills back-ends at every step and KILLS (10000) times at random, and plants mistakes (half an hour)'
	@echo 'make soak         SOAK_SECONDS (3600) of mixed load with kills, resets and resizes; memory must stay flat'
	@echo 'make drain        two full rings drained by one worker and by two (a quiet machine)'
	@echo 'make restart-costs  how long a start takes, and a disk is away at a restart and upgrade (minutes)'
	@echo 'make survival-costs  what in-flight tracking and the sandbox cost, as ratios of one run (minutes, a quiet machine)'
	@echo 'make migration-costs  what the dirty log costs, on and off, as ratios of one run (minutes, a quiet machine)'
	@echo 'make instructions  counts what a request executes under valgrind; a rise of more than 5 % fails, RECORD=1 records it (a minute)'
	@echo 'make clean        removes what the other targets made'

# -- building ---------------------------------------------------------------------------------------------------------

.venv/.dev: pyproject.toml tools/setup-python
	@tools/setup-python
	@touch $@

.venv/.docs: .venv/.dev
	@tools/setup-python docs
	@touch $@

.venv/.fuzz: .venv/.dev
	@tools/setup-python fuzz
	@touch $@

.venv/.native: .venv/.dev $(NATIVE_SOURCES)
	@tools/check-rust
	@command -v cc >/dev/null || tools/install-packages gcc libc6-dev
	PIP_QUIET=1 $(BIN)/maturin develop --profile quick --quiet
	@touch $@

build: .venv/.native

# -- judging ----------------------------------------------------------------------------------------------------------

format: .venv/.dev
	$(BIN)/ruff check --quiet --fix-only src tests examples docs benchmarks
	$(BIN)/ruff format --quiet src tests examples docs benchmarks
	@tools/check-rust
	$(CARGO) fmt --all

lint: build
	$(BIN)/ruff check src tests examples docs benchmarks
	$(BIN)/ruff format --check src tests examples docs benchmarks
	$(BIN)/mypy
	$(BIN)/mypy --strict docs/conformance.py docs/faults.py docs/conf.py examples
	$(CARGO) fmt --all --check
	$(CARGO) clippy --quiet --locked --profile quick --workspace --all-targets -- -D warnings

test: build packages
	$(BIN)/pytest
	@$(MAKE) --no-print-directory test-native

test-native:
	@tools/check-rust
	$(CARGO) test --quiet --locked --profile quick -p vhostuser-core
	$(CARGO) test --quiet --locked --profile quick -p vhostuser-kill

# Twenty upgrades, and twenty restarts by SIGTERM and by SIGKILL, in a row under load.
restarts: build
	RESTART_ROUNDS=20 $(BIN)/pytest tests/cli/test_restart.py

guest: build packages
	$(BIN)/pytest -m guest tests/guest tests/backend

interop: build
	@$(BIN)/python -m tests.guest.prepare sid || true
	@$(BIN)/python -m tests.peers.daemons || true
	$(BIN)/pytest -m interop tests/interop tests/peers
	VHOSTUSER_QEMU=sid $(BIN)/pytest -m guest tests/guest/test_migration.py

demo: build packages
	@$(BIN)/python -m tests.guest.demo

# QEMU, kernels and tools from Debian's packages, unpacked below .cache without being installed. Where they cannot be had, the
# reason is printed and the tests that need them are skipped.
packages: .venv/.dev
	@$(BIN)/python -m tests.guest.prepare || true

# The least that a back-end can do for a request, in one C file: what the benchmarks measure others against.
build/bare: benchmarks/bare.c
	@command -v cc >/dev/null || tools/install-packages gcc libc6-dev
	@mkdir -p build
	cc -O2 -Wall -Wextra -Werror -o $@ $<

# What is measured is the release profile, in an environment of its own: both the server and the client that drives it.
build/bench-venv/.native: .venv/.dev $(NATIVE_SOURCES) $(PYTHON_SOURCES)
	@tools/check-rust
	@rm -rf build/wheels build/bench-venv
	PIP_QUIET=1 $(BIN)/maturin build --release --quiet --out build/wheels
	$(PYTHON) -m venv build/bench-venv
	build/bench-venv/bin/pip install --quiet --disable-pip-version-check build/wheels/*.whl
	@touch $@

# BENCH has more options, as in `make bench BENCH='--quick --only tmpfs'`; all of them: .venv/bin/python -m benchmarks --help
BENCH ?=
bench: build build/bare build/bench-venv/.native
	@$(BIN)/python -m tests.guest.prepare || true
	$(BIN)/python -m benchmarks --python build/bench-venv/bin/python --json build/bench.json $(BENCH)

restart-costs: build
	$(BIN)/python -m benchmarks.startup
	$(BIN)/python -m benchmarks.restart

# Native targets (native/fuzz) under AddressSanitizer and Python ones, all coverage-guided: see tests/fuzz.
FUZZ_SECONDS ?= 60
FUZZ_JOBS ?= 1
fuzz: build .venv/.fuzz
	@command -v c++ >/dev/null || tools/install-packages g++
	@$(BIN)/python -m tests.fuzz --seconds $(FUZZ_SECONDS) --jobs $(FUZZ_JOBS)

# The same sources with loom's atomics: a workspace of its own (native/loom).
loom:
	@tools/check-rust
	cd native/loom && cargo test --quiet --locked loom_

sanitize:
	@tools/check-rust
	@tools/sanitize

oracle: build
	ORACLE_OPERATIONS=4000000 $(BIN)/pytest tests/oracle

mutants: build
	@$(BIN)/python tools/mutants

# Native back-ends by the thousand, whole Python processes by the hundred, storage that outlives them; then the same with
# mistakes planted, each of which has to be found.
KILLS ?= 10000
kills: build
	$(CARGO) build --quiet --locked --profile quick -p vhostuser-kill
	nice native/target/quick/vhostuser-kill table
	nice native/target/quick/vhostuser-kill random kills=$(KILLS)
	nice $(BIN)/pytest -m kills tests/survival
	nice $(BIN)/python tools/kill-mutants

# Moderate: it runs beside other work. All numbers are in build/soak.json, every minute.
SOAK_SECONDS ?= 3600
soak: build packages
	nice $(BIN)/python -m tests.soak --seconds $(SOAK_SECONDS) --json build/soak.json

survival-costs: build
	$(BIN)/python -m benchmarks.survival --json build/survival-costs.json

migration-costs: build
	$(BIN)/python -m benchmarks.migration --json build/migration-costs.json

# Two rings full of requests, drained by one worker and by two.
drain: build build/bench-venv/.native
	@$(BIN)/python -m benchmarks.drain --python build/bench-venv/bin/python

# Both halves of a request in one thread, counted: the same build gives the same numbers on any machine of the same kind.
instructions: .venv/.dev
	@tools/check-rust
	@command -v valgrind >/dev/null || tools/install-packages valgrind
	$(CARGO) build --quiet --locked --release -p vhostuser-count
	@$(BIN)/python -m benchmarks.instructions $(if $(RECORD),--record)

# -- documentation ----------------------------------------------------------------------------------------------------

build/covers.json:
	@$(MAKE) --no-print-directory test

docs: .venv/.docs build build/covers.json
	$(BIN)/python docs/conformance.py build/covers.json docs/reference/conformance.md
	$(BIN)/python docs/faults.py docs/reference/faults.md
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going -b html docs docs/_build/html
	@echo 'docs/_build/html/index.html'

clean:
	rm -rf build dist docs/_build docs/reference/conformance.md .venv native/target native/fuzz/target native/loom/target src/vhostuser/_native*.so
