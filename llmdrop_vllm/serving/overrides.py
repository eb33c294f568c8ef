"""What goes over a model's config at run time: entries, or in Python a function of the config."""

from collections.abc import Callable, Mapping
from typing import Any


def may_say(overrides: Any, said: Callable[[Mapping[str, Any]], object]) -> bool:
    """Whether any part of the overrides says what `said` looks for in entries; a function may say anything."""
    if not isinstance(overrides, Mapping):
        return overrides is not None
    return bool(said(overrides)) or any(may_say(each, said) for each in overrides.values() if isinstance(each, Mapping))
