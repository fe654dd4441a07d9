# Everything that a person or CI does with this tree. `make help` lists it; bare Python 3.11 and make are enough for it.

# The interpreter that makes .venv: the first of these that is 3.11 or newer, or what you name with PYTHON=….
ifndef PYTHON
PYTHON := $(or $(shell for candidate in python3.11 python3 python3.12 python3.13 python3.14; do \
	$$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$candidate && break; done),python3)
endif

BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest
BENCHMARKS := $(filter-out benchmarks/_%,$(wildcard benchmarks/*.py))

define HELP

  make demo         walk through the whole way of a credential, with no account anywhere
  make test         every test that needs nothing but Python packages, with branch coverage
  make test-real    tests against real parts that npm, Debian or Go bring (needs npm)
  make redis        unpack Debian's Redis for test-real, where none is installed
  make vault        build the HashiCorp Vault for test-real from its sources, once (needs Go; four minutes)
  make helm-tools   build Helm for test-real and bring what judges the chart, once (needs Go; three minutes)
  make test-k8s     the chart on a real Kubernetes API server, which is built first, once (needs Go and Debian; ten minutes)
  make image        build the container image without a Docker engine, on a stand-in base (needs root, Debian and Go)
  make check        ruff, formatting, types, import layers, locks, rules, docs
  make crash        the crash and load campaigns in full length
  make soak         five minutes of a provider in trouble, with its figures
  make chaos        five minutes of proxied calls to an API in trouble, with their figures
  make bench        run the benchmarks; make bench-tokens the one of token hand-outs, bench-vault that of secrets in Vault,
                    bench-proxy that of proxied calls (needs Go, and nginx or Debian's package of it), bench-webhooks that of
                    webhooks taken in and delivered (needs Go, and webhook or Debian's package of it), bench-rolling that of
                    restarts, kills and outages under load (needs Go), bench-overload that of four times what can be served
  make soak-mixed   half an hour of everything at once: memory, open files and tables stay flat (needs Go; SECONDS=…)
  make sbom         the SBOM (CycloneDX) and the licence list of what is installed with the broker, into dist/
  make audit-dependencies  ask a database of known holes about every line of the locks (needs the internet)
  make fresh-check  demo and test in a clone, with an empty home and nothing but Python and make on the path
  make lock         refresh requirements.lock and requirements-dev.lock (needs the package index)
  make clean        remove what the other targets made

  PYTHON=…  the interpreter to use          TEST=…      more arguments for pytest, such as TEST="-k refresh -x"
  FRESH=--working-tree  (fresh-check) take what is not committed too      UPGRADE=--upgrade  (lock) newest of everything

endef

.DEFAULT_GOAL := help
.PHONY: help demo test test-real test-k8s helm-tools vault redis image check bench bench-tokens bench-vault bench-proxy bench-webhooks bench-rolling bench-overload soak-mixed peers crash soak chaos fresh-check lock sbom audit-dependencies \
	clean runtime-environment dev-environment check-lint check-format check-types check-imports check-rules

help:
	$(info $(HELP))@:

runtime-environment:
	@$(PYTHON) .ci/environment.py runtime

dev-environment:
	@$(PYTHON) .ci/environment.py dev

demo: runtime-environment
	@$(BIN)/broker demo

# The campaigns of tests/crash need the machine for themselves: a thousand refreshes at once, beside others, take too long.
test: dev-environment
	$(PYTEST) -n auto --dist worksteal -m "not real" --ignore tests/real --ignore tests/crash \
		--cov --cov-report= --cov-fail-under 0 $(TEST)
	$(PYTEST) -m "not real" tests/crash --cov --cov-append --cov-report term $(TEST) $(if $(TEST),|| [ $$? -eq 5 ])

vault: dev-environment
	@$(BIN)/python .ci/vault/build.py

# The vendors' SDKs live in an environment of their own, where the broker's does not feel them.
.venv-sdks/.ready: tests/real/sdks/requirements.lock
	$(PYTHON) -m venv --clear .venv-sdks
	.venv-sdks/bin/python -m pip install --quiet --no-input --disable-pip-version-check --require-hashes --no-deps \
		--only-binary :all: -r $<
	touch $@

# As do the tools that list and audit what the broker is made of.
.venv-sbom/.ready: .ci/sbom/requirements.lock
	$(PYTHON) -m venv --clear .venv-sbom
	.venv-sbom/bin/python -m pip install --quiet --no-input --disable-pip-version-check --require-hashes --no-deps \
		--only-binary :all: -r $<
	touch $@

sbom: runtime-environment .venv-sbom/.ready
	@$(BIN)/python .ci/sbom/make.py dist

audit-dependencies: runtime-environment .venv-sbom/.ready
	@$(BIN)/python .ci/sbom/audit.py requirements.lock requirements-dev.lock .ci/sbom/requirements.lock

# What judges the chart's objects, too: its pins are not the broker's.
.venv-helm/.ready: tests/real/helm/requirements.lock
	$(PYTHON) -m venv --clear .venv-helm
	.venv-helm/bin/python -m pip install --quiet --no-input --disable-pip-version-check --require-hashes --no-deps \
		--only-binary :all: -r $<
	touch $@

helm-tools: dev-environment .venv-helm/.ready
	@$(BIN)/python .ci/helm/tools.py helm

# Not in .ci/run: the API server takes ten minutes to build on a fresh machine.
test-k8s: dev-environment helm-tools
	@$(BIN)/python .ci/helm/tools.py kubernetes
	$(PYTEST) tests/kubernetes $(TEST)

# So does the API fuzzer.
.venv-schemathesis/.ready: tests/real/schemathesis/requirements.lock
	$(PYTHON) -m venv --clear .venv-schemathesis
	.venv-schemathesis/bin/python -m pip install --quiet --no-input --disable-pip-version-check --require-hashes --no-deps \
		--only-binary :all: -r $<
	touch $@

redis: dev-environment
	@$(BIN)/python tests/real/redis_server.py

image:
	@$(PYTHON) .ci/image/engine.py build

test-real: dev-environment vault redis image .venv-sdks/.ready .venv-schemathesis/.ready .venv-sbom/.ready helm-tools
	cd tests/real && npm ci --no-audit --no-fund
	$(PYTEST) tests/real $(TEST)

check: dev-environment
	@$(MAKE) --no-print-directory --keep-going check-lint check-format check-types check-imports check-rules

check-lint:
	$(BIN)/ruff check .

check-format:
	$(BIN)/ruff format --check .

check-types:
	$(BIN)/mypy
	$(BIN)/mypy .ci

check-imports:
	$(BIN)/lint-imports

check-rules:
	$(PYTEST) -q tests/test_rules.py tests/test_docs.py

bench bench-tokens bench-vault bench-proxy bench-webhooks bench-rolling bench-overload soak-mixed: export PYTHONPATH := $(CURDIR)

bench-tokens: dev-environment
	$(BIN)/python benchmarks/tokens.py

bench-vault: dev-environment vault
	$(BIN)/python benchmarks/vault.py

peers: dev-environment
	@$(BIN)/python benchmarks/_peers.py

bench-proxy: dev-environment peers
	$(BIN)/python benchmarks/proxy.py

bench-webhooks: dev-environment peers
	$(BIN)/python benchmarks/webhooks.py

bench-rolling: dev-environment vault
	$(BIN)/python benchmarks/rolling.py

bench-overload: dev-environment
	$(BIN)/python benchmarks/overload.py

soak-mixed: dev-environment vault
	$(BIN)/python benchmarks/_soak.py $(SECONDS)

bench: dev-environment vault peers
	$(if $(BENCHMARKS),,$(error there is nothing in benchmarks/))
	@set -e; for script in $(BENCHMARKS); do echo "== $$script"; $(BIN)/python $$script; done

crash: dev-environment
	TEST_LONG=1 $(PYTEST) --timeout 7200 -s tests/crash $(TEST)

soak: dev-environment
	TEST_LONG=1 $(PYTEST) -s tests/crash/test_provider_faults.py $(TEST)

chaos: dev-environment
	TEST_LONG=1 $(PYTEST) -s tests/crash/test_proxy_chaos.py $(TEST)

fresh-check:
	@$(PYTHON) .ci/fresh_check.py $(FRESH)

# The dev lock is made under the runtime lock, so that both name the same versions. No index address gets into either.
# Pins that still fit are kept; UPGRADE=--upgrade takes the newest of everything.
lock: dev-environment
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --no-header --no-annotate pyproject.toml \
		--extra build $(UPGRADE) -o requirements.lock
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --no-header --no-annotate pyproject.toml \
		--extra build --extra dev --constraint requirements.lock $(UPGRADE) -o requirements-dev.lock
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --no-header --no-annotate --python-version 3.11 \
		tests/real/sdks/requirements.in $(UPGRADE) -o tests/real/sdks/requirements.lock
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --no-header --no-annotate --python-version 3.11 \
		tests/real/schemathesis/requirements.in $(UPGRADE) -o tests/real/schemathesis/requirements.lock
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --no-header --no-annotate --python-version 3.11 \
		.ci/image/requirements.in $(UPGRADE) -o .ci/image/requirements.lock
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --no-header --no-annotate --python-version 3.11 \
		tests/real/helm/requirements.in $(UPGRADE) -o tests/real/helm/requirements.lock
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --no-header --no-annotate --python-version 3.11 \
		.ci/sbom/requirements.in $(UPGRADE) -o .ci/sbom/requirements.lock

clean:
	@$(PYTHON) .ci/image/engine.py clean
	rm -rf .venv .venv-sdks .venv-schemathesis .venv-helm .venv-sbom .venv-peers .cache .coverage .coverage.* htmlcov .pytest_cache .mypy_cache .ruff_cache .import_linter_cache \
		.hypothesis dist tests/real/node_modules
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
