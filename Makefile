# Two commands matter: `make book` and `make test`. The README says what the variables do.
PYTHON ?= python3
TORCH ?= torch
CONSTRAINTS ?= $(CURDIR)/constraints.txt
NAME =
export TORCH CONSTRAINTS

RUN := .venv/bin/python
# Files in their order: the largest first would leave the pages for Colab to one worker at the end.
PYTEST := $(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder
NEED_NAME = $(if $(NAME),,$(error say which chapter, for example: make $@ NAME=conditional_norm))
NEED_FILE = $(NEED_NAME)$(if $(wildcard $(1)/$(NAME).py),,$(error there is no $(1)/$(NAME).py))

.NOTPARALLEL:
.PHONY: book test test-all notebooks reproduce bench faults lint clean book-env dev-env

book: book-env
	$(RUN) book/render.py

test: dev-env book lint
	$(PYTEST) -m "not slow"

test-all: dev-env book lint
	$(PYTEST) -m ""

notebooks: dev-env
	$(RUN) book/twins.py $(NAME)

reproduce: dev-env
	$(call NEED_FILE,experiments)$(RUN) -m experiments.$(NAME)

bench: dev-env
	$(call NEED_FILE,benchmarks)$(RUN) -m benchmarks.$(NAME)

faults: dev-env
	$(PYTEST) --dist load -m "" tests/test_planted_faults.py $(if $(NAME),-k $(NAME))

lint: dev-env
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

clean:
	rm -rf .venv _build build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

book-env:
	@$(PYTHON) bootstrap.py book

dev-env:
	@$(PYTHON) bootstrap.py dev
