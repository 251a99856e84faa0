# Copyright: (c) 2026, celeryops contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Which environment runs a test file: one that says `pytestmark = pytest.mark.ansible` needs Ansible and runs in
# .venv; every other one runs in tests/output/venvs/celery-5.7 (tests/conftest.py sorts them by that line).

MAKEFLAGS += --no-print-directory
# Where an image forbids bytecode, each of a thousand processes would compile what it imports.
unexport PYTHONDONTWRITEBYTECODE
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export ANSIBLE_COLLECTIONS_PATH := $(CURDIR)/tests/output/collections
export ANSIBLE_HOME := $(CURDIR)/tests/output/ansible
OUT := tests/output
CELERY ?= 5.4 5.5 5.6 5.7
JOBS ?= 8
TABLE ?= docs/game-day.md
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help deps lint sanity unit contract integration fleet game-day molecule test ci image demo story down bench docs build clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' Makefile

deps: ## install what is missing: Debian packages and .venv (root; quick when all is there)
	@scripts/bootstrap

lint: deps ## every static check and the build judged by galaxy-importer (ARGS="mypy ruff" picks some)
	@python scripts/checks.py lint $(ARGS)

sanity: deps ## ansible-test sanity on a clean copy
	@scripts/sanity $(ARGS)

unit: deps ## unit tests (ARGS="-k health" goes to pytest, here and below)
	@python scripts/run_tests.py --name unit --environments "ansible 5.7" tests/unit $(ARGS)

contract: deps ## engine and runtime against every Celery of CELERY="5.4 5.5 5.6 5.7"
	@python scripts/run_tests.py --name contract --environments "$(CELERY)" --jobs $(JOBS) --first "carry reconnect runtime" tests/contract $(ARGS)

integration: deps ## real redis-server and workers on this machine, modules run by Ansible
	@python scripts/run_tests.py --name integration --environments "ansible 5.7" --jobs $(JOBS) \
		$(filter-out $(wildcard tests/integration/test_fleet_*.py),$(wildcard tests/integration/test_*.py)) $(ARGS)

fleet: deps ## playbooks on one fleet of real systemd hosts: faults and load first, then every task counted
	@python scripts/run_tests.py --name fleet --environments ansible $(wildcard tests/integration/test_fleet_*.py) -o timeout=900 --durations=20 $(ARGS)

game-day: deps ## the faults of a bad night on a fleet of its own: each caused under load, cured by its playbook, tasks counted
	@GAME_DAY_TABLE="$(TABLE)" python scripts/run_tests.py --name $(or $(GAME_DAY_NAME),game-day) --environments ansible $(or $(GAME_DAY_FILES),$(wildcard tests/game_day/test_*.py)) -o timeout=900 --durations=20 $(ARGS)

molecule: deps ## every Molecule scenario on real systemd hosts (ARGS="-s NAME" for one)
	@scripts/molecule $(ARGS)

test: deps ## lint, unit, contract, integration, Molecule, sanity: cheap to dear, side by side
	@python scripts/checks.py test $(ARGS)

ci: deps ## everything: test, fleet and game day
	@python scripts/checks.py ci $(ARGS)

image: ## the image of the test hosts, from Debian packages
	@scripts/bootstrap packages
	@tests/image/build.sh >/dev/null

demo: ## the story on three real hosts: install, rolling deploy, bad release, rollback, scale (KEEP=1 keeps them)
	@scripts/bootstrap packages
	@$(MAKE) -j2 image story

story: ## what demo shows; demo builds the image beside .venv and what else this needs
	@scripts/bootstrap ansible
	@KEEP="$(KEEP)" scripts/demo

down: deps ## remove every test host of this checkout
	@python tests/fleet/fleet.py down --all

bench: deps ## measure against the usual way; prints a table, writes tests/output/bench.json
	@python scripts/bench.py $(ARGS)

docs: deps ## HTML reference of modules and roles in docs/reference
	@scripts/reference

build: deps ## the collection's archive in tests/output/artifact
	@scripts/artifact

clean: ## remove what runs have written (not .venv); the hosts go first
	@if [ -x .venv/bin/python ]; then python tests/fleet/fleet.py down --all; fi
	@rm -rf $(OUT) docs/reference collections .ansible .cache .mypy_cache .pytest_cache .ruff_cache
