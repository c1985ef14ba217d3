# The two commands of a newcomer are `make demo` and `make test`. Both create what they need.

# The newest Python of 3.11 to 3.13 that answers.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2])' 2>/dev/null && echo $$p && break; done)
VENV := .venv
# Interpreters that pyenv keeps are not on the PATH; the tests run on each that there is.
PYENV := $(wildcard $(HOME)/.pyenv/versions/3.1*/bin/python3.1[1-3])
TOX := $(VENV)/bin/tox run $(if $(PYENV),--discover $(PYENV))

.PHONY: demo test check campaign bench format clean

demo: $(VENV)/installed
	$(VENV)/bin/mbcap-watch demo

# About seven minutes; one benchmark briefly: .venv/bin/python -m benchmarks latency --quick
bench: $(VENV)/installed
	$(VENV)/bin/python -m pip install --quiet --editable '.[bench]'
	$(VENV)/bin/python -m benchmarks

# All tests on the newest Python; on the others those that are not marked `slow` or `system`.
test: $(VENV)/tox
	$(TOX) -e all,3.11,3.12

check: $(VENV)/tox
	$(TOX) -e lint,types,imports,all,3.11,3.12

# What the tests do briefly, at length: about a quarter of an hour.
campaign: $(VENV)/tox
	HYPOTHESIS_PROFILE=campaign MBCAP_TEST_KILLS=10000 MBCAP_TEST_CORRUPTIONS=10000 \
		$(TOX) -e all -- -q -o faulthandler_timeout=0 \
		tests/bridge/test_mishaps.py tests/bridge/test_cancel.py tests/snapshot/test_codec.py \
		tests/store/test_corruption.py tests/store/test_plan.py

format: $(VENV)/tox
	$(VENV)/bin/tox exec -q -e lint -- ruff check --fix
	$(VENV)/bin/tox exec -q -e lint -- ruff format

clean:
	rm -rf $(VENV) .tox dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

$(VENV)/python:
	@test -n "$(PYTHON)" || { echo "No Python 3.11 to 3.13 found; set PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/installed: $(VENV)/python pyproject.toml
	$(VENV)/bin/python -m pip install --quiet --editable .
	touch $@

$(VENV)/tox: $(VENV)/python tox.toml
	$(VENV)/bin/python -m pip install --quiet 'tox>=4.21'
	touch $@
