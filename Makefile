# Every target sets itself up: it makes .venv and installs the package with its development tools at the first call, and
# again only when pyproject.toml or constraints.txt has changed.
#
#   make demo     train the same small model with several optimizers and compare them
#   make test     the tests, and which of them took longest
#   make test-all   the same with every case of every preset (longer)
#   make test-quick   a selection of them for while you work, in about a minute
#   make check    lint, format, types
#   make docs     the documentation, in site/
#   make clean    remove what was built; .venv stays (to start over: rm -rf .venv)
#
#   make demo PYTHON=python3.12       another Python, 3.11 or newer
#
# On Linux, PyPI's torch brings CUDA (5 GB). For the small CPU build, point pip at PyTorch's own index beforehand:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo

PYTHON ?= python3
# More than two cores have: tests on several ranks wait more than they compute.
WORKERS ?= 3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test test-all test-quick check docs clean
.DEFAULT_GOAL := demo

demo: $(READY)
	$(BIN)/subspace-opt demo

# Some environments switch bytecode off. The workers, their ranks and the commands that the tests run would then compile the package each.
test test-all test-quick: export PYTHONDONTWRITEBYTECODE :=

test: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations=20

test-all: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations=20 --all-presets

test-quick: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --quick

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf build dist site .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name .venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# `set -e` and one shell: the first failing line ends the recipe, and its message is the last thing printed.
$(READY): pyproject.toml constraints.txt
	@set -e; \
	command -v $(PYTHON) >/dev/null || { \
	  echo "make: no '$(PYTHON)' on the PATH; install Python 3.11 or newer, or name one: make PYTHON=/path/to/python" >&2; exit 1; }; \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: '$(PYTHON)' is $$($(PYTHON) --version 2>&1), but 3.11 or newer is needed; name one: make PYTHON=python3.12" >&2; exit 1; }; \
	if [ ! -x $(BIN)/pip ]; then \
	  $(PYTHON) -c 'import ensurepip' 2>/dev/null || { \
	    echo "make: '$(PYTHON)' has no ensurepip, so it cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }; \
	  $(PYTHON) -m venv .venv; \
	fi; \
	echo "Installing into .venv (minutes the first time) ..."; \
	$(BIN)/python -m pip install -qq --disable-pip-version-check -e '.[dev]' -c constraints.txt; \
	touch $@
