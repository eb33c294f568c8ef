"""What messages are made of."""

import shlex

from llmdrop_vllm.errors import command, in_one_line, listed


def test_many_names_are_cut_and_counted():
    assert listed({"b", "a"}) == "a, b"
    assert listed(str(number) for number in range(8)) == "0, 1, 2, 3, 4, 5, 6, 7"
    assert listed(f"{number:02}" for number in range(40)).endswith("06, 07 and 32 more")


def test_a_command_is_read_by_a_shell_as_it_was_meant():
    words = ("apply", "/models/it's mine", "OUT", "--attention", 4)
    assert shlex.split(command(*words)) == ["llmdrop", *map(str, words)]
    assert command("apply", "/models/mine", "OUT") == "llmdrop apply /models/mine OUT"


def test_an_error_of_several_lines_becomes_one():
    assert in_one_line(ValueError("a  name, of two:\n    one")) == "a  name, of two: one"
