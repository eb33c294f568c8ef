import subprocess
import sys

import pytest

from llmdrop_vllm.errors import OutputError
from llmdrop_vllm.report import pictures, write_report
from llmdrop_vllm.report.findings import Findings
from tests.report.sweeps import scores, sweep


@pytest.fixture(autouse=True)
def _few_pictures(monkeypatch):
    """Two of them are enough to see where pictures go."""
    few = [each for each in pictures.PICTURES if each[0] in ("speedup", "kv_cache")]
    monkeypatch.setattr(pictures, "PICTURES", few)


def small(**changes):
    return sweep(names=["attention"], counts=(1, 2), tasks=(), **changes)


def test_it_says_what_it_wrote_and_nothing_else_is_there(tmp_path):
    out = tmp_path / "new" / "report"
    written = write_report(Findings(small(), [scores()]), out)
    assert written[0] == out / "report.html"
    assert {*written} == {path for path in out.rglob("*") if path.is_file()}
    assert {path.suffix for path in written[1:]} == {".svg", ".png"}
    assert (out / "pictures" / "kv_cache.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_that_is_left_out_does_not_stay_from_an_earlier_report(tmp_path):
    write_report(Findings(small()), tmp_path)
    assert (tmp_path / "pictures" / "speedup.png").exists()
    write_report(Findings(small(speed=False)), tmp_path)
    assert not [*tmp_path.glob("pictures/speedup.*")]


def test_what_is_refused_leaves_an_earlier_report_alone(tmp_path):
    write_report(Findings(small()), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="8 layers"):
        write_report(Findings(small(), [scores(depth=8)]), tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_place_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file"):
        write_report(Findings(small()), tmp_path / "file")


def test_importing_it_does_not_load_matplotlib():
    code = "import sys, llmdrop_vllm.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
