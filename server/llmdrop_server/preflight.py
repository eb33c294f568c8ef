"""What can be known to fail before vLLM is imported, which takes a quarter of a minute: each with one clear line."""

import socket
from collections.abc import Iterable
from pathlib import Path

from llmdrop_vllm.checkpoints.directory import check_model_name
from llmdrop_vllm.errors import InputError

# Tokenizers have files under many names, and these words are in nearly all of them.
TOKENIZERS = ("*token*", "vocab*", "*.model", "*.tiktoken", "tekken*", "*spm*", "*bpe*")


def check_served_name(model: str) -> None:
    """Raise InputError for a path where no checkpoint is. Any other name is vLLM's to find: on a hub, in a store."""
    path = Path(model)
    is_local = path.exists() or path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1
    if is_local and "://" not in model:
        check_model_name(model)


def check_tokenizer(model: str) -> None:
    """Raise InputError for a checkpoint directory without a tokenizer, which a model's save_pretrained leaves out."""
    directory = Path(model)
    if (directory / "config.json").is_file() and not any(next(directory.glob(each), None) for each in TOKENIZERS):
        raise InputError(
            f"{model} has no tokenizer; copy its files from the model that it was made of (in Python: "
            f"AutoTokenizer.from_pretrained(ORIGINAL).save_pretrained({model!r})), or name one with --tokenizer"
        )


def check_readable(paths: Iterable[Path | None]) -> None:
    """Raise InputError for a file that cannot be read."""
    for path in filter(None, paths):
        _read(path)


def check_port(host: str | None, port: int) -> None:
    """Raise InputError where another process listens already, or the address is not this machine's."""
    family = socket.AF_INET6 if host and ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host or "", port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"{host or '0.0.0.0'}:{port} cannot be listened on: {reason}") from None


def read_keys(path: Path) -> list[str]:
    """API keys, one per line. Raises InputError for a file without any."""
    keys = [line.strip() for line in _read(path).splitlines() if line.strip()]
    if not keys:
        raise InputError(f"{path} holds no key; expected one per line")
    return keys


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {getattr(error, 'strerror', None) or 'not text'}") from None
