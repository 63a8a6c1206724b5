# `make demo` aligns the embedded tiny SDXL and writes a report; `make test` runs lint, types and all tests; `make check`
# runs lint, types and the fast tier of tests in under two minutes. Each makes .venv first.
# `make lowest` runs the fast tier with the oldest releases that pyproject.toml allows, in an environment of its own.
# PYTHON=... picks the interpreter (3.11 to 3.13). The versions are those of constraints.txt; NEWEST=1 installs the newest
# releases that pyproject.toml allows instead.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := $(if $(NEWEST),,-c constraints.txt)
PYTEST := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test check lowest docs lint coverage format constraints clean

demo: $(VENV)/.installed
	$(BIN)/diffalign demo $(ARGS)

test: lint
	$(PYTEST) --durations=15 $(ARGS)

check: lint
	$(PYTEST) -m "not slow" --durations=5 $(ARGS)

lowest: build/lowest/.installed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 build/lowest/bin/python -m pytest -n 2 --dist loadfile -m "not slow" $(ARGS)

# uv picks the lower bound of what pyproject.toml names, and the newest of what these need; tools of tests are the newest.
build/lowest/.installed: pyproject.toml
	$(PYTHON) -m venv build/lowest
	build/lowest/bin/python -m pip install uv
	build/lowest/bin/uv pip install --python build/lowest --resolution lowest-direct \
		-e ".[8bit,docs,label,metrics,notebook,ocr,torchao,video]"
	build/lowest/bin/uv pip install --python build/lowest beartype httpx hypothesis playwright pytest pytest-timeout pytest-xdist
	touch $@

# The documentation site, strict: build/site/index.html opens without a server.
docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Lines of the package that the fast tier runs: sys.monitoring (Python 3.12 and later) costs least, the C tracer else.
coverage: $(VENV)/.installed-dev
	COVERAGE_CORE=$$($(BIN)/python -c "import sys; print('sysmon' if sys.version_info >= (3, 12) else 'ctrace')") \
	$(PYTEST) -q -m "not slow" --cov=diffalign --cov-report=term:skip-covered $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/typos
	$(BIN)/mypy & types=$$!; $(BIN)/python -m tests.strict_types; strict=$$?; wait $$types && exit $$strict  # side by side

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; v = sys.version_info; sys.exit(v < (3, 11) and f'diffalign needs Python 3.11 or later, this is {v[0]}.{v[1]}: make PYTHON=...')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade pip
	$(BIN)/python -m pip install $(CONSTRAINTS) -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install $(CONSTRAINTS) -e ".[dev]"
	touch $@

# Write down the versions that are installed; CUDA's wheels and triton are pinned by torch itself.
constraints: $(VENV)/.installed-dev
	sed -n '/^#/p' constraints.txt > constraints.txt.new
	$(BIN)/python -m pip freeze --exclude-editable | grep -v -i -E '^(nvidia-|cuda-|triton|-e |#)|@' | sort -f >> constraints.txt.new
	mv constraints.txt.new constraints.txt

clean:
	rm -rf $(VENV) runs build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
