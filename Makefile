# Every target sets up what it needs: an environment in .venv with the versions of requirements/tested.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
SERVING := .venv-serving
DOCS := .venv-docs
ECOSYSTEM := .venv-ecosystem

.PHONY: help demo test test-oldest docs test-serving test-ecosystem lint clean

help:
	@echo "make demo         train a small GMA language model, generate, reload it, plot its components (3 minutes)"
	@echo "make test         run the tests"
	@echo "make test-oldest  run a quick part of the tests against the oldest supported versions"
	@echo "make docs         build the documentation into site/, with all links checked"
	@echo "make test-serving run the tests of the vLLM plugin, on a CPU"
	@echo "make test-ecosystem run the examples of docs/ecosystem.md and the tests beside them"
	@echo "make lint         check style and formatting"
	@echo "make clean        remove the environments and what the demo wrote"

$(VENV)/.ready: pyproject.toml requirements/tested.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements/tested.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	@touch $@

$(OLDEST)/.ready: pyproject.toml requirements/oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --upgrade pip
	$(OLDEST)/bin/python -m pip install --quiet -r requirements/oldest.txt
	$(OLDEST)/bin/python -m pip install --quiet --no-deps --editable .
	@touch $@

$(DOCS)/.ready: requirements/docs.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --upgrade pip
	$(DOCS)/bin/python -m pip install --quiet -r requirements/docs.txt
	@touch $@

$(SERVING)/.ready: pyproject.toml requirements/serving.txt
	$(PYTHON) -m venv $(SERVING)
	$(SERVING)/bin/python -m pip install --quiet --upgrade pip
	$(SERVING)/bin/python -m pip install --quiet "$$(grep '^torch==' requirements/serving.txt)"
	$(SERVING)/bin/python -m pip install --quiet --no-deps -r requirements/serving.txt
	$(SERVING)/bin/python -m pip install --quiet --no-deps --editable .
	@touch $@

$(ECOSYSTEM)/.ready: pyproject.toml requirements/ecosystem.txt
	$(PYTHON) -m venv $(ECOSYSTEM)
	$(ECOSYSTEM)/bin/python -m pip install --quiet --upgrade pip
	$(ECOSYSTEM)/bin/python -m pip install --quiet "$$(grep '^torch==' requirements/ecosystem.txt)"
	$(ECOSYSTEM)/bin/python -m pip install --quiet --no-deps -r requirements/ecosystem.txt
	$(ECOSYSTEM)/bin/python -m pip install --quiet --no-deps --editable .
	@touch $@

demo: $(VENV)/.ready
	$(BIN)/python scripts/demo.py

test: $(VENV)/.ready
	$(BIN)/python -m pytest -n auto

test-oldest: $(OLDEST)/.ready
	$(OLDEST)/bin/python -m pytest -n auto -m quick

docs: $(DOCS)/.ready
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --quiet

test-serving: $(SERVING)/.ready
	$(SERVING)/bin/python -m pytest tests/serving

test-ecosystem: $(ECOSYSTEM)/.ready
	$(ECOSYSTEM)/bin/python -m pytest tests/ecosystem

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) $(OLDEST) $(SERVING) $(DOCS) $(ECOSYSTEM) outputs site
