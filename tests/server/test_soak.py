"""A short run of the soak, which `make soak` does for ten minutes."""

import pytest

from benchmarks.server_soak import BAD, soak

pytestmark = pytest.mark.processes


def test_no_good_request_fails_and_no_block_leaks_among_clients_that_go_away_and_ask_too_much():
    result = soak(seconds=15)
    assert result["failures"] == []
    assert result["tokens"] > 0
    assert result["busiest_kv_usage"] > 0.9
    assert len(result["answers"]) == len(BAD) + 1
