"""More requests than fit: the same few bytes of KV cache for stock vLLM's full model and for half of its attention."""

import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.contenders import Settings
from benchmarks.limit import measure_ceilings
from benchmarks.lineup import NO_OP, TRANSFORMERS, Lineup
from benchmarks.shapes import find
from benchmarks.table import against_limit
from benchmarks.turns import Plan, measure, with_room_for
from benchmarks.weights import write_random
from benchmarks.workloads import Workload

SEQUENCES_THAT_FIT = 4
COLUMNS = ("contender", "KV tokens", "running at once", "preempted", "requests/s", "speedup ± spread", "limit", "ratio")


def throughput_when_short(*, repeats: int, smoke: bool = False) -> dict[str, Any]:
    """Four times as many requests as the full model's KV cache holds."""
    shape = find("smoke" if smoke else "cpu-small")
    workload = Workload("KV memory short", 4 * SEQUENCES_THAT_FIT, 16 if smoke else 128, 112 if smoke else 128)
    settings = Settings("float32", "cpu", kv_bytes=0, max_step_tokens=2048, compiled=False)
    settings = with_room_for(SEQUENCES_THAT_FIT, workload, shape, settings)
    mask = shape.mask("attention", shape.num_layers // 2)
    masks = {f"attention {len(mask.attention)}": mask}
    plan = Plan(shape, settings, masks, 1 if smoke else repeats, (NO_OP, TRANSFORMERS))
    plan.check_fits(workload)
    plan = replace(plan, work=(workload,), ceilings=measure_ceilings("float32", seconds=0.2 if smoke else 2))
    with tempfile.TemporaryDirectory() as name:
        lines = [*measure(plan, Lineup(shape, settings, write_random(Path(name) / "full", shape, "float32")))]
    return {
        "shape": shape.name,
        "layers": shape.num_layers,
        "workload": asdict(workload),
        "kv_bytes": settings.kv_bytes,
        "lines": lines,
    }


def row(line: dict[str, Any]) -> tuple[str, ...]:
    """For the table."""
    return (
        line["contender"],
        f"{line['kv_tokens']:,}",
        str(line["running"]),
        f"{line['preemptions']:g}",
        f"{line['requests_per_s']:.2f}",
        *against_limit(line["total"]),
    )
