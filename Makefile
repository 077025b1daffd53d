# SPDX-License-Identifier: Apache-2.0
# `make help` lists what there is. `make demo` and `make test` need nothing but git, make, python3 >= 3.11 and, on
# Debian, root: what else they need they install (deploy/bootstrap).

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
# The steps share the machine and the build folders; each uses JOBS itself.
.NOTPARALLEL:

JOBS ?= $(shell nproc)
VENV := .venv
PYTHON := $(VENV)/bin/python
PYTEST ?= $(PYTHON) -m pytest
PYTEST_FLAGS ?=
CTEST_FLAGS ?= --output-on-failure --no-tests=error
# Agents serve whatever VMs they find on their host: what starts some gets a process namespace of its own, with a shell in it
# that reaps what is left behind. So two runs do not see each other's VMs, nor those that belong to the machine.
ALONE := $(if $(filter 0,$(shell id -u)),unshare --pid --fork --mount-proc --kill-child bash -c '"$$@"; exit $$?' alone)
# The soak that is part of `make test`, and the long one of `make soak`.
TEST_SOAK_SECONDS ?= 60
SOAK_SECONDS ?= 600
SOAK_FLAGS ?= -m soak
# How many races between evictions and writes `make test-races` runs, with each kind of freeze.
RACES ?= 1000000
RACES_SECONDS ?= 23000
# make bench BENCH_FLAGS=--quick: a look, not a figure to quote.
BENCH_FLAGS ?=

NATIVE := build/native
C_FILES = $(shell git ls-files --cached --others --exclude-standard -- '*.c' '*.h')
PYTHON_FOLDERS := agent controller proto native tests deploy

.PHONY: help
help:
	@echo 'make demo         the whole loop on two real Linux guests, with a report'
	@echo 'make test         all tests: C (plain, ASan+UBSan, TSan), unit, system, chaos with a short soak, Linux 7.3'
	@echo 'make lint         ruff, mypy, clang-format, buf'
	@echo 'make bench        the figures, as ratios of one run'
	@echo 'make bench-trackers  what each tracker costs, and how exact it is: tables, and plots in build/bench-trackers'
	@echo 'make test-races   $(RACES) races of evictions and writes frozen by WP here, and as many by RWP in Linux 7.3 (RACES=)'
	@echo 'make soak         writers under eviction and kills, $(SOAK_SECONDS) s (SOAK_SECONDS=)'
	@echo 'make build        the C library, the pager and the Python package, editable, in $(VENV)'
	@echo 'make proto        only the generated protobuf package'
	@echo 'make deps         what the above need: Debian packages and the venv'
	@echo 'make test-unit test-c test-asan test-tsan test-system test-chaos test-kernel test-kernel-idle'
	@echo 'make format clean distclean'

# ---- What is needed ---------------------------------------------------------------------------------------------

.PHONY: deps
deps:
	@deploy/bootstrap/system.sh
	@deploy/bootstrap/venv.sh $(VENV) pyproject.toml

# The kernel that the test guests boot; fetched once.
.PHONY: guest
guest: build
	@if [ -f tests/system/guest/__main__.py ]; then $(PYTHON) -m tests.system.guest fetch; fi

# The Linux 7.3 that the C tests and the pager run inside; fetched once.
.PHONY: kernel
kernel: build
	@$(PYTHON) -m tests.kernel fetch

# ---- Build ------------------------------------------------------------------------------------------------------

# The editable install is made anew when the metadata changes; C and protobuf changes go the short way of `build`.
.PHONY: FORCE
$(NATIVE)/metadata.json: FORCE
	@$(PYTHON) deploy/bootstrap/metadata.py pyproject.toml $@

$(NATIVE)/editable.stamp: $(NATIVE)/metadata.json $(VENV)/frostline-requirements.txt
	@echo 'frostline: building, and installing it editable into $(VENV)'
	@CMAKE_BUILD_PARALLEL_LEVEL=$(JOBS) $(PYTHON) -m pip install --quiet --disable-pip-version-check --no-input \
	    --no-build-isolation --no-deps --editable .
	@touch $@

SITE = $$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("platlib"))')

.PHONY: build
build: deps
	@$(MAKE) --silent --no-print-directory $(NATIVE)/editable.stamp
	@cmake --build $(NATIVE) --parallel $(JOBS) -- --quiet | { grep -v 'no work to do' || true; }
	@cmake --install $(NATIVE) --component python --prefix "$(SITE)" >/dev/null
	@cmake --install $(NATIVE) --component protobuf --prefix "$(SITE)" >/dev/null
	@$(MAKE) --silent --no-print-directory typings

# Only frostline.v1, for when nothing but a .proto has changed.
.PHONY: proto
proto: deps
	@$(MAKE) --silent --no-print-directory $(NATIVE)/editable.stamp
	@cmake --build $(NATIVE) --target fl_protobuf -- --quiet | { grep -v 'no work to do' || true; }
	@cmake --install $(NATIVE) --component protobuf --prefix "$(SITE)" >/dev/null
	@$(MAKE) --silent --no-print-directory typings

# mypy does not follow an editable install: these links show it the package as it will be.
.PHONY: typings
typings:
	@mkdir -p typings/frostline
	@cd typings/frostline && for link in agent=agent controller=controller native=native/python \
	    wire=proto/wire v1=$(NATIVE)/generated/frostline/v1; do \
	        ln -sfn "../../$${link#*=}" "$${link%%=*}"; done

# ---- Test -------------------------------------------------------------------------------------------------------

# ctest does not show what tests say that leave something out.
define run_ctest
setpriv --pdeathsig KILL ctest --test-dir $(1) $(CTEST_FLAGS); \
    sed -nE '/(skipped|not tried):/p' $(1)/Testing/Temporary/LastTest.log | sort -u
endef

build/asan build/tsan: build/%:
	@cmake -S native -B $@ -G Ninja -DCMAKE_C_COMPILER=clang \
	    -DFL_SANITIZE=$(if $(filter asan,$*),address,thread) -DFL_TEST_SECONDS=300 >/dev/null

# FL_BUILT=1: what tests need is there, as when `make test` runs them beside each other.
need = $(if $(FL_BUILT),,$(1))

.PHONY: test-c test-asan test-tsan
test-c: $(call need,build)
	@echo '== C tests =='
	@$(call run_ctest,$(NATIVE))

test-asan test-tsan: test-%: $(call need,deps) build/%
	@echo '== C tests under $(if $(filter asan,$*),ASan and UBSan,TSan) =='
	@cmake --build build/$* --parallel $(JOBS) -- --quiet | { grep -v 'no work to do' || true; }
	@$(call run_ctest,build/$*)

.PHONY: test-unit test-system test-chaos test-kernel soak
test-unit: $(call need,build)
	@$(PYTEST) $(PYTEST_FLAGS) tests/unit

test-system: $(call need,build guest)
	@$(ALONE) $(PYTEST) $(PYTEST_FLAGS) tests/system

test-chaos: $(call need,build guest)
	@$(ALONE) $(PYTEST) $(PYTEST_FLAGS) tests/chaos --soak-seconds $(TEST_SOAK_SECONDS)

test-kernel: $(call need,build kernel)
	@$(PYTEST) $(PYTEST_FLAGS) tests/kernel

# Builds a kernel with page_idle from Debian's source, once: some ten minutes. `make test` uses it when it is there.
.PHONY: test-kernel-idle test-races
test-kernel-idle: build
	@$(PYTHON) -m tests.kernel fetch --kernel idle
	@$(PYTEST) $(PYTEST_FLAGS) tests/kernel/test_idle.py

test-races: build kernel
	@echo '== $(RACES) races of evictions and writes here, frozen by WP =='
	@FL_RACES=$(RACES) FL_TRACKER=zap $(NATIVE)/tests/test_evict_race
	@echo '== $(RACES) races of evictions and writes inside Linux 7.3, frozen by RWP =='
	@$(PYTHON) -m tests.kernel run --timeout $(RACES_SECONDS) --env FL_RACES=$(RACES) --env FL_TRACKER=rwp \
	    --tried rwp /tests/test_evict_race

soak: build guest
	@$(ALONE) $(PYTEST) $(PYTEST_FLAGS) tests/chaos $(SOAK_FLAGS) --soak-seconds $(SOAK_SECONDS)

# Three lanes beside each other, for none keeps two CPUs busy. C tests that change the host's own state (its swap, DAMON) wait
# for the end of system and chaos tests. What is in the background ends when this shell does, however that is.
lane = setpriv --pdeathsig TERM nice -n $(1) $(MAKE) --no-print-directory FL_BUILT=1

.PHONY: test
test: build guest kernel
	@echo '== C tests (build/c.log) and all inside Linux 7.3 (build/kernel.log) in the background, shown at the end; all others beside them =='
	@set -m; failed=; \
	    $(call lane,10) CTEST_FLAGS='$(CTEST_FLAGS) -LE host' test-c test-asan test-tsan >build/c.log 2>&1 </dev/null & c=$$!; \
	    $(call lane,5) test-kernel >build/kernel.log 2>&1 </dev/null & inside=$$!; \
	    set +m; trap 'kill -- -$$c -$$inside 2>/dev/null || true' EXIT; trap 'exit 130' INT; \
	    $(call lane,0) test-unit test-system test-chaos || failed+=', unit, system or chaos tests'; \
	    wait $$c || failed+=', C tests (build/c.log)'; cat build/c.log; \
	    $(call lane,0) CTEST_FLAGS='$(CTEST_FLAGS) -L host' test-c test-asan test-tsan || failed+=", C tests that change the host's state"; \
	    echo '== All inside Linux 7.3 =='; wait $$inside || failed+=', inside Linux 7.3 (build/kernel.log)'; \
	    trap - EXIT; cat build/kernel.log; \
	    if [ "$$failed" ]; then echo "make test: FAILED: $${failed:2}"; exit 1; fi; echo 'make test: all passed'

# ---- Show -------------------------------------------------------------------------------------------------------

.PHONY: demo bench bench-trackers
demo: build guest
	@$(PYTHON) -m tests.demo

bench: build
	@$(PYTHON) -m tests.bench $(BENCH_FLAGS)

bench-trackers: build
	@$(PYTHON) -m tests.bench.trackers $(BENCH_FLAGS)

# ---- Form -------------------------------------------------------------------------------------------------------

.PHONY: lint lint-python lint-types lint-c lint-proto
lint: lint-python lint-types lint-c lint-proto
	@echo 'lint: clean'

lint-python: deps
	@echo 'lint: ruff'
	@$(VENV)/bin/ruff check --quiet $(PYTHON_FOLDERS)
	@$(VENV)/bin/ruff format --check --quiet $(PYTHON_FOLDERS) || \
	    { $(VENV)/bin/ruff format --check $(PYTHON_FOLDERS); exit 1; }

lint-types: proto
	@echo 'lint: mypy'
	@$(VENV)/bin/mypy --no-error-summary -p frostline.agent -p frostline.controller -p frostline.native \
	    -p frostline.wire
	@$(VENV)/bin/mypy --no-error-summary tests native/cmake deploy/bootstrap

lint-c: deps
	@echo 'lint: clang-format'
	@$(VENV)/bin/clang-format --dry-run -Werror $(C_FILES)

lint-proto: deps
	@echo 'lint: buf'
	@$(VENV)/bin/buf lint proto
	@.ci/buf-breaking $(VENV)/bin/buf

.PHONY: format
format: deps
	@$(VENV)/bin/ruff check --quiet --fix $(PYTHON_FOLDERS) || true
	@$(VENV)/bin/ruff format --quiet $(PYTHON_FOLDERS)
	@$(VENV)/bin/clang-format -i $(C_FILES)
	@$(VENV)/bin/buf format -w proto

.PHONY: clean distclean
clean:
	rm -rf build dist typings demo-report.json bench-report.json bench-trackers-report.json .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find $(PYTHON_FOLDERS) -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
