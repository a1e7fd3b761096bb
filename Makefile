# Run in the virtual environment of the README's test line; `make docs` needs the extra docs as well.
.PHONY: fix check test docs

CPP_FILES = $(shell git ls-files '*.cpp' '*.h' '*.hpp')

fix:
	ruff format .
	ruff check --fix .
	clang-format -i $(CPP_FILES)

check:
	ruff format --check .
	ruff check .
	clang-format --dry-run -Werror $(CPP_FILES)
	mypy

test:
	pytest -m "not slow"

docs:
	python scripts/generate_cli.py
	mkdocs build --strict
