"""Make a CUDA build of torchvision importable where there is no CUDA: vLLM's multimodal models want its transforms.

Its compiled operators cannot be loaded there, and the module that describes what they return fails at import and takes
everything else along, which is plain Python. None of those operators is called to serve a model.
"""

from importlib.util import find_spec
from pathlib import Path

spec = find_spec("torchvision")
if spec is not None and spec.origin is not None:
    path = Path(spec.origin).with_name("_meta_registrations.py")
    path.write_text('"""Emptied by llmdrop-vllm: the operators that it describes are not there."""\n')
