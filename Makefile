# `make run` starts the server, `make test` runs all tests. Both need only Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# uv does the installing, since pip knows no overrides (see pyproject.toml), and it does not read pip's find-links.
UV := UV_FIND_LINKS="$(PIP_FIND_LINKS)" $(BIN)/uv pip install --quiet --python $(BIN)/python

# Where it is set, every process compiles the package and the tests anew: 6.5 instead of 4.2 CPU seconds to collect them.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: run venv test check fast-test lint docs wheel ray-test bench gpu-check fuzz audit format train clean

run: $(VENV)/.run
	@$(BIN)/python -m stable_diffusion_server.watchdog -- $(BIN)/python -m stable_diffusion_server serve

venv: $(VENV)/.run

test: $(VENV)/.test lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Style, types, contracts and the tests that need no model, no listening server and no browser, side by side.
# The goal is 90 seconds on 2 cores; it takes three and a half minutes.
check: $(VENV)/.test
	@$(MAKE) --no-print-directory --jobs 2 --output-sync=target lint fast-test

fast-test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

lint: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/flake8
	$(BIN)/mypy
	$(BIN)/lint-imports

# The documentation as a site, in site/; a warning is an error.
docs: $(VENV)/.test
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

# What is uploaded and installed elsewhere, in dist/.
wheel: $(BIN)/uv
	UV_FIND_LINKS="$(PIP_FIND_LINKS)" $(BIN)/uv build --wheel --out-dir dist

# Two replicas under Ray Serve, in an environment of their own.
ray-test: $(VENV)/.test
	$(BIN)/uv venv --quiet --allow-existing .venv-ray --python $(BIN)/python
	UV_FIND_LINKS="$(PIP_FIND_LINKS)" $(BIN)/uv pip install --quiet --python .venv-ray/bin/python \
	  -r server-requirements.txt -r deploy/ray-requirements.txt
	RAY_PYTHON=$(CURDIR)/.venv-ray/bin/python $(BIN)/python -m pytest tests/deploy/test_ray_serve.py

# Ours and its peers side by side, some minutes; BENCH=--check fails where a ratio has become worse than it may be.
bench: $(VENV)/.test
	$(BIN)/python -m benchmarks.suite $(BENCH)

# Full-size models with random weights; DEVICE=cpu TINY=--tiny tries the script itself.
gpu-check: $(VENV)/.test
	$(BIN)/python -m benchmarks.gpu --device $(or $(DEVICE),cuda) $(TINY) --out $(or $(OUT),gpu-check.md)

# Thousands of requests made from the OpenAPI document; minutes, and so not a part of `test`.
fuzz: $(VENV)/.test
	$(BIN)/python scripts/fuzz.py

# What is known against the pinned versions; asks the advisories of PyPI, and so needs the network.
audit: $(VENV)/.run
	$(BIN)/uv tool run pip-audit --strict --require-hashes --disable-pip --requirement requirements.lock

format: $(VENV)/.test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Everything in models/ from nothing, going on where it was stopped; `make train TRAIN="--device cuda"` on a GPU.
train: $(VENV)/.run
	$(BIN)/python -m training $(TRAIN)

clean:
	rm -rf $(VENV) .venv-ray dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache

# The stamps make a second start install nothing; a changed requirement file installs again.
$(VENV)/.run: requirements.txt server-requirements.txt upscaler-requirements.txt vision-requirements.txt \
  credentials-requirements.txt agent-requirements.txt ui-requirements.txt | $(BIN)/uv
	@echo "Installing into $(VENV) …"; $(UV) -r requirements.txt
	@touch $@

$(VENV)/.test: dev-requirements.txt $(VENV)/.run
	@echo "Installing into $(VENV) …"; $(UV) -r requirements.txt -r dev-requirements.txt
	@touch $@

$(BIN)/uv:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv
