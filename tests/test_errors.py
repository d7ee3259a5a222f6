"""How commands end."""

import pytest

from adastate_jax.console import CommandParser, run_command
from adastate_jax.errors import UserError


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
