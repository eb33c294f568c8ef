# `make serve` and `make test` do all the set-up they need; `make help` lists the rest.
PYTHON ?= python3
VENV := .venv
MODEL ?= smollm2
EMBEDDED := llmdrop_vllm/embedded/model
PORT ?= 8000
# Of SmolLM2 the three attentions without which its own answers change least, one after the other by KL (0.12 nats; the
# three of the smallest cosine importance: 0.18). Of the embedded model four of the least important
# (benchmarks/results/embedded/scores.json). Another MODEL brings its own mask.
SMOLLM2_MASK := 7,6,29
EMBEDDED_MASK := 11,7,8,10
# Eager, for compiling takes longer than models of this size can win back.
SMALL := --gpu-memory-utilization 0.3 --enforce-eager
# A base model has no chat template.
NAME := $(MODEL)
ROUTE := completions
ASK := \"prompt\": \"Once upon a time\"
ifeq ($(MODEL),$(EMBEDDED))
SERVE_DEFAULTS := --served-model-name embedded --drop-attention $(EMBEDDED_MASK) $(SMALL)
NAME := embedded
ROUTE := chat/completions
ASK := \"messages\": [{\"role\": \"user\", \"content\": \"What is os.path.join?\"}]
endif
ifeq ($(MODEL),smollm2)
SERVE_DEFAULTS := --drop-attention $(SMOLLM2_MASK) --dtype float32 $(SMALL) \
    --comparison benchmarks/results/real/smollm2/comparison.json
ROUTE := chat/completions
ASK := \"messages\": [{\"role\": \"user\", \"content\": \"What is the capital of France?\"}]
endif
# Only read on a CPU: memory for the KV cache, in GiB. vLLM would take half of the machine's.
export VLLM_CPU_KVCACHE_SPACE ?= 1

.DEFAULT_GOAL := help

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 24

$(VENV)/ready: pyproject.toml docker/setup.sh docker/name_vllm_cpu.py docker/torchvision_without_ops.py
	PYTHON=$(PYTHON) bash docker/setup.sh $(VENV) dev
	touch $@

setup: $(VENV)/ready ## create .venv with this package and the vLLM that fits the machine

quantize-setup: $(VENV)/ready ## make the environment of `llmdrop quantize`, which makes it on first use otherwise
	$(VENV)/bin/python -m llmdrop_vllm.quantizing.environment

# A model that is fetched by name may be out of reach; there is one that needs nothing.
serve: $(VENV)/ready ## serve SmolLM2, attention dropped; MODEL=... PORT=... ARGS="..." go to llmdrop serve
ifeq ($(MODEL),smollm2)
	@$(VENV)/bin/llmdrop fetch $(MODEL) >/dev/null || { \
	    echo "SmolLM2 cannot be had; serving the embedded model, which is far too small to speak well"; \
	    exec $(MAKE) --no-print-directory serve MODEL=$(EMBEDDED); } && $(MAKE) --no-print-directory start
else
	@$(MAKE) --no-print-directory start
endif

start:
	@echo "When the server says 'Application startup complete', open http://127.0.0.1:$(PORT)/ or paste into another terminal:"
	@echo
	@echo "  curl http://127.0.0.1:$(PORT)/v1/$(ROUTE) -H 'Content-Type: application/json' \\"
	@echo "    -d '{\"model\": \"$(NAME)\", \"max_tokens\": 60, \"temperature\": 0, $(ASK)}'"
	@echo
	$(VENV)/bin/llmdrop serve $(MODEL) --host 127.0.0.1 --port $(PORT) $(SERVE_DEFAULTS) $(ARGS)

test: $(VENV)/ready ## the whole suite: no GPU, no hub
	$(VENV)/bin/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(ARGS)

canary: $(VENV)/ready ## contacts and serving, by the newest vLLM's Python over the libraries here; ARGS="tests/..." for others
	$(VENV)/bin/python docker/canary.py $(ARGS)

soak: $(VENV)/ready ## ten minutes of good and bad clients at a full KV cache; ARGS="--seconds 60" for less
	$(VENV)/bin/python benchmarks/server_soak.py $(ARGS)

bench: $(VENV)/ready ## what dropping buys on this machine, against stock vLLM and Transformers; ARGS="--smoke" for seconds
	$(VENV)/bin/python benchmarks/throughput.py $(ARGS)

image-test: ## build the image on a base made here, run it, ask it and stop it; as root, with podman, runc and mmdebstrap
	bash docker/image_test.sh

lint: $(VENV)/ready ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

.PHONY: help setup quantize-setup serve start test canary soak bench image-test lint
