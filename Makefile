# `make` lists what there is to do.
.DEFAULT_GOAL := help
.PHONY: help setup demo demo-disaggregated test test-slow test-gpu soak fuzz kill-matrix figure2 table1 lint fmt bench-training bench-handoff bench-router bench-streams bench-connections bench-idle bench-overload bench-serving bench-gpu bench-smoke clean

PYTHON := .venv/bin/python
# Several processes of several OpenMP threads each stall one another on a small machine.
export OMP_NUM_THREADS ?= 1

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## Create .venv for this machine (CPU or CUDA; PREFILLSHARE_STACK chooses)
	@scripts/setup.sh

demo: setup ## Watch planner, coder and reviewer, adapters in one server, answer over one context prefilled once
	@$(PYTHON) examples/demo/run.py

demo-disaggregated: setup ## The same with a worker for the base, one for each module, and the router
	@$(PYTHON) examples/demo/run.py --disaggregated --out out/demo-disaggregated

test: setup ## Run the tests, on real SGLang servers with tiny models (about 23 minutes on two cores with nothing else to do)
	@$(PYTHON) -m pytest -q -n 2 --dist loadscope -m "not slow and not gpu" test

test-slow: setup ## Run every test, the full oracle set too (about 30 minutes)
	@$(PYTHON) -m pytest -q test

test-gpu: setup ## Run on this machine's GPU all that only a GPU can show, and what runs on both; says what it skipped and why
	@$(PYTHON) -m pytest -q -rs -m "(gpu or devices) and not slow" test

.PHONY: storm
storm: setup ## Ask real servers 10,000 times, one request in twenty with a fault: nothing may be wrong, leak or hang (15 minutes)
	@$(PYTHON) test/soak/storm.py

.PHONY: browser
browser: ## Install the browser that the test of the page at /ui drives (Debian, as root); without it that test is skipped
	@scripts/browser.sh

soak: setup ## Make 10,000 handoffs and 500 requests with faults: nothing may be wrong, leak or hang (about 5 minutes)
	@$(PYTHON) test/soak/run.py

fuzz: setup ## Send 10,000 requests that are wrong in all ways to real servers: no worker is lost, no other client harmed
	@$(PYTHON) test/soak/fuzz_requests.py

kill-matrix: setup ## Kill each kind of process at eight moments under load: what fails, how clearly, how soon it is over (25 minutes)
	@$(PYTHON) test/soak/kill_matrix.py

lint: setup ## Check style, format and types
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m mypy
	@.venv/bin/hadolint docker/Dockerfile docker/Dockerfile.cpu

fmt: setup ## Format the code and sort its imports
	@$(PYTHON) -m ruff check --fix .
	@$(PYTHON) -m ruff format .

figure2: setup ## Train small models and draw the paper's Figure 2 (7 minutes a seed; SEEDS=3 for a spread)
	@$(PYTHON) benchmark/training/figure2.py

table1: setup ## Train planner, coder and reviewer with both methods, the paper's Table 1 in small (2 hours on one core; SEEDS=n)
	@$(PYTHON) benchmark/training/table1.py

bench-training: setup ## Measure what a training step costs, cache-conditioned against ordinary fine-tuning
	@$(PYTHON) benchmark/training/step_cost.py

bench-handoff: setup ## Measure the KV handoff against NIXL, plain torch and memcpy (about 5 minutes)
	@$(PYTHON) benchmark/handoff/run.py
	@$(PYTHON) benchmark/handoff/session.py

bench-router: setup ## Measure what the router adds to a request
	@$(PYTHON) benchmark/serving/router.py

bench-streams: setup ## Measure how many streams a second one router process passes on
	@$(PYTHON) benchmark/serving/streams.py

bench-connections: setup ## Measure what clients that idle, read slowly or send half a request cost the router
	@$(PYTHON) benchmark/serving/connections.py

bench-idle: setup ## Measure what an idle deployment costs, and what waking it up costs
	@$(PYTHON) benchmark/serving/idle.py

bench-overload: setup ## Measure four times the load that a decode pool holds, with admission and without (4 minutes)
	@$(PYTHON) benchmark/serving/overload.py

bench-serving: setup ## Shared prefill beside stock SGLang, four agents, two workloads (45 minutes at most, or it says how long)
	@$(PYTHON) -m sglang_prefillshare.cli bench serving benchmark/serving/serving.yaml $(ARGS)

bench-gpu: setup ## The same at full length on one GPU of 80 GB, with models of 1.5B parameters (under 10 minutes)
	@$(PYTHON) -m sglang_prefillshare.cli bench serving benchmark/serving/gpu.yaml $(ARGS)

bench-smoke: setup ## The same in miniature (2 to 6 minutes, most of them starting workers)
	@$(PYTHON) -m sglang_prefillshare.cli bench serving benchmark/serving/smoke.yaml

clean: ## Remove .venv, caches and build outputs
	rm -rf .venv build out .mypy_cache .pytest_cache .ruff_cache .hypothesis python/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
