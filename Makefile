# The first command makes .venv, for which pip fetches what requirements.lock names. Models are fetched by those
# commands alone that say so, once.
#
# make run        run the studies on the embedded models: notebooks, figures, records, claims.txt in runs/latest/
#                 one of them or of the appendices, other parameters: make run STUDY=01 ARGS="-p seq_len 200"
#                 MODEL=gpt2: on a model of data/models.yaml, a folder, a .gguf file or a hub id, which is
#                 fetched, into runs/gpt2/
# make real       run the notebooks as they stand, into runs/real/; fetches their models, 491 MB
# make test       unit tests, notebooks with small parameters, stored outputs of embedded models against a fresh
#                 run; pages in a headless Chromium, which root on Debian gets by apt-get if there is none
# make test-real  compare the stored notebooks by values with runs/real/, after running what is not there; fetches
#                 their models
# make lab        open JupyterLab at notebook 00; as root, in a container: ARGS="--allow-root --ip 0.0.0.0"
# make site       a site of README, stored notebooks and model cards, into build/site/
# make notebooks  run all notebooks as they stand, appendices too, and store outputs in notebooks/ and figures in
#                 figures/, which no other command changes; one of them: STUDY=01; fetches their models
# make organisms  train the embedded models again
# make bench      time and memory of studies 1, 3 and 4 against the straightforward way
# make sweep      the runs that sweeps/seeds.yaml names, or ARGS="--config sweep=FILE"; see sweeps/README.md
# make lock       pin the newest versions that pyproject.toml allows
# make clean      remove build/, caches and runs/, with your own runs in it (.venv stays)

SHELL := /bin/bash
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Tests run in as many processes, a file in one of them.
WORKERS ?= 2
STUDY ?=
MODEL ?=
ARGS ?=

.PHONY: run real test test-real lab site notebooks organisms bench sweep lock clean
.DEFAULT_GOAL := run

RUN := $(BIN)/python -m lib run$(if $(STUDY), --study $(STUDY))

run: $(STAMP)
	$(RUN) $(if $(MODEL),--model $(MODEL),--embedded) $(ARGS)

real: $(STAMP)
	$(RUN) --real $(ARGS)

test: $(STAMP)
	$(BIN)/python tests/browser.py
	$(BIN)/python -m pytest tests notebooks --nbval --numprocesses $(WORKERS) --dist loadfile

test-real: $(STAMP)
	$(BIN)/python -m pytest tests/test_real.py -m real

lab: $(STAMP)
	$(BIN)/python -m jupyterlab --LabApp.news_url=None --LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb $(ARGS)

site: $(STAMP)
	rm -rf build/site
	$(BIN)/python -m sphinx --quiet --fail-on-warning --fresh-env -c docs -d build/doctrees . build/site
	@echo "built: open build/site/index.html"

notebooks: $(STAMP)
	$(RUN) --refresh

organisms: $(STAMP)
	for name in induction refusal-single refusal-lowrank refusal-planted-1 refusal-planted-2 refusal-planted-3 \
	    refusal-decoy codi-teacher codi-results-teacher codi-answer-only codi-answer-scratch codi codi-results; do \
	    $(BIN)/python -m lib organisms $$name || exit 1; done

bench: $(STAMP)
	$(BIN)/python -m benchmarks.induction_sweep
	$(BIN)/python -m benchmarks.refusal_sweep
	$(BIN)/python -m benchmarks.latents_memory

sweep: $(STAMP)
	$(BIN)/python -m pip install --quiet --no-build-isolation -c requirements.lock -e '.[sweep]'
	$(BIN)/python -m snakemake -s sweeps/Snakefile --cores 2 $(ARGS)

# A person's wheels may carry a local version (2.13.0+cpu) that no registry knows: pins are written without it.
lock: $(STAMP)
	$(BIN)/python -m pip install --quiet pip-tools
	cp requirements.lock .lock.tmp
	$(BIN)/python -m piptools compile --quiet --upgrade --extra dev --all-build-deps --allow-unsafe \
	    --strip-extras --annotation-style line --no-emit-index-url --no-emit-find-links --no-header \
	    --output-file .lock.tmp pyproject.toml
	{ echo "# Everything that make and environment.yml install; written by 'make lock' from pyproject.toml."; \
	  sed -E 's/^([^ +]+)\+[^ ]+/\1/' .lock.tmp; } > requirements.lock
	rm .lock.tmp

clean:
	rm -rf build runs .cache .pytest_cache .ruff_cache

# The stamp comes last: an install that failed half-way is taken up again by the next command.
$(STAMP): requirements.lock pyproject.toml
	@rm -f $@
	@[ -x $(BIN)/python ] || { \
	  for python in $(PYTHON) python3.11 python3 python3.12 python3.13; do \
	    "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break; \
	    python=""; \
	  done; \
	  [ -n "$$python" ] || { \
	    echo "No Python 3.11 or newer found. Install one, or name it: make run PYTHON=/path/to/python3.11" >&2; exit 1; }; \
	  echo "creating $(VENV) with $$("$$python" -V)"; \
	  "$$python" -m venv $(VENV) || { rm -rf $(VENV); exit 1; }; }
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$(VENV) has $$($(BIN)/python -V), older than 3.11: remove the folder and run make again" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@
