# make quickstart   train on real images on two processes while the batch grows, and compare
# make test         the whole test suite
# make check        ruff and mypy --strict
# make bench        every benchmark, into benchmarks/results/; make bench STUDY=frontier runs that one
#
# Each makes .venv first, with the versions of constraints.txt: quickstart with what it needs itself, the others with
# every engine and host that the tests run on. Only python3 and make are needed.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
INSTALLED_ALL := .venv/.installed-all
PIP_INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# Test files run side by side, one after the other in each of so many workers.
WORKERS ?= 2
# Names of benchmarks to run, without .py; all of them where it is empty.
STUDY ?=
# One thread a process: the two processes of a run already fill two cores.
export OMP_NUM_THREADS ?= 1

.PHONY: quickstart test check bench clean

quickstart: $(INSTALLED)
	$(BIN)/torchrun --standalone --nproc-per-node=2 -m adabatch compare --config configs/quickstart.yaml

test: $(INSTALLED_ALL)
	$(BIN)/python -m pytest --numprocesses=$(WORKERS) --dist=loadfile $(PYTEST_OPTIONS)

check: $(INSTALLED_ALL)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy adabatch

bench: $(INSTALLED_ALL)
	for script in $(if $(STUDY),$(STUDY:%=benchmarks/%.py),benchmarks/[a-z]*.py); do \
		$(BIN)/python $$script || exit 1; \
	done

$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP_INSTALL) --editable '.[cli,report]'
	touch $(INSTALLED)

$(INSTALLED_ALL): $(INSTALLED)
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(PIP_INSTALL) --editable '.[test]'
	touch $(INSTALLED_ALL)

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis runs
