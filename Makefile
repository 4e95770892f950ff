# make demo      the main job, on data that comes with the dependencies
# make test      everything that is tested
# make faults    fails each write of six kinds of run in each way, damages each of its files, kills it at each write and 300
#                times at random (ANYRANK_KILLS, ANYRANK_KILLS_SEED), and stops commands and workers (one to two hours; most of
#                it waits for the disk: TMPDIR=/dev/shm takes a memory disk)
# make mutants   plants mistakes in a copy of the source and shows which test catches each
# make fuzz      fuzzes the doors of the library by coverage for five minutes: adapters, configurations, data, run folders, replies,
#                frames (FUZZ="--seconds 1500 --seed 1 --doors data,run" for others; at random where atheris has no wheel)
# make bench     times merges of Llama-sized adapters against the other ways (about ten minutes, 12 GB of temporary files),
#                and simulation against loops over clients (ten minutes; MiniLM with ANYRANK_DATA=FOLDER, banking77 in it),
#                starts of light commands (half a minute), the checks of a round and of a merge (five minutes), and a server
#                whose clients are processes (ten minutes, 4 GB of temporary files)
# make experiments  runs the studies of configs/papers and writes docs/results.md (data sets in ANYRANK_DATA=FOLDER)
# make sites     workers, and systems on NVFlare and on Flower, in real processes that are killed in turn; every method in
#                workers and in one process (about half an hour); makes an environment for Flower in .venv/flower
# make audits    repeats audits of honest noise and of too little over keys (half an hour)
# make neighbours  compares private runs on neighbouring data byte by byte, for all tasks and levels (a few minutes)
# make lint      style and imports

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
FLOWER := $(VENV)/flower
FUZZ   ?= --seconds 300 --seed 0
PIP    := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test neighbours mutants fuzz bench experiments faults sites flower audits lint clean

demo: $(VENV)/.installed
	$(BIN)/anyrank demo

test: $(VENV)/.installed-test
	$(BIN)/ruff check src tests
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --durations=10

faults: $(VENV)/.installed-test
	ANYRANK_FAULTS=all $(BIN)/python -m pytest -q -rP tests/test_faults.py tests/test_kills.py \
		tests/test_processes.py

neighbours: $(VENV)/.installed-test
	ANYRANK_NEIGHBOURS=all $(BIN)/python -m pytest -q tests/test_neighbours.py

mutants: $(VENV)/.installed-test
	$(BIN)/python tests/mutants.py

fuzz: $(VENV)/.installed-test
	@$(BIN)/python -c 'import atheris' 2>/dev/null || $(PIP) --only-binary atheris -e '.[fuzz]' 2>/dev/null || true
	$(BIN)/python tests/fuzz.py $(FUZZ)

bench: $(VENV)/.installed-test
	$(BIN)/python benchmarks/aggregate.py
	$(BIN)/python benchmarks/simulation.py
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/defence.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/sites.py
	$(BIN)/python benchmarks/status_page.py
	$(BIN)/python benchmarks/over_nvflare.py --megabytes 0 24 --sites 2

sites: $(VENV)/.installed-test
	@$(MAKE) --no-print-directory flower || echo "no environment for Flower could be made; its tests are skipped"
	ANYRANK_SITES=all $(BIN)/python -m pytest -q -rP tests/test_supervisor.py tests/test_workers.py \
		tests/test_nvflare.py tests/test_nvflare_bytes.py tests/test_deploy_live.py tests/test_deploy_faults.py \
		tests/test_deploy_rehearsal.py tests/test_flower.py tests/test_flower_live.py

flower: $(FLOWER)/.installed

experiments: $(VENV)/.installed-test
	$(BIN)/python experiments/results.py
	$(BIN)/python experiments/noise.py
	$(BIN)/python experiments/alpha.py
	$(BIN)/python experiments/private_rates.py
	$(BIN)/python experiments/attacks.py
	$(BIN)/python experiments/ffa.py --why 1 --write

audits: $(VENV)/.installed-test
	ANYRANK_AUDITS=all $(BIN)/python -m pytest -q -rP tests/test_noise_audit.py

lint: $(VENV)/.installed-test
	$(BIN)/ruff check --fix src tests
	$(BIN)/ruff format src tests

clean:
	rm -rf $(VENV) build dist src/*.egg-info

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "anyrank needs Python 3.11 or newer; got $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "installing into $(VENV) (a minute or two; torch is the large one)"
	$(PIP) -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@echo "installing what the tests need"
	$(PIP) -e '.[test]'
	@touch $@

# Flower pins packages that clash with constraints.txt.
$(FLOWER)/.installed: $(VENV)/bin/python pyproject.toml constraints-flower.txt
	@echo "installing Flower into $(FLOWER)"
	$(PYTHON) -m venv $(FLOWER)
	$(FLOWER)/bin/pip install --quiet --disable-pip-version-check -c constraints-flower.txt -e '.[flower,text]'
	@touch $@
