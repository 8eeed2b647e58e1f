# Two commands matter: `make demo` and `make test`. Both install what they need (Debian 12, root).
PYTHON := .venv/bin/python

.PHONY: demo test soak bench lint fmt proto clean setup

setup:
	@tests/setup.sh

demo: setup
	@$(PYTHON) -m tests.demo

test: setup
	@tests/run.sh

soak: setup
	@$(PYTHON) -m tests.soak $(SOAK)

bench: setup
	@$(PYTHON) -m tests.bench $(BENCH)

lint: setup
	@tests/run.sh lint

fmt: setup
	@.venv/bin/ruff check --fix-only --quiet . && .venv/bin/ruff format .

proto: setup
	@proto/generate.sh

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist .cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
