# Two commands do everything on a fresh machine with Python 3.10 or newer:
#   make run    environment, packages, then the market maker (make run ARGS="--replay FILE")
#   make test   environment, packages, then all tests
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python

.PHONY: run test test-1 test-2 bench pictures lint clean
run: $(VENV)/ready
	$(PY) marketmaker.py $(ARGS) || test $$? = 130  # Ctrl-C is its usual end

# The tests run in two halves, a core for each, and the first is shown when it has ended. It begins
# with real sockets and clocks; meanwhile the second runs what needs no more than its own core.
FIRST := $(addprefix tests/test_,exchange.py live.py parity.py backtest.py tuning.py)
CALM := $(addprefix tests/test_,feed.py search.py marketmaker.py)
PYTEST := $(PY) -m pytest -p no:cacheprovider
test: $(VENV)/ready
	@$(MAKE) --no-print-directory --keep-going --jobs=2 test-1 test-2
test-1:
	@$(PYTEST) $(FIRST) > $(VENV)/half; status=$$?; cat $(VENV)/half; exit $$status
test-2:
	@$(PYTEST) $(CALM) tests $(addprefix --ignore=,$(FIRST))

bench: $(VENV)/ready
	$(PY) tests/bench.py $(ARGS)

pictures: $(VENV)/ready
	$(PY) backtest.py --plot data/backtest.png
	$(PY) backtest.py --tune --grid gamma=0.5,1,2,4 --grid delta=0,1,4 --walk-forward --regimes --maker-fee-bps -0.4 --plot data/search.png
	$(PY) data/pictures.py

lint: $(VENV)/ready
	$(PY) -m pip install --quiet ruff && $(VENV)/bin/ruff check .

clean:
	rm -rf $(VENV) data/cache .pytest_cache .ruff_cache __pycache__ tests/__pycache__ data/__pycache__

$(VENV)/ready: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --disable-pip-version-check --quiet -r requirements.txt
	touch $@
