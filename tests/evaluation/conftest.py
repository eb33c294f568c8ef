"""Engines of `llmdrop_vllm.evaluation` start as quickly as those that tests make themselves."""

import pytest

from tests.engines import quick


@pytest.fixture(scope="module", autouse=True)
def quick_engines():
    with quick():
        yield
