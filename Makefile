.PHONY: quality style test test-slow docs bench

# The benchmarks' data folder (see benchmarks/README.md). If it is empty, the sets come from the Hugging Face Hub.
DATA_DIR ?=

quality:
	ruff check .
	ruff format --check .
	mypy
	lint-imports

style:
	ruff check --fix .
	ruff format .

test:
	python -m pytest -n 2 --dist loadfile

test-slow:
	python -m pytest -n 2 --dist loadfile -m slow

docs:
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict

bench:
	python benchmarks/filters.py $(if $(DATA_DIR),--data-dir $(DATA_DIR))
	python benchmarks/defences.py $(if $(DATA_DIR),--data-dir $(DATA_DIR))
	python benchmarks/cost.py $(if $(DATA_DIR),--data-dir $(DATA_DIR))
