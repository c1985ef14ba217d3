# The two commands of a newcomer are `make demo` and `make test`. Both create what they need.
# `sudo make install DATABASE=/path/to/meshcore.db` makes a systemd service of it; see below.

# The newest Python of 3.11 to 3.14 that answers.
PYTHON ?= $(shell for p in python3.14 python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2])' 2>/dev/null && echo $$p && break; done)
VENV := .venv
# Interpreters that pyenv keeps are not on the PATH; the tests run on each that there is.
PYENV := $(wildcard $(HOME)/.pyenv/versions/3.1*/bin/python3.1[1-4])
TOX := $(VENV)/bin/tox run $(if $(PYENV),--discover $(PYENV))

.PHONY: demo test lint check campaign mutants coverage bench format clean install uninstall

demo: $(VENV)/installed
	$(VENV)/bin/mbcap-watch demo

# About seven minutes; one benchmark briefly: .venv/bin/python -m benchmarks latency --quick
bench: $(VENV)/installed
	$(VENV)/bin/python -m pip install --quiet --editable '.[bench]'
	$(VENV)/bin/python -m benchmarks

# All tests on 3.13; on the other Pythons that there are, those not marked `slow` or `system`.
test: $(VENV)/tox
	$(TOX) -e all,3.11,3.12,3.14

# What .pre-commit-config.yaml asks for.
lint: $(VENV)/tox
	$(TOX) -q -e lint,types,imports

check: $(VENV)/tox
	$(TOX) -e lint,types,imports,dist,alone,all,3.11,3.12,3.14

# Trials in large numbers: `make campaign` lists them, `make campaign NAME=kills N=1000 JOBS=2` plays
# one. What is begun goes on where its report ends; the reports are in .campaigns/.
campaign: $(VENV)/installed
	$(VENV)/bin/python -m pip install --quiet --editable '.[test]'
	$(if $(filter fuzz,$(NAME)),$(VENV)/bin/python -m pip install --quiet --editable '.[fuzz]')
	PYTHONPATH=tests:. $(VENV)/bin/python -m campaigns $(NAME) $(if $(N),-n $(N)) $(if $(JOBS),--jobs $(JOBS))

# Changes what decides in some 1,400 ways, one at a time: the tests should notice. Half an hour.
# A change may well end in a loop that takes all memory.
mutants: $(VENV)/tox
	rm -rf mutants
	ulimit -v 4000000 && $(TOX) -e mutants

# Branch coverage of all tests: a quarter of an hour.
coverage: $(VENV)/tox
	$(TOX) -e coverage

format: $(VENV)/tox
	$(VENV)/bin/tox exec -q -e lint -- ruff check --fix
	$(VENV)/bin/tox exec -q -e lint -- ruff format

clean:
	rm -rf $(VENV) .tox dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache \
		mutants .coverage*

$(VENV)/python:
	@test -n "$(PYTHON)" || { echo "No Python 3.11 to 3.14 found; set PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/installed: $(VENV)/python pyproject.toml
	$(VENV)/bin/python -m pip install --quiet --editable .
	touch $@

$(VENV)/tox: $(VENV)/python tox.toml
	$(VENV)/bin/python -m pip install --quiet 'tox>=4.21'
	touch $@

# ------------------------------------------------------------------------------ as a service
#
# `make install` again is an upgrade. The TOML file is never overwritten; `make uninstall` leaves it.
#
#   DATABASE  the path of meshcore.db: goes into a new TOML file, and gives the defaults of the next
#   OWNER     the user that the service runs as: the owner of the database
#   DATA      the one directory that it may write into: that of the database
#   PREFIX    the venv, a directory of its own
#   DESTDIR   goes before every path, for who makes a package
#
# Without DATABASE and OWNER, the choice of the last time stays, or else what the unit says.

PREFIX ?= /opt/mbcap-watch
DATABASE ?=
OWNER ?= $(if $(DATABASE),$(shell stat -L -c %U '$(DATABASE)' 2>/dev/null))
DATA ?= $(if $(DATABASE),$(shell dirname '$(DATABASE)'))
# A Python in somebody's home (pyenv, uv) cannot be executed by the service's user.
SYSTEM_PYTHON ?= /usr/bin/python3

PROGRAM = $(DESTDIR)$(PREFIX)
LINK = $(DESTDIR)/usr/local/bin/mbcap-watch
MANUAL = $(DESTDIR)/usr/local/share/man/man1/mbcap-watch.1
UNITS = $(DESTDIR)/etc/systemd/system
CHOICE = $(UNITS)/mbcap-watch.service.d/10-install.conf
TOML = $(DESTDIR)/etc/mbcap-watch/mbcap-watch.toml
SYSTEMD = $(if $(DESTDIR),,$(wildcard /run/systemd/system))
FAIL = { echo "$(1)"; exit 1; }

install:
	@$(SYSTEM_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		$(call FAIL,$(SYSTEM_PYTHON) is missing or older than Python 3.11: set SYSTEM_PYTHON= to one \
		that every user can execute)
	@$(SYSTEM_PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		$(call FAIL,$(SYSTEM_PYTHON) cannot make a venv: apt install python3-venv)
	@test ! -e '$(PROGRAM)' || test -e '$(PROGRAM)/pyvenv.cfg' || \
		$(call FAIL,$(PROGRAM) is there and is no venv: set PREFIX= to a directory of its own)
	@case '$(DATABASE)' in /*|'') ;; *) $(call FAIL,DATABASE= must be an absolute path);; esac
	@test -z '$(DATABASE)' || test -n '$(OWNER)' || \
		$(call FAIL,$(DATABASE) is not there: set OWNER= to the user that will own it)
	@test -z '$(OWNER)' -o -n '$(DESTDIR)' || id '$(OWNER)' >/dev/null
	umask 022 && $(SYSTEM_PYTHON) -m venv '$(PROGRAM)'
	umask 022 && '$(PROGRAM)/bin/python' -m pip install --quiet --upgrade .
	$(if $(DESTDIR),grep -rlI '$(DESTDIR)' '$(PROGRAM)/bin' '$(PROGRAM)/pyvenv.cfg' | \
		xargs sed -i 's|$(DESTDIR)||g')
	install -d '$(dir $(LINK))' '$(UNITS)' '$(dir $(TOML))'
	ln -sfn '$(PREFIX)/bin/mbcap-watch' '$(LINK)'
	test ! -e docs/mbcap-watch.1 || install -D -m 644 docs/mbcap-watch.1 '$(MANUAL)'
	for unit in mbcap-watch.service mbcap-watch@.service; do \
		sed 's|/opt/mbcap-watch|$(PREFIX)|' "config/$$unit" >"$(UNITS)/$$unit" && \
		chmod 644 "$(UNITS)/$$unit" || exit 1; done
	test -e '$(TOML)' || { \
		install -m 644 config/mbcap-watch.toml '$(TOML)' && \
		$(if $(DATABASE),sed -i 's|^#\(database = \).*|\1"$(DATABASE)"|' '$(TOML)',:); }
ifneq ($(OWNER),)
	install -d '$(dir $(CHOICE))'
	printf '[Service]\nUser=$(OWNER)\nGroup=\n' >'$(CHOICE)'
	test -z '$(DATA)' || printf 'ReadWritePaths=\nReadWritePaths="$(DATA)"\n' >>'$(CHOICE)'
	case '$(DATA)' in /home/*|/root/*) echo ProtectHome=no >>'$(CHOICE)';; esac
endif
	$(if $(SYSTEMD),systemctl daemon-reload)
	@grep -q '^database *=' '$(TOML)' || echo "Set database in $(TOML)."
	@echo "Then: systemctl enable --now mbcap-watch (after an upgrade: systemctl restart mbcap-watch)"

uninstall:
	@test ! -e '$(PROGRAM)/bin/mbcap-watch' || test -e '$(PROGRAM)/pyvenv.cfg' || \
		$(call FAIL,$(PROGRAM) is no venv of make install: it is left alone)
	$(if $(SYSTEMD),-systemctl disable --now mbcap-watch.service mbcap-watch@.service)
	$(if $(SYSTEMD),-systemctl stop 'mbcap-watch@*.service')
	rm -f '$(LINK)' '$(MANUAL)' '$(UNITS)/mbcap-watch.service' '$(UNITS)/mbcap-watch@.service'
	rm -f '$(CHOICE)'
	test ! -d '$(dir $(CHOICE))' || rmdir --ignore-fail-on-non-empty '$(dir $(CHOICE))'
	$(if $(SYSTEMD),systemctl daemon-reload)
	test ! -e '$(PROGRAM)/bin/mbcap-watch' || rm -rf '$(PROGRAM)'
	@test ! -e '$(TOML)' || echo "$(TOML) is left."
