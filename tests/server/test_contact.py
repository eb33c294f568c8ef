"""Every vLLM internal that the server touches, one test each: what fails here is what a new vLLM changed."""

import inspect
import re

import pytest
import vllm.envs
import vllm.exceptions
from prometheus_client import REGISTRY
from vllm.config import CacheConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.cli.main import main as vllm_main
from vllm.entrypoints.launchers import app, launcher
from vllm.entrypoints.launchers.api_server import entry
from vllm.entrypoints.openai.models.api_router import show_available_models
from vllm.plugins.endpoint_plugins.interface import EndpointPlugin, attach_endpoint_plugins
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.metrics.loggers import PrometheusStatLogger

try:
    from vllm.entrypoints.common.cli_args import FrontendArgs
except ImportError:  # before vLLM 0.33
    from vllm.entrypoints.launchers.cli_args import FrontendArgs

from llmdrop_server import statistics
from llmdrop_server.launch import DEFAULTS
from llmdrop_server.plugin import LlmdropEndpoints


def test_the_plugin_is_an_endpoint_plugin():
    assert isinstance(LlmdropEndpoints(), EndpointPlugin)


def test_routes_of_a_plugin_come_before_vllms_middleware_and_error_handlers():
    build = inspect.getsource(app.build_app)
    attach, handlers, middleware = map(
        build.index, ("attach_endpoint_plugins(app", "init_exception_handler(app)", "init_entrypoints_middleware(args")
    )
    assert attach < handlers < middleware
    assert build.index("app.state.args = args") < attach


def test_a_route_of_a_plugin_replaces_vllms_of_the_same_path():
    assert "methods = previous.methods - route.methods" in inspect.getsource(attach_endpoint_plugins)


@pytest.mark.parametrize("name", ["MaxQueuedTokensError", "QueueOverflowError"])
def test_a_full_queue_is_an_error_of_its_own(name):
    assert issubclass(getattr(vllm.exceptions, name), vllm.exceptions.GracefulHTTPError)
    assert issubclass(EngineDeadError, vllm.exceptions.VLLMError)


def test_the_first_thing_after_a_signal_and_the_last_after_a_death_is_the_engines_shutdown():
    serve = inspect.getsource(launcher.serve_http)
    assert "partial(engine_client.shutdown, timeout=timeout)" in serve
    assert (
        serve.index("shutdown_event.wait()") < serve.index("engine_client.shutdown") < serve.index("server.should_exit")
    )
    assert "async_llm.shutdown(timeout=" in inspect.getsource(entry.build_async_engine_client_from_engine_args)


def test_a_dead_engine_ends_the_server_that_the_app_knows():
    assert "server.should_exit = True" in inspect.getsource(launcher.terminate_if_errored)
    assert "app.state.server = server" in inspect.getsource(launcher.serve_http)


def test_the_engine_can_be_asked_whether_it_sleeps_and_whether_it_has_died():
    assert inspect.iscoroutinefunction(AsyncLLM.is_sleeping)
    assert "engine_core.is_sleeping_async()" in inspect.getsource(AsyncLLM.is_sleeping)
    assert isinstance(inspect.getattr_static(EngineClient, "errored"), property)


def test_the_state_of_the_app_has_vllms_config():
    assert "state.vllm_config = vllm_config" in inspect.getsource(inspect.getmodule(entry).init_app_state)


def test_the_cache_config_tells_tokens_and_concurrency():
    cache = CacheConfig()
    for name in ("num_gpu_blocks", "kv_cache_size_tokens", "kv_cache_max_concurrency"):
        assert getattr(cache, name) is None
    assert isinstance(cache.cache_dtype, str)


def test_vllms_metrics_have_the_names_that_are_read_back():
    source = inspect.getsource(PrometheusStatLogger)
    names = (statistics.USAGE, statistics.RUNNING, statistics.WAITING)
    counters = (statistics.QUERIES, statistics.HITS, statistics.PREEMPTIONS)
    for name in (*names, *(counter.removesuffix("_total") for counter in counters)):
        assert re.search(rf'name="{name}"', source), name


def test_our_gauges_outlive_vllms_clean_up():
    assert {"llmdrop_kv_tokens", "llmdrop_parameters"} <= {*REGISTRY._names_to_collectors}


def test_the_list_of_models_is_a_json_response():
    assert inspect.signature(show_available_models).parameters.keys() == {"raw_request"}
    assert "JSONResponse(content=" in inspect.getsource(show_available_models)


@pytest.mark.parametrize("option", [*DEFAULTS, "--hf-overrides"])
def test_the_engine_has_the_options_that_are_set_for_it(option):
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    assert option in parser._option_string_actions


@pytest.mark.parametrize("name", ["api_key", "host", "port", "ssl_keyfile", "ssl_certfile", "ssl_ca_certs"])
def test_the_server_has_the_options_that_are_looked_at_first(name):
    assert hasattr(FrontendArgs(), name)


def test_the_command_line_is_read_from_sys_argv():
    assert "parser.parse_args()" in inspect.getsource(vllm_main)


def test_idle_connections_are_kept_as_long_as_the_environment_says():
    assert "VLLM_HTTP_TIMEOUT_KEEP_ALIVE" in vllm.envs.environment_variables
    assert "timeout_keep_alive=envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE" in inspect.getsource(entry.build_and_serve)
