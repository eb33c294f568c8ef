"""Every operation of the server's OpenAPI schema, with requests that the schema makes up: no 5xx, no hang, and answers
of the form that the schema promises.
"""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from benchmarks.servers import MASK, serving

pytestmark = pytest.mark.processes
KEY = "sesam"
# What vLLM answers for an API that the served model is not for.
NOT_FOR_THIS_MODEL = 501
# vLLM does not declare the errors of these, so only their form can be checked.
ERRORS_UNDECLARED = ("/v1/responses/{response_id}", "/v1/responses/{response_id}/cancel")


@pytest.fixture(scope="module")
def api(tmp_path_factory):
    # Short answers: an example may ask for all that fits.
    options = ["--api-key", KEY, "--max-model-len", "64", "--limit", "n=2", "--limit", "prompts=4"]
    with serving(tmp_path_factory.mktemp("server"), "--drop-attention", MASK, *options) as served:
        headers = {"Authorization": f"Bearer {KEY}"}
        yield schemathesis.openapi.from_url(f"{served.url}/openapi.json", headers=headers)


def check(case):
    answer = case.call(headers={"Authorization": f"Bearer {KEY}"}, timeout=30)
    if answer.status_code == NOT_FOR_THIS_MODEL:
        assert "does not support" in answer.text
        return
    if answer.status_code >= 400:
        assert {"message", "type"} <= answer.json()["error"].keys()  # OpenAI's form, and Anthropic's
    checks = [not_a_server_error, content_type_conformance, response_schema_conformance]
    if case.operation.path not in ERRORS_UNDECLARED:
        checks.append(status_code_conformance)
    case.validate_response(answer, checks=checks)


def test_any_request_gets_an_answer_that_the_schema_promises(api):
    quick = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[*HealthCheck])
    operations = [result.ok() for result in api.get_all_operations()]
    assert {"/v1/completions", "/v1/chat/completions", "/v1/drop"} <= {operation.path for operation in operations}
    for operation in operations:
        quick(given(case=operation.as_strategy())(check))()
