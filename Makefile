# The two commands that anyone needs: `make lab` and `make test`. `make help` lists the rest.

PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
FIRST  := notebooks/00_start_here.ipynb
PIP    := $(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help named setup model lab interpreter peers grader test test-fast campaign run bench gpu lint docs site slides bundle room student teacher classroom catch-up lock clean

help:            ## show this list
	@sed -n 's/^\([a-z-]*\): .*## /  make \1|/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-17s %s\n", $$1, $$2}'

setup:           ## create .venv and install everything into it, at the pinned versions
	@$(PYTHON) scripts/setup_env.py $(VENV)

model: setup     ## fetch and verify the base model
	@$(PY) -m labkit.models fetch smollm2-135m

lab: model       ## set everything up and open JupyterLab on the first notebook
	@$(PY) scripts/open_lab.py $(FIRST)

# Triton, which runs the kernels of a GPU in an interpreter, and compiles them; once, and tests go on without it
interpreter: setup
	@$(PY) -c "import triton" 2>/dev/null || $(PIP) --retries 1 --no-deps --require-hashes --requirement requirements/interpreter.lock; \
	$(PY) -c "import triton" 2>/dev/null || echo "warning: Triton is not installed here: the kernels for a GPU are NOT tested"

# llama.cpp, which exported files are held against; once, and tests go on without it
PEERS := $(PY) -c "import sys, importlib.util as u; sys.exit(u.find_spec('xllamacpp') is None)"
peers: setup
	@$(PEERS) || $(PIP) --retries 1 --no-deps --require-hashes --requirement requirements/peers.lock; \
	$(PEERS) || echo "warning: xllamacpp is not installed here: exported files are NOT tested against llama.cpp"

# nbgrader, for a class; once, and tests go on without it
grader: setup
	@$(PY) -c "import nbgrader" 2>/dev/null || $(PIP) --retries 1 --no-deps --require-hashes --requirement requirements/classroom.lock; \
	$(PY) -c "import nbgrader" 2>/dev/null || echo "warning: nbgrader is not installed here: grading is NOT tested"

test: model interpreter peers grader ## set everything up and run all tests, notebooks included, on WORKERS processes
	@LABKIT_STATIC=1 $(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --nbval-lax --nbval-current-env --nbval-cell-timeout=2400 $(ARGS)

test-fast: model interpreter peers ## run everything but notebooks and slow tests, on WORKERS processes
	@LABKIT_STATIC=1 $(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m 'not slow' tests labkit $(ARGS)

campaign: model  ## kill, starve and mistreat everything, for up to half an hour; make test plays a slice of it
	@LABKIT_STATIC=1 LABKIT_CAMPAIGN=full $(PY) -m pytest -n $(WORKERS) tests/campaign $(ARGS)

named:
	@test -f "$(NB)" || { echo "error: NB='$(NB)' is not a file; for example: make run NB=$(FIRST)"; exit 2; }

run: named model ## run one notebook without a browser: make run NB=notebooks/08_qlora_finetune.ipynb
	@mkdir -p build
	@LABKIT_STATIC=1 $(PY) -m nbconvert --to notebook --execute --output-dir build \
	    --ExecutePreprocessor.kernel_name=python3 --ExecutePreprocessor.timeout=3600 "$(NB)"

bench: model     ## measure speed and memory against the peers, in one run, and print ratios
	@$(PIP) --no-deps --require-hashes --requirement requirements/bench.lock
	@for script in tests/benchmarks/bench_*.py; do echo "== $$script"; $(PY) $$script || exit 1; done

gpu:             ## measure what only a GPU can show, in 8 minutes, without a network; without a GPU, rehearse it
	@$(if $(wildcard $(PY)),$(PY),$(PYTHON)) scripts/gpu_day.py $(ARGS)

lint: setup      ## check style, the direction of imports, and types
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(VENV)/bin/lint-imports
	@$(PY) -m mypy

docs: setup      ## make the API pages: build/docs/index.html
	@$(PY) scripts/make_docs.py build/docs

site: setup      ## make the course as web pages that need no network: build/site/index.html
	@$(PY) scripts/make_site.py build/site

slides: setup    ## make slides from the figures of the lessons: build/slides/index.html
	@$(PY) scripts/make_slides.py build/slides

bundle: setup    ## put packages, model and course into build/bundle, for a USB stick and a room without a network
	@$(PY) scripts/make_bundle.py build/bundle

room:            ## is this machine ready for a lesson? a line for each thing, and what to do; installs nothing
	@$(PYTHON) scripts/check_room.py

student: setup   ## write a student's copy of every lesson to build/student: stubs for solutions, no outputs, answers folded
	@$(PY) scripts/make_classroom.py student build/student

teacher: setup   ## write a teacher's copy to build/teacher: solutions, outputs, minutes, the mistakes that checks name
	@$(PY) scripts/make_classroom.py teacher build/teacher

classroom: grader ## lay out build/classroom for nbgrader: the exercises of every lesson as assignments
	@$(PY) scripts/make_classroom.py nbgrader build/classroom

catch-up: model  ## record the slow calls of lessons on this machine, for lab.catch_up: runs their slow cells once
	@$(PY) -m recipes.catch_up

lock: setup      ## make requirements/*.lock again from constraints.txt, with uv
	@$(PIP) uv
	@$(PY) scripts/lock_requirements.py

clean:           ## remove .venv and everything made here; the fetched model stays in the user's cache
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
