# make quickstart   train on real images on two processes while the batch grows, and compare
# make fast         the tests of the pure core, the plain runtime and the guides: under a minute on two idle cores
# make test         the whole test suite
# make check        ruff, and mypy: strict for the library, looser for tests, benchmarks and examples
# make site         the documentation as web pages, into build/site; a broken link or reference is an error
# make dev          an environment for `make fast` and `make check`, without DeepSpeed and MPI, and the pre-commit hooks
# make bench        every benchmark that needs no GPU, into benchmarks/results/; make bench STUDY=frontier runs that one
#
# Each makes .venv first, with the versions of constraints.txt: quickstart with what it needs itself, the others with
# every engine and host that the tests run on. Only python3 and make are needed.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
INSTALLED_DEV := .venv/.installed-dev
INSTALLED_ALL := .venv/.installed-all
INSTALLED_DOCS := .venv/.installed-docs
# Python compiles what is imported, once; to compile all that is installed takes another minute.
PIP_INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt
# Test files run side by side, one after the other in each of so many workers. One more than two cores have work for:
# processes of the tests wait for each other, and for times that are up.
WORKERS ?= 3
# Names of benchmarks to run, without .py; where it is empty, all that need no GPU.
STUDY ?=
ON_A_GPU := benchmarks/gpu_checks.py benchmarks/probes_gpu.py
# One thread a process: the two processes of a run already fill two cores.
export OMP_NUM_THREADS ?= 1
# The tests start hundreds of processes, and each would compile the package again.
unexport PYTHONDONTWRITEBYTECODE

# What one waits for between two edits: nothing that starts processes, compiles or trains for long.
FAST := tests/batch tests/lr tests/docs tests/test_architecture.py tests/adaptive/test_adaptive.py \
	tests/adaptive/test_adaptive_equivalence.py tests/adaptive/test_adaptive_input.py tests/journal tests/guards \
	tests/runtime/test_collectives.py tests/runtime/optimizers/test_scheduler.py tests/runtime/optimizers/test_followers.py \
	tests/runtime/observers/test_stopwatch.py tests/runtime/data

.PHONY: quickstart fast test check site dev bench clean

quickstart: $(INSTALLED)
	$(BIN)/torchrun --standalone --nproc-per-node=2 -m adabatch compare --config configs/quickstart.yaml

# Nothing waits there. Whichever environment exists will do.
fast: WORKERS = 2
fast: $(if $(wildcard $(INSTALLED_ALL)),$(INSTALLED_ALL),$(INSTALLED_DEV))
	$(BIN)/python -m pytest --numprocesses=$(WORKERS) --dist=worksteal -m "not distributed and not slow" \
		--hypothesis-profile=fast $(FAST) $(PYTEST_OPTIONS)

test: $(INSTALLED_ALL)
	$(BIN)/python -m pytest --numprocesses=$(WORKERS) --dist=loadfile --no-loadscope-reorder $(PYTEST_OPTIONS)

check: $(INSTALLED_ALL)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

site: $(if $(wildcard $(INSTALLED_ALL)),$(INSTALLED_ALL),$(INSTALLED_DOCS))
	$(BIN)/python docs/gather_site.py
	$(BIN)/zensical build --strict --clean --config-file zensical.yml

dev: $(INSTALLED_DEV)
	$(BIN)/pre-commit install

bench: $(INSTALLED_ALL)
	for script in $(if $(STUDY),$(STUDY:%=benchmarks/%.py),$(filter-out $(ON_A_GPU),$(wildcard benchmarks/[a-z]*.py))); do \
		$(BIN)/python $$script || exit 1; \
	done

$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP_INSTALL) --editable '.[cli,report]'
	touch $(INSTALLED)

$(INSTALLED_DEV): $(INSTALLED)
	$(PIP_INSTALL) --editable '.[dev]'
	touch $(INSTALLED_DEV)

$(INSTALLED_DOCS): $(INSTALLED)
	$(PIP_INSTALL) --editable '.[docs]'
	touch $(INSTALLED_DOCS)

# In one go, as a second installation resolves and builds everything again.
$(INSTALLED_ALL): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(PIP_INSTALL) --editable '.[test]'
	touch $(INSTALLED) $(INSTALLED_ALL)

clean:
	rm -rf .venv .cache build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis runs
