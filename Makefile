# make demo    install, make a small corpus of synthesised speech, train on it, print the error rates
# make test    install, run the whole test suite on the CPU
# make bench   time the portable scan in two minutes; fails when it is slow or wasteful
# make lint    ruff and yamllint
# make figures redraw figures/ from the code and from measured results
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test bench lint figures clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# //p' Makefile

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed; found $$($(PYTHON) --version). Set PYTHON=python3.11, for instance."; exit 1; }
	$(PYTHON) -m venv $(VENV)

# A stamp for each set of requirements: installed once, and again when its file changes.
$(VENV)/%.installed: requirements-%.txt requirements.txt | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --progress-bar off -r $<
	@touch $@

$(VENV)/dev.installed: requirements-demo.txt

demo: $(VENV)/demo.installed
	$(RUN) -m demo.make_corpus data/demo
	$(RUN) train_CTC.py hparams/CTC/conmamba_tiny.yaml --data_folder data/demo --output_folder results/demo \
		--inter_ctc_layers "[2]"

test: $(VENV)/dev.installed
	$(RUN) -m pytest -m "not slow" --numprocesses auto --maxprocesses 4 --dist worksteal

bench: $(VENV)/dev.installed
	$(RUN) benchmarks/scan.py --check

lint: $(VENV)/dev.installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m yamllint hparams

figures: $(VENV)/dev.installed
	$(RUN) figures/draw.py

clean:
	rm -rf $(VENV) results data/demo
