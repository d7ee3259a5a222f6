"""How commands end."""

import pytest

from adastate_jax.console import CommandParser, run_command
from adastate_jax.errors import UserError, one_line, shown


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (1, 1)])
def test_a_command_exits_with_what_it_returns(returned, code):
    with pytest.raises(SystemExit) as exited:
        run_command(lambda arguments: returned, [])
    assert exited.value.code == code


def test_bad_input_is_one_line(capsys):
    def main(arguments):
        raise UserError(f"{arguments[0]}: no such file;\n  name another")

    with pytest.raises(SystemExit) as exited:
        run_command(main, ["x.mp4"])
    assert exited.value.code == 2
    assert capsys.readouterr().err == "error: x.mp4: no such file; name another\n"


def test_what_a_hostile_file_says_does_not_reach_the_terminal_as_it_is(capsys):
    def main(arguments):
        raise UserError("x.pt: asks for \x1b[2J\x1b]0;title\x07 \x9b31m \u202egnp \udcff café 色")

    with pytest.raises(SystemExit):
        run_command(main, [])
    error = capsys.readouterr().err
    assert error == r"error: x.pt: asks for \x1b[2J\x1b]0;title\x07 \x9b31m \u202egnp \udcff café 色" + "\n"
    assert one_line("a\r\n\tb\v c\x85d") == "a b c d"


def test_any_value_can_be_shown():
    own = []
    own.append(own)
    deep = []
    for _ in range(100_000):
        deep = [deep]
    assert shown(own) == "[[...]]"
    assert shown(10**5000) == "int of more than can be shown"
    assert shown(deep) == "list of more than can be shown"
    assert shown("x" * 1000) == "'" + "x" * 79 + "…"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: --anchor"),
        (["--anchor=sticky"], "--anchor: invalid choice: 'sticky' (choose from"),
        (["--anc=none"], "the following arguments are required: --anchor"),
    ],
)
def test_a_bad_command_line_is_one_line(arguments, message, capsys):
    def main(arguments):
        parser = CommandParser(prog="python -m adastate_jax.sample")
        parser.add_argument("--anchor", required=True, choices=("none", "static"))
        parser.parse_args(arguments)

    with pytest.raises(SystemExit) as exited:
        run_command(main, arguments)
    assert exited.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.endswith("; python -m adastate_jax.sample --help says more\n")
    assert error.count("\n") == 1
