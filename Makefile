# make quickstart   train on real images on two processes while the batch grows, and compare
# make test         the whole test suite
# make check        ruff and mypy --strict
# make bench        every benchmark, into benchmarks/results/
#
# Each makes .venv first, with the versions of constraints.txt. Only python3 and make are needed.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
# One thread a process: the two processes of a run already fill two cores.
export OMP_NUM_THREADS ?= 1

.PHONY: quickstart test check bench clean

quickstart: $(INSTALLED)
	$(BIN)/torchrun --standalone --nproc-per-node=2 -m adabatch compare --config configs/quickstart.yaml

test: $(INSTALLED)
	$(BIN)/python -m pytest $(PYTEST_OPTIONS)

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy adabatch

bench: $(INSTALLED)
	for script in benchmarks/[a-z]*.py; do $(BIN)/python $$script || exit 1; done

$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[cli,report,test]'
	touch $(INSTALLED)

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis runs
