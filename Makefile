# Every target sets up what it needs: an environment in .venv with the versions of requirements/tested.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
SERVING := .venv-serving
DOCS := .venv-docs
ECOSYSTEM := .venv-ecosystem
RELEASE := .venv-release
# Python compiles the files that it imports; to compile all of them takes most of the time of an installation
INSTALL := pip install --quiet --no-compile

.PHONY: help demo demo-train test test-oldest docs test-serving test-ecosystem release lint clean

help:
	@echo "make demo           load a trained GMA language model, let it write, reload it, report its routes"
	@echo "make demo-train     the same with a small model that is trained first, on source code (some minutes)"
	@echo "make test           run the tests"
	@echo "make test-oldest    run a quick part of the tests against the oldest supported versions"
	@echo "make docs           build the documentation into site/, with all links checked"
	@echo "make test-serving   run the tests of the vLLM plugin, on a CPU"
	@echo "make test-ecosystem run the examples of docs/ecosystem.md and the tests beside them"
	@echo "make release        build wheel and source distribution into dist/, and check them"
	@echo "make lint           check style and formatting"
	@echo "make clean          remove the environments, what the demo wrote, site/ and dist/"

$(VENV)/.ready: pyproject.toml requirements/tested.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m $(INSTALL) --upgrade pip
	$(BIN)/python -m $(INSTALL) -r requirements/tested.txt
	$(BIN)/python -m $(INSTALL) --no-deps --editable .
	@touch $@

$(OLDEST)/.ready: pyproject.toml requirements/oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m $(INSTALL) --upgrade pip
	$(OLDEST)/bin/python -m $(INSTALL) -r requirements/oldest.txt
	$(OLDEST)/bin/python -m $(INSTALL) --no-deps --editable .
	@touch $@

$(DOCS)/.ready: requirements/docs.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m $(INSTALL) --upgrade pip
	$(DOCS)/bin/python -m $(INSTALL) -r requirements/docs.txt
	@touch $@

$(SERVING)/.ready: pyproject.toml requirements/serving.txt
	$(PYTHON) -m venv $(SERVING)
	$(SERVING)/bin/python -m $(INSTALL) --upgrade pip
	$(SERVING)/bin/python -m $(INSTALL) "$$(grep '^torch==' requirements/serving.txt)"
	$(SERVING)/bin/python -m $(INSTALL) --no-deps -r requirements/serving.txt
	$(SERVING)/bin/python -m $(INSTALL) --no-deps --editable .
	@touch $@

$(ECOSYSTEM)/.ready: pyproject.toml requirements/ecosystem.txt
	$(PYTHON) -m venv $(ECOSYSTEM)
	$(ECOSYSTEM)/bin/python -m $(INSTALL) --upgrade pip
	$(ECOSYSTEM)/bin/python -m $(INSTALL) "$$(grep '^torch==' requirements/ecosystem.txt)"
	$(ECOSYSTEM)/bin/python -m $(INSTALL) --no-deps -r requirements/ecosystem.txt
	$(ECOSYSTEM)/bin/python -m $(INSTALL) --no-deps --editable .
	@touch $@

$(RELEASE)/.ready: requirements/release.txt
	$(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/python -m $(INSTALL) --upgrade pip
	$(RELEASE)/bin/python -m $(INSTALL) -r requirements/release.txt
	@touch $@

demo: $(VENV)/.ready
	$(BIN)/python scripts/demo.py

demo-train: $(VENV)/.ready
	$(BIN)/python scripts/demo.py --train

test: $(VENV)/.ready
	$(BIN)/python -m pytest -n auto

test-oldest: $(OLDEST)/.ready
	$(OLDEST)/bin/python -m pytest -n auto -m quick

docs: $(DOCS)/.ready
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --quiet

test-serving: $(SERVING)/.ready
	$(SERVING)/bin/python -m pytest tests/serving

test-ecosystem: $(ECOSYSTEM)/.ready
	$(ECOSYSTEM)/bin/python -m pytest -n auto -rs tests/ecosystem

# With the packages of requirements/release.txt, not with those that the build would download: the same files each time
release: $(RELEASE)/.ready
	rm -rf dist
	$(RELEASE)/bin/python -m build --no-isolation
	$(RELEASE)/bin/python -m twine check --strict dist/*
	$(RELEASE)/bin/python .ci/check_release.py dist

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) $(OLDEST) $(SERVING) $(DOCS) $(ECOSYSTEM) $(RELEASE) outputs site dist
