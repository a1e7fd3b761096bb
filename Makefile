# Run in the virtual environment of the README's test line; `make docs` needs the extra docs as well.
.PHONY: fix check test docs

fix:
	ruff format .
	ruff check --fix .

check:
	ruff format --check .
	ruff check .
	mypy

test:
	pytest -m "not slow"

docs:
	python scripts/generate_cli.py
	mkdocs build --strict
