"""What a user of the page does, and a model that is deeper than the stand-in's."""

import time

from tests.server.page_stub import DROP


def ask(page, prompt="What is a path?"):
    page.fill("#prompt", prompt)
    page.press("#prompt", "Enter")


def wait_until(condition, deadline_s=5):
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def deep_model(layers):
    importance = [0.5 / (1 + layer) for layer in range(layers)]
    scores = {"importance": dict.fromkeys(("attention", "mlp", "block"), importance), "calibration": "c4"}
    mask = {"num_hidden_layers": layers, "attention": [*range(layers - 1, layers // 2, -1)], "mlp": [3]}
    return {**DROP, "mask": mask, "scores": scores}
