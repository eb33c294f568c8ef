"""`llmdrop doctor`, and the list of contacts that it goes through."""

import ast
import sys
from types import ModuleType

import pytest

from llmdrop_server import doctor
from llmdrop_server.contacts import contacts, lacking
from llmdrop_vllm.cli import main
from tests.test_architecture import FILES, TREES


def imported():
    """Every name that the packages import from vLLM, as (module, name)."""
    for name in FILES:
        for node in ast.walk(TREES[name]):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "vllm":
                yield from ((node.module, alias.name) for alias in node.names)


def test_every_name_that_is_imported_from_vllm_is_a_contact():
    listed = {(module, name.partition(".")[0]) for module, name, _ in contacts()}
    assert {*imported()} - listed == set()


@pytest.mark.parametrize(("module", "name", "parameters"), [*contacts()])
def test_this_vllm_has_the_contact(module, name, parameters):
    assert lacking(module, name, parameters) == ""


def test_a_contact_that_moved_is_named_with_what_is_gone(monkeypatch):
    moved = ModuleType("moved")
    moved.called = lambda kept: None
    monkeypatch.setitem(sys.modules, "moved", moved)
    assert lacking("moved", "called", ("kept",)) == ""
    assert lacking("moved", "called", ("kept", "dropped")) == "moved:called without dropped"
    assert lacking("moved", "other") == "moved:other (AttributeError)"
    assert lacking("nowhere.at.all", "other") == "nowhere.at.all:other (ModuleNotFoundError)"


@pytest.fixture(autouse=True)
def _log_level(monkeypatch):
    """What the command sets in the environment of its process is not there for the tests that follow."""
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")


def test_ten_lines_say_that_masks_can_be_served(monkeypatch, capsys):
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    assert main(["doctor"]) == 0
    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert len(said) == 10
    assert said["plugin"] == "loaded by vLLM"
    assert said["contacts"].endswith("hold, 0 do not")
    assert said["device"].startswith("cpu: ")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda patch: patch.setenv("VLLM_PLUGINS", "other"), "VLLM_PLUGINS=other shuts this plugin out; add llmdrop"),
        (
            lambda patch: patch.setattr(doctor, "not_held", lambda: ["vllm:gone (ImportError)"]),
            "vllm:gone (ImportError)",
        ),
        (lambda patch: patch.setattr(doctor, "entry_points", lambda group: []), "no entry point tells vLLM"),
        (lambda patch: patch.setitem(sys.modules, "vllm", None), "import vllm: "),
    ],
)
def test_what_keeps_masks_from_being_served_is_an_error_that_names_it(change, problem, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "not_held", list)
    change(monkeypatch)
    assert main(["doctor"]) == 1
    assert problem in capsys.readouterr().err


@pytest.mark.parametrize(("allowed", "says"), [("lora,llmdrop", "lora,llmdrop: masks"), (None, "not set: masks")])
def test_plugins_that_let_ours_in_are_no_problem(allowed, says):
    problems = []
    assert doctor.let_in(allowed, problems).startswith(says)
    assert problems == []


def test_a_front_end_without_our_routes_is_said(monkeypatch):
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    assert "no page" in doctor.front_end()
