# The short forms. ARGS passes arguments on: make train ARGS="name=mine total_timesteps=500"
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# Two processes, each with whole files and, where they need one, a Ray cluster of its own. Files keep their order, in which
# those that start clusters come first; by default files of few tests come last, and one of them alone would end the run.
TEST_OPTIONS := -v -n 2 --dist loadfile --no-loadscope-reorder --durations=20
# Coverage of the whole run: part of the tests, by ARGS, can't reach the floor.
COVERAGE := $(if $(ARGS),,--cov)

.PHONY: train test nightly install lint

train: install
	$(RUN) -m dt_ray.train $(ARGS)

test: install-dev lint
	$(RUN) -m pytest -m "not nightly" $(TEST_OPTIONS) $(COVERAGE) $(ARGS)

# What only costs time: the whole fault campaign, every export, the README at full length. About two hours.
nightly: install-dev
	$(RUN) -m pytest -m nightly $(TEST_OPTIONS) $(ARGS)

lint: install-dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyright
	$(VENV)/bin/lint-imports

install: $(VENV)/.installed
.PHONY: install-dev
install-dev: $(VENV)/.installed-dev

# The documentation as a site, in site/.
.PHONY: docs
docs: install-dev
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet

# The public implementations beside ours. d3rlpy pins an older Gymnasium, so it is added without its requirements.
.PHONY: bench
bench:
	test -d .venv-bench || $(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[bench]"
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps d3rlpy

$(VENV)/.installed: pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@ $(VENV)/.installed
