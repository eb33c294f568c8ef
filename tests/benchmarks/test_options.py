"""Options that make no measurement are refused before there is one."""

import pytest

from benchmarks import kv_capacity, load, throughput

BAD = [
    (throughput, "--repeats 0", "argument --repeats: '0' is not a whole number above 0"),
    (throughput, "--attention two", "argument --attention: 'two' is not a whole number above 0"),
    (throughput, "--contexts 256,0", "argument --contexts: '0' is not a whole number above 0"),
    (throughput, "--contexts 256 --workloads chats", "argument --workloads: not allowed with argument --contexts"),
    (throughput, "--without vLLM", "argument --without: invalid choice: 'vLLM'"),
    (throughput, "--without transformers", "argument --without: invalid choice: 'transformers'"),
    (throughput, "--kv-gib 0", "argument --kv-gib: '0' is not a number above 0"),
    (throughput, "--out nowhere/found.json", "argument --out: 'nowhere' is not a directory"),
    (throughput, "--out found.md", "argument --out: 'found.md' does not end in .json"),
    (load, "--repeats 0", "argument --repeats: '0' is not a whole number above 0"),
    (load, "--seconds inf", "argument --seconds: 'inf' is not a number above 0"),
    (load, "--seconds nan", "argument --seconds: 'nan' is not a number above 0"),
    (load, "--fit 0", "argument --fit: '0' is not a whole number above 0"),
    (load, "--prompt-tokens 0", "argument --prompt-tokens: '0' is not a whole number above 0"),
    (kv_capacity, "--repeats 0", "argument --repeats: '0' is not a whole number above 0"),
    (kv_capacity, "--kv-gib -1", "argument --kv-gib: '-1' is not a number above 0"),
]


@pytest.mark.parametrize(("script", "options", "message"), BAD)
def test_options_that_make_no_measurement_are_refused(script, options, message, capsys):
    with pytest.raises(SystemExit):
        script.main(options.split())
    assert message in capsys.readouterr().err


def test_numbers_are_separated_by_commas():
    assert throughput.parse(["--attention", "2,4", "--contexts", "256"]).attention == [2, 4]
    assert throughput.parse(["--without", "vLLM no-op", "--without", "llmdrop"]).without == ["vLLM no-op", "llmdrop"]
