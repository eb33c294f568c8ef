"""Windowed attention of the benchmark against softmax over a mask, token by token."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.windowed_attention import Window, attend
from llmdrop_vllm.masks.stretches import STRETCH
from tests.serving.test_windows import sight

HEADS, KEY_HEADS, TOKENS, SIZE, SCALE = 4, 2, 40, 8, 0.3


def plain(query, key, value, window):
    """[heads, tokens, size], one query at a time."""
    key, value = (each.repeat_interleave(HEADS // KEY_HEADS, 0) for each in (key, value))
    found = torch.zeros(HEADS, TOKENS, SIZE)
    for at in range(TOKENS):
        seen = [each for each in range(at + 1) if each < window.first or each > at - window.length]
        for head in range(HEADS):
            logits, values = key[head, seen] @ query[head, at] * SCALE, value[head, seen]
            if window.sinks is not None and at >= window.length:
                stand_in = torch.zeros(SIZE) if window.values is None else window.values[head]
                logits, values = torch.cat([logits, window.sinks[head, None]]), torch.cat([values, stand_in[None]])
            found[head, at] = logits.softmax(-1) @ values
    return found


@pytest.mark.parametrize("length", [1, 7, 39, 64])
@pytest.mark.parametrize("stand_in", ["nothing", "first", "sinks", "values"])
def test_a_window_is_what_a_mask_makes_of_it(length, stand_in, monkeypatch):
    monkeypatch.setattr("benchmarks.windowed_attention.QUERIES", 16)
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, TOKENS, SIZE) for heads in (HEADS, KEY_HEADS, KEY_HEADS))
    sinks = torch.randn(HEADS) if stand_in in ("sinks", "values") else None
    values = torch.randn(HEADS, SIZE) if stand_in == "values" else None
    window = Window(length, 4 if stand_in == "first" else 0, sinks, values)
    found, _ = attend(SimpleNamespace(window=window), query, key, value, None, SCALE)
    torch.testing.assert_close(found[0].transpose(0, 1), plain(query[0], key[0], value[0], window))


@pytest.mark.parametrize("length", [1, 2, 129, 130])
def test_windows_as_they_are_served(length):
    torch.manual_seed(0)
    tokens = 600
    query, key, value = (torch.randn(1, heads, tokens, SIZE) for heads in (HEADS, KEY_HEADS, KEY_HEADS))
    window = Window(length, first=STRETCH, stretches=True)
    found, _ = attend(SimpleNamespace(window=window), query, key, value, None, SCALE)
    key, value = (each.repeat_interleave(HEADS // KEY_HEADS, 1) for each in (key, value))
    expected = scaled_dot_product_attention(query, key, value, attn_mask=sight(tokens, length), scale=SCALE)
    torch.testing.assert_close(found, expected.transpose(1, 2))
