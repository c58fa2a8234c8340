# Two commands need nothing but Python 3.11+, make and git: `make demo` and `make test`.
# Works with GNU make 3.81 (macOS) and newer.

BIN := .venv/bin
TEST := $(BIN)/pytest -q -n logical --maxprocesses 4 --dist worksteal
export PYTHON

.DEFAULT_GOAL := help
.PHONY: help setup demo test check chaos bench bench-store bench-api bench-batches bench-limits format lock docs clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{ printf "%-22s%s\n", $$1, $$2 }'

setup: ## make .venv from requirements.lock; PYTHON=... chooses the interpreter
	@sh ops/setup.sh

demo: setup ## run the example prompts against the simulator and show the answers
	@echo "mimoq run examples/prompts.jsonl --simulate"
	@$(BIN)/mimoq run examples/prompts.jsonl --simulate --fresh --overwrite --workers 1
	@$(BIN)/python examples/show.py examples/prompts.out.jsonl

test: setup ## run the tests, but for fuzz and chaos
	@$(TEST)

check: setup ## what continuous integration runs: format, lint, types, import rule, documents, tests, a minute of fuzz, two of chaos
	@echo "format" && $(BIN)/ruff format --quiet --check . || { echo "run: make format" >&2; exit 1; }
	@echo "lint" && $(BIN)/ruff check --quiet .
	@echo "types" && $(BIN)/mypy --no-error-summary
	@echo "import rule" && $(BIN)/lint-imports --no-cache >.venv/imports.log || { cat .venv/imports.log; exit 1; }
	@echo "documents" && $(BIN)/python -m ops.docs --check
	@echo "tests"
	@$(TEST) --cov --cov-report=term:skip-covered
	@echo "fuzz"
	@$(TEST) tests/fuzz
	@echo "chaos"
	@$(BIN)/pytest -q -rP tests/chaos --ignore tests/chaos/test_backends.py
	@$(TEST) -rP tests/chaos/test_backends.py

chaos: setup ## harm everything for MINUTES=2 by SEED=..., or KILLS=100 workers, or a deploy in ROLLING=20000 jobs, and count the money
	@$(BIN)/python -m tests.chaos $(if $(KILLS),--kills $(KILLS),$(if $(ROLLING),--rolling --jobs $(ROLLING),\
		--minutes $(or $(MINUTES),2) $(if $(SEED),--seed $(SEED))))

bench: setup ## what calls cost, beside bare loops, the SDKs and plain Celery; WRITE=1 puts it into docs (about a quarter of an hour)
	@$(BIN)/python -m ops.bench.calls $(if $(WRITE),--write)

bench-store: setup ## bulk submits, a million queued jobs, exports, start-up; WRITE=1 puts it into docs (about ten minutes)
	@$(BIN)/python -m ops.bench.store $(if $(WRITE),--write)

bench-api: setup ## what one API process takes, adds to a call, and what waiting costs (about four minutes)
	@$(BIN)/python -m ops.bench.api

bench-batches: setup ## large batches of both protocols: time, and memory of the API (about five minutes)
	@$(BIN)/python -m ops.bench.batches

bench-limits: setup ## how far limits are used and faults survived, a table each (about ten minutes)
	@$(BIN)/python -m ops.bench.limits

format: setup ## format the code and mend what the linter can
	@$(BIN)/ruff check --quiet --fix . ; $(BIN)/ruff format .

docs: setup ## make the documents that are made from the code
	@$(BIN)/python -m ops.docs

LOCK := uv pip compile --universal --generate-hashes --python-version 3.11 --no-emit-index-url --no-header --no-strip-extras \
	--quiet --extra postgres pyproject.toml

lock: ## resolve pyproject.toml anew into requirements.lock, and the image's part of it (needs uv)
	@command -v uv >/dev/null || { echo "lock: needs uv on PATH" >&2; exit 1; }
	@$(LOCK) --upgrade --group dev -o requirements.lock
	@$(LOCK) --constraint requirements.lock -o requirements-image.lock

clean: ## remove .venv, caches and the demo's output; the data folder .mimoq stays
	@rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis .coverage .coverage.* dist
	@rm -f examples/*.out.jsonl examples/*.errors.jsonl
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
