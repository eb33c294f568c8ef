"""Answers of the embedded model and long texts to search by."""

import json

import numpy as np
import pytest

from llmdrop_vllm.artifacts import ModelIdentity, Provenance
from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.embedded import MODEL
from tests.data.files import answer, write_answers

SMALL = ("--tokens", "300", "--held-out-tokens", "200", "--masks", "60")


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What the embedded model might have said: its tokens in any order."""
    rng = np.random.default_rng(0)
    found = [
        answer(number, rng.integers(5, 500, 6).tolist(), rng.integers(5, 500, 26).tolist(), held_out=number % 4 == 0)
        for number in range(24)
    ]
    provenance = Provenance(model=ModelIdentity.of(Checkpoint.open(MODEL)))
    return write_answers(tmp_path_factory.mktemp("answers") / "answers.jsonl", found, provenance=provenance)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Token ids, longer than what windows of 64 show."""
    path = tmp_path_factory.mktemp("texts") / "ids.json"
    path.write_text(json.dumps(np.random.default_rng(0).integers(3, 250, (4, 600)).tolist()))
    return path


@pytest.fixture
def command(answers, tmp_path):
    return ["search", str(MODEL), "--answers", str(answers), "--out", str(tmp_path / "mask.json"), *SMALL]
