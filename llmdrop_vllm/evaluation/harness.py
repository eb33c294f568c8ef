"""Tasks of lm-evaluation-harness: found by name, run by its own runner through the engine, read from its results."""

import difflib
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from llmdrop_vllm.artifacts import write_atomically
from llmdrop_vllm.errors import DataError
from llmdrop_vllm.evaluation.records import Asking, Prompting, TaskKind, TaskScore
from llmdrop_vllm.evaluation.sandbox import check_confinement

OWN_TASKS, OWN = Path(__file__).with_name("tasks"), "llmdrop_"
CHAT = "chat"  # in a task's metadata: entries that stand in for its own where the model is asked in a chat
# What stands for a task's result, the first that it has; any other metric only where it has none of these.
METRICS = ("acc_norm", "acc", "exact_match", "f1", "pass@1")
# Between 0 and 100, or edits: they would be averaged with shares as if they were some.
NO_SHARES = ("bleu", "chrf", "ter")
FEWSHOT_SEED, BOOTSTRAPS = 1234, 1000  # lm-eval's own default; for metrics whose standard error is not a formula
KINDS: Mapping[str, TaskKind] = {"multiple_choice": "multiple choice", "generate_until": "generation"}


@dataclass(frozen=True)
class Harness:
    """lm-eval's index of tasks, with ours, and those asked for: by default none. `skipped`: why a task is not run.

    `prompting` "auto" asks a model that has a chat template through it, in tasks that say how (`metadata.chat`), and
    has all else completed; "chat" and "completion" ask so throughout. `runs_code` lets tasks run what models write.
    `limit` rows of each task are asked at most.
    """

    manager: Any = None
    tasks: tuple[str, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    prompting: Asking = "auto"
    runs_code: bool = False
    limit: int | None = None

    def run(self, model: Any, *, bars: bool = True) -> tuple[tuple[TaskScore, ...], dict[str, Any]]:
        """Scores and lm-eval's own results; `model` is one of its models."""
        # Not `simple_evaluate`, which describes the machine each time: seconds of `pip list` and the like.
        from lm_eval.evaluator import evaluate

        scores: dict[str, tuple[TaskScore, ...]] = {}
        kept: dict[str, Any] = {}
        with _quiet(bars=bars):
            for prompting, names in self._asked(model).items():
                found = self.manager.load(names)
                for task in found["tasks"].values():
                    _prepare(task, prompting)
                results = evaluate(
                    model,
                    task_dict=found,
                    limit=self.limit,
                    bootstrap_iters=BOOTSTRAPS,
                    apply_chat_template=prompting == "chat",
                    fewshot_as_multiturn=prompting == "chat",
                    confirm_run_unsafe_code=self.runs_code,
                )
                for name in names:
                    scores[name] = tuple(_score(results, each, prompting) for each in self._scored(results, name))
                kept = _merged(kept, {key: value for key, value in results.items() if key != "samples"})
        return tuple(score for name in self.tasks for score in scores[name]), kept

    def _asked(self, model: Any) -> dict[Prompting, list[str]]:
        """The tasks by how this model is asked."""
        if self.prompting != "auto":
            return {self.prompting: [*self.tasks]}
        loaded = {name: self.manager.load([name])["tasks"].values() for name in self.tasks}
        chat = [name for name in self.tasks if all(CHAT in (task.config.metadata or {}) for task in loaded[name])]
        if not chat or getattr(getattr(model, "tokenizer", None), "chat_template", None) is None:
            return {"completion": [*self.tasks]}
        found: dict[Prompting, list[str]] = {"chat": chat, "completion": [n for n in self.tasks if n not in chat]}
        return {prompting: names for prompting, names in found.items() if names}

    def _scored(self, results: Mapping[str, Any], task: str) -> list[str]:
        """What has a score: a tag, or a group that lm-eval does not sum up, stands for its members."""
        if _metrics(results, task):
            return [task]
        members = results["group_subtasks"].get(task) or sorted(self.manager.task_index[task].tags)
        return [each for member in members for each in self._scored(results, member)]


def find_tasks(
    names: Sequence[str], *, prompting: Asking = "auto", runs_code: bool = False, limit: int | None = None
) -> Harness:
    """Load the data of these tasks.

    Raises DataError for a name that lm-eval does not know, with the nearest, and for a task that two of them hold.
    """
    names = tuple(dict.fromkeys(names))
    with _quiet():
        # lm-eval's own tasks are thousands of files, which take seconds to list.
        manager = _manager(include_defaults=False)
        if not set(names) <= set(manager.all_tasks):
            manager = _manager(include_defaults=True)
        if unknown := [name for name in names if name not in manager.all_tasks]:
            raise DataError(f"unknown task {unknown[0]}; {_nearest(unknown[0], manager.all_tasks)}")
        skipped: dict[str, str] = {}
        holders: dict[str, str] = {}
        for name in names:
            try:
                tasks = manager.load([name])["tasks"]
            except Exception as error:  # whatever its data's libraries raise
                first_line, *_ = (str(error).strip() or type(error).__name__).splitlines()
                skipped[name] = f"its data cannot be loaded: {first_line}"
                continue
            code = any(getattr(task, "UNSAFE_CODE", False) for task in tasks.values())
            if code and not runs_code:
                skipped[name] = "it would run code that the model writes; --run-generated-code lets it, confined"
            elif code and not name.startswith(OWN):
                skipped[name] = "it would run code that the model writes, and not in our confinement"
            elif code:
                check_confinement()
            elif not any(_is_share(*each) for task in tasks.values() for each in task.higher_is_better().items()):
                skipped[name] = "none of its metrics is a score between 0 and 1"
            for task in tasks:
                if holders.setdefault(task, name) != name:
                    raise DataError(f"task {task} is in {holders[task]} and in {name}; expected it once")
    kept = tuple(name for name in names if name not in skipped)
    return Harness(manager, kept, skipped, prompting, runs_code, limit)


def _prepare(task: Any, prompting: Prompting) -> None:
    """Deterministic examples, as many as the task says or none, and its own words for a chat."""
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)
    if prompting == "chat":
        for key, value in (task.config.metadata or {}).get(CHAT, {}).items():
            task.set_config(key=key, value=value)


def _merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """lm-eval's results of two runs as if they had been one."""
    both = {key: {**one[key], **other[key]} for key in one if isinstance(one[key], dict) and key in other}
    return {**one, **other, **both}


@cache
def _manager(*, include_defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(OWN_TASKS), include_defaults=include_defaults)


def write_results(results: Mapping[str, Any], path: Path) -> None:
    """lm-eval's own results, as its command line would write them."""
    from lm_eval.utils import handle_non_serializable

    path.parent.mkdir(exist_ok=True)
    write_atomically(path, json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False) + "\n")


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3) or [each for each in known if name in each][:3]
    return f"the nearest are {', '.join(near)}" if near else "`lm-eval ls tasks` lists what there is"


def _score(results: Mapping[str, Any], task: str, prompting: Prompting) -> TaskScore:
    """Of one task, or of a group as lm-eval sums it up."""
    metrics, leaves = results["results"][task], _leaves(results, task)
    better = results["higher_is_better"].get(task, {})
    names = {key: key.partition(",")[0] for key in _metrics(results, task)}
    usual = [key for metric in METRICS for key, name in names.items() if name == metric]
    shares = [key for key, name in names.items() if _is_share(name, better.get(name))]
    key = [*usual, *shares, *names][0]
    metric, _, chosen_filter = key.partition(",")
    stderr = metrics.get(f"{metric}_stderr,{chosen_filter}")
    return TaskScore(
        task=task,
        metric=metric,
        kind=KINDS.get(results["configs"][leaves[0]]["output_type"], "other"),
        value=float(metrics[key]),
        stderr=float(stderr) if isinstance(stderr, int | float) else None,
        chance=_chance(results, leaves),
        samples=sum(results["n-samples"][leaf]["effective"] for leaf in leaves),
        prompting=prompting,
    )


def _is_share(metric: str, higher_is_better: bool | None) -> bool:
    """Whether a metric is between 0 and 1, the more the better, as far as lm-eval says: most that it has are."""
    return higher_is_better is not False and metric not in NO_SHARES


def _metrics(results: Mapping[str, Any], task: str) -> list[str]:
    """As lm-eval names them: `acc,none` is the metric and the filter before it."""
    return [key for key in results["results"].get(task, ()) if "," in key and "_stderr," not in key]


def _leaves(results: Mapping[str, Any], task: str) -> list[str]:
    below = results["group_subtasks"].get(task, ())
    return [leaf for name in below for leaf in _leaves(results, name)] or [task]


def _chance(results: Mapping[str, Any], leaves: Sequence[str]) -> float | None:
    """One over the number of choices, mean over rows; None for what is not multiple choice."""
    if any(results["configs"][leaf]["output_type"] != "multiple_choice" for leaf in leaves):
        return None
    rows = [len(sample["arguments"]) for leaf in leaves for sample in results["samples"][leaf]]
    return sum(1 / choices for choices in rows) / len(rows)


@contextmanager
def _quiet(*, bars: bool = True) -> Iterator[None]:
    """lm-eval and the libraries of its data report on every step, and draw a bar for each, where `bars` lets them."""
    with (
        only_from(logging.ERROR, "lm_eval", "datasets", "huggingface_hub"),
        warnings.catch_warnings(action="ignore"),
        Path(os.devnull).open("w") as nowhere,
        redirect_stderr(sys.stderr if bars else nowhere),
    ):
        yield


@contextmanager
def only_from(level: int, *loggers: str) -> Iterator[None]:
    """Within this context, these loggers pass on nothing below `level`.

    Not by an environment variable, which processes started meanwhile would inherit.
    """
    before = {name: logging.getLogger(name).level for name in loggers}
    for name in before:
        logging.getLogger(name).setLevel(level)
    try:
        yield
    finally:
        for name, own in before.items():
            logging.getLogger(name).setLevel(own)
