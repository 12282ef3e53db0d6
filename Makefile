# Everything is done from here; `make` alone lists what there is. Needed on PATH: Python 3.11 or newer, make
# and a C compiler. uv comes from PATH, or is put into .tools; everything else goes into .venv, locked by hash.

VENV := .venv
PY := $(VENV)/bin/python
UV := $(shell command -v uv 2>/dev/null || echo .tools/bin/uv)
PYTHON ?= $(shell for p in python3.11 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
PROTO_SOURCES := $(shell find protos/llmos -name '*.proto')
# The groups of pyproject.toml that have a lock of their own; dev comes first, the others agree with it.
GROUPS := dev run gateway auth inference logging client proto tools bench bench-gateway bench-llama bench-vllm
LOCKS := $(GROUPS:%=requirements/%.txt)

# N: how often `test-repeat` runs. TLS=1: `up` uses mTLS. ARGS: further arguments of the command behind a target.
N ?= 10
# A file of tests stays in one process, so that what its tests share is made once; the long ones come first.
IN_PARALLEL ?= -n 2 --dist loadfile --no-loadscope-reorder
ARGS ?=
SECURITY_ROWS := r21_ or r22_ or r23_ or r24_ or r25_ or r26_ or r32_ or r33_
# What bench-engine measures the platform beside: for blocks llama.cpp, for numbers transformers, and vLLM if told.
BESIDE := $(if $(filter q8 q4,$(DTYPE)),.tools/bench-llama/.installed,\
	.tools/bench/.installed $(if $(VLLM),.tools/bench-vllm/.installed))

export UV_PYTHON_DOWNLOADS := never
MAKEFLAGS += --no-builtin-rules --no-print-directory
.NOTPARALLEL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

##@ Use

.PHONY: demo
demo: run-env ## Start everything, stream one real answer, show its audit record, stop everything
	@$(PY) -m deploy.dev demo $(ARGS)

.PHONY: up
up: run-env ## Run the whole mesh on this machine until Ctrl-C (TLS=1: with mTLS)
	@$(PY) -m deploy.dev up $(if $(TLS),--tls) $(ARGS)

.PHONY: down
down: run-env ## Stop a mesh that `make up` started in another terminal
	@$(PY) -m deploy.dev down

.PHONY: chat
chat: run-env ## Chat with the mesh that `make up` runs
	@$(PY) -m deploy.dev client -- chat $(ARGS)

.PHONY: certs
certs: run-env ## Make development certificates in .state/certs: a CA, one per service, one for clients
	@$(PY) -m deploy.dev certs $(ARGS)

##@ Develop

.PHONY: proto
proto: $(VENV)/.run ## Generate protos/gen and docs/api from protos/llmos
	@$(PY) protos/generate.py
	@touch protos/gen/.digest
	@$(PY) protos/reference.py

.PHONY: lint
lint: dev-env ## Check style, types, contracts and contract changes against main
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(PY) protos/check.py
	$(PY) protos/reference.py --check

.PHONY: format
format: dev-env ## Format the code, and mend what can be mended without thought
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

.PHONY: test
test: dev-env ## Run all tests, on real processes and a real broker
	$(PY) -m pytest $(IN_PARALLEL) $(ARGS)

.PHONY: coverage
coverage: dev-env ## The same with coverage, of all processes that the tests start; takes longer
	@tests/run-with-coverage $(PY) $(IN_PARALLEL) $(ARGS)

.PHONY: test-unit
test-unit: dev-env ## Run the tests that start no process
	$(PY) -m pytest $(IN_PARALLEL) tests/unit tests/contract $(ARGS)

.PHONY: test-e2e
test-e2e: dev-env ## Run the tests on real processes
	$(PY) -m pytest $(IN_PARALLEL) tests/e2e $(ARGS)

.PHONY: test-repeat
test-repeat: dev-env ## Run the tests on real processes N times (N=10) and stop at the first failure
	@for i in $$(seq 1 $(N)); do echo "== run $$i of $(N)"; $(PY) -m pytest -q $(IN_PARALLEL) tests/e2e $(ARGS) || exit 1; done

.PHONY: test-optimised
test-optimised: dev-env ## Run the security rows (R21 to R26, R32, R33) under `python -O`, which skips assertions of the code
	$(PY) -O -m pytest $(IN_PARALLEL) -k "$(SECURITY_ROWS)" $(ARGS)

.PHONY: chaos
chaos: dev-env ## Kill gateway, logging and broker 200 times under load (KILLS=N), and judge the audit log
	LLMOS_CHAOS_KILLS=$(or $(KILLS),200) $(PY) -m pytest -s tests/chaos $(ARGS)

.PHONY: jobs
jobs: dev-env ## Run 10,000 jobs (JOBS=N) on a replica that fails, with kills of everything else, beside interactive streams
	LLMOS_JOBS=$(or $(JOBS),10000) $(PY) -m pytest -s tests/chaos/test_jobs.py $(ARGS)

.PHONY: limits
limits: dev-env ## Hold two gateways with Valkey to their limits for SECONDS=60, and 10,000 mixed requests (REQUESTS=N)
	LLMOS_LIMITS_SECONDS=$(or $(SECONDS),60) LLMOS_LIMITS_REQUESTS=$(or $(REQUESTS),10000) \
		$(PY) -m pytest -s tests/e2e/test_limits.py $(ARGS)

.PHONY: overload
overload: dev-env ## Send 4 and 10 times what can be served for SECONDS=60 each: goodput, first tokens, refusals, fairness
	LLMOS_OVERLOAD_SECONDS=$(or $(SECONDS),60) $(PY) -m pytest -s tests/e2e/test_overload.py $(ARGS)

.PHONY: streams
streams: dev-env ## Serve 20,000 streams (STREAMS=N), most of them cancelled: memory, descriptors and tasks stay flat
	LLMOS_STREAMS=$(or $(STREAMS),20000) $(PY) -m pytest -s tests/e2e/test_many_streams.py $(ARGS)

.PHONY: precision
precision: dev-env ## Measure what rounding costs on 5,000 tokens and 40 prompts: top-1 and perplexity beside float32
	LLMOS_PRECISION_TOKENS=5000 LLMOS_PRECISION_PROMPTS=40 $(PY) -m pytest -s tests/unit/inference/test_precision.py $(ARGS)

.PHONY: bench-engine
bench-engine: dev-env $(BESIDE) ## Measure tokens/s and first tokens beside others (ROUNDS=5 STREAMS=1,8,32 DTYPE=q8 VLLM=1)
	@$(PY) -m tests.bench.engine $(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(STREAMS),--streams $(STREAMS)) \
		$(if $(DTYPE),--dtype $(DTYPE)) $(if $(VLLM),--vllm) $(ARGS)

.PHONY: bench-lookup
bench-lookup: dev-env ## Measure prompt lookup at one stream, beside the same engine without it (ROUNDS=15)
	@$(PY) -m tests.bench.lookup $(if $(ROUNDS),--rounds $(ROUNDS)) $(ARGS)

.PHONY: bench-auth
bench-auth: dev-env ## Measure what a credential and a decision cost, with few and with many tenants and keys (ROUNDS=25)
	@$(PY) -m tests.bench.auth $(if $(ROUNDS),--rounds $(ROUNDS)) $(ARGS)

.PHONY: bench-gateway
bench-gateway: dev-env .tools/bench-gateway/.installed ## Measure what the gateway adds, beside LiteLLM, smg and a bare proxy (ROUNDS=15)
	@$(PY) -m tests.bench.gateway $(if $(ROUNDS),--rounds $(ROUNDS)) $(ARGS)

.PHONY: bench-start
bench-start: dev-env ## Measure from the start of inference to its first token, with and without a converted model
	@$(PY) -m tests.bench.start $(if $(ROUNDS),--rounds $(ROUNDS)) $(ARGS)

.PHONY: bench-batch
bench-batch: dev-env ## Measure PROMPTS=500 as jobs and as a batch file, beside the engine's own time for them (ROUNDS=3)
	@$(PY) -m tests.bench.batch $(if $(PROMPTS),--prompts $(PROMPTS)) $(if $(ROUNDS),--rounds $(ROUNDS)) $(ARGS)

.PHONY: soak
soak: dev-env ## Load the platform for MINUTES=20 with all kinds of requests, and judge memory and what is left
	@$(PY) -m tests.bench.soak $(if $(MINUTES),--minutes $(MINUTES)) $(ARGS)

.PHONY: fuzz-http
fuzz-http: dev-env ## Send what the OpenAPI document allows, and what it does not, for MINUTES=10: nothing may break
	LLMOS_FUZZ_MINUTES=$(or $(MINUTES),10) $(PY) -m pytest -s -k r34 tests/contract/test_http_document.py $(ARGS)

.PHONY: rotation
rotation: dev-env ## Rotate signing keys every 5 s for MINUTES=5 at 200 requests a second: nobody may be refused
	LLMOS_ROTATION_MINUTES=$(or $(MINUTES),5) $(PY) -m pytest -s tests/e2e/test_rotation.py $(ARGS)

.PHONY: native-check
native-check: ## Run the native step with the sanitizers of the C compiler over odd shapes (ROUNDS=8)
	@tests/native/run-checks $(or $(ROUNDS),8)

.PHONY: lock
lock: dev-env ## Resolve the dependencies anew into requirements/ and deploy/dev/jgo.lock.toml (UPGRADE=1: newer ones)
	@for group in $(GROUPS); do \
		echo "requirements/$$group.txt"; \
		case $$group in \
			dev|tools|bench-gateway) with= ;; \
			bench-vllm) with="--override requirements/bench-vllm.overrides" ;; \
			*) with="--constraint requirements/dev.txt" ;; \
		esac; \
		$(UV) pip compile --quiet --universal --generate-hashes --no-emit-index-url --python-version 3.11 \
			--custom-compile-command "make lock" $(if $(UPGRADE),--upgrade) $$with \
			--group $$group -o requirements/$$group.txt || exit 1; \
	done
	@echo deploy/dev/jgo.lock.toml
	@$(VENV)/bin/jgo --ignore-config --quiet -f deploy/dev/jgo.toml lock

.PHONY: clean
clean: ## Stop a running mesh, then remove all that was made here: environments, generated code, .state with its keys
	@if [ -f .state/run/mesh.json ] && [ -x $(PY) ]; then $(PY) -m deploy.dev down; fi
	rm -rf $(VENV) .tools .state protos/gen build dist bench-results .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: help
help: ## List the targets
	@awk 'BEGIN { FS = ":.*## " } /^##@ / { printf "\n%s\n", substr($$0, 5) } \
		/^[a-z0-9-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# ---- the environment -----------------------------------------------------------------------------------------
# One .venv, in two sizes: `run` is enough for demo, up and chat; `dev` holds all of it and more. An environment
# that has grown to dev stays dev. A stamp is newer than the lock that it was made from, so nothing is done twice.

.PHONY: run-env dev-env
run-env: $(VENV)/.run $(VENV)/.installed protos/gen/.digest
dev-env: $(VENV)/.dev run-env

$(VENV)/.dev: requirements/dev.txt | $(PY)
	@echo "Installing requirements/dev.txt into $(VENV)"
	@$(UV) pip sync --require-hashes --python $(PY) requirements/dev.txt
	@rm -f $(VENV)/.installed
	@touch $(VENV)/.dev $(VENV)/.run

$(VENV)/.run: requirements/run.txt | $(PY)
	@echo "Installing requirements/$(if $(wildcard $(VENV)/.dev),dev,run).txt into $(VENV)"
	@$(UV) pip sync --require-hashes --python $(PY) requirements/$(if $(wildcard $(VENV)/.dev),dev,run).txt
	@rm -f $(VENV)/.installed
	@touch $(VENV)/.run

$(VENV)/.installed: pyproject.toml $(VENV)/.run
	@$(UV) pip install --quiet --python $(PY) --no-build-isolation --no-deps -e .
	@touch $@

# `transformers serve` needs a few packages more than dev: they go into a folder of their own.
.tools/bench/.installed: requirements/bench.txt | $(PY)
	@rm -rf .tools/bench
	@$(UV) pip install --quiet --python $(PY) --require-hashes --target .tools/bench -r requirements/bench.txt
	@touch $@

# llama.cpp from the source that its Python package carries, built for this CPU, so without a cache of what another
# has built. The lock also holds what builds it. Its server stays in the folder of the build.
.tools/bench-llama/.installed: requirements/bench-llama.txt | $(PY)
	@echo "Building llama.cpp for this CPU, once: many minutes"
	@rm -rf .tools/bench-llama
	@CMAKE_ARGS="-DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DLLAVA_BUILD=OFF -DLLAMA_BUILD_TOOLS=ON \
		-DLLAMA_BUILD_SERVER=ON -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF" \
		$(UV) pip install --quiet --no-cache --python $(PY) --require-hashes --target .tools/bench-llama \
		--build-constraints requirements/bench-llama.txt --no-binary llama-cpp-python \
		--config-settings-package llama-cpp-python:build-dir=$(CURDIR)/.tools/bench-llama/build \
		--config-settings-package llama-cpp-python:build.targets=llama-server -r requirements/bench-llama.txt
	@touch $@

# vLLM wants another torch than dev has, so it gets an environment.
.tools/bench-vllm/.installed: requirements/bench-vllm.txt | $(PY)
	@echo "Installing vLLM, once: about 6 GB"
	@rm -rf .tools/bench-vllm
	@$(UV) venv --quiet --python $(PY) .tools/bench-vllm
	@$(UV) pip install --quiet --python .tools/bench-vllm/bin/python --require-hashes --no-deps \
		-r requirements/bench-vllm.txt
	@touch $@

# The gateways of others want other versions of what dev has. Byte code is written beforehand: LiteLLM is slow without.
.tools/bench-gateway/.installed: requirements/bench-gateway.txt | $(PY)
	@echo "Installing LiteLLM and smg, once: about 850 MB"
	@rm -rf .tools/bench-gateway
	@$(UV) venv --quiet --python $(PY) .tools/bench-gateway
	@$(UV) pip install --quiet --python .tools/bench-gateway/bin/python --require-hashes --no-deps \
		-r requirements/bench-gateway.txt
	@.tools/bench-gateway/bin/python -m compileall -q .tools/bench-gateway/lib || true
	@touch $@

protos/gen/.digest: $(PROTO_SOURCES) protos/generate.py $(VENV)/.run
	@$(PY) protos/generate.py
	@touch $@

$(PY): | $(UV)
	@test -n "$(PYTHON)" || { echo "llmos needs Python 3.11 or newer on PATH (or: make PYTHON=/path/to/python)"; exit 2; }
	@$(UV) venv --quiet --allow-existing --python $(PYTHON) $(VENV)

.tools/bin/uv: requirements/tools.txt
	@test -n "$(PYTHON)" || { echo "llmos needs Python 3.11 or newer on PATH (or: make PYTHON=/path/to/python)"; exit 2; }
	@echo "uv is not on PATH: installing it into .tools"
	@$(PYTHON) -m venv .tools
	@.tools/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/tools.txt
	@touch $@
