"""`--help`: one line per option, in groups, with an example that can be typed."""

from __future__ import annotations

import re
import shlex

import pytest
import typer
from typer.testing import CliRunner

from forgetfilter_callback.cli.commands import app
from forgetfilter_callback.measures.names import DEFAULT_MEASURE, MEASURES


GROUP = typer.main.get_command(app)
COMMANDS = ["demo", "run", "score", "show", "report", "review", "filter", "export", "doctor"]


def help_of(command: str, width: int) -> str:
    arguments = [command, "--help"] if command else ["--help"]
    return CliRunner().invoke(app, arguments, env={"COLUMNS": str(width)}).output


def panels(command: str, width: int) -> dict[str, dict[str, int]]:
    """The panels of a help text: how many lines each of their rows has."""
    found: dict[str, dict[str, int]] = {}
    for line in help_of(command, width).splitlines():
        if line.startswith("╭─ "):
            rows = found[line.strip("╭─╮ ")] = {}
        elif line.startswith("│"):
            text = line.lstrip("│ *")
            if len(line) - len(text) < 10:  # not the continuation of a row
                name = text.split()[0]
            rows[name] = rows.get(name, 0) + 1
    return found


@pytest.mark.parametrize(("width", "most"), [(80, 2), (100, 1)])
@pytest.mark.parametrize("command", COMMANDS)
def test_an_option_takes_one_line_or_two_in_a_narrow_terminal(command, width, most):
    options = {name: lines for panel in panels(command, width).values() for name, lines in panel.items()}
    declared = [option for each in GROUP.commands[command].params for option in each.opts if option.startswith("--")]
    assert {*declared, "--help"} <= options.keys()
    assert {name: lines for name, lines in options.items() if lines > most} == {}


@pytest.mark.parametrize("command", COMMANDS)
def test_options_are_in_groups(command):
    found = panels(command, 80)
    assert all(len(options) <= 9 for options in found.values()), found
    if command == "run":
        assert list(found) == ["Options", "Model", "Training", "Output", "Recording", "Filtering"]
    if command == "filter":
        assert list(found) == ["Arguments", "Options", "Filtering", "Reviewed rows", "Rows"]


@pytest.mark.parametrize("width", [80, 120])
def test_commands_are_listed_in_the_order_of_their_use(width):
    found = panels("", width)
    assert {name: list(commands) for name, commands in found.items() if name != "Options"} == {
        "Start": ["demo", "run", "score"],
        "Look": ["show", "report", "review"],
        "Decide": ["filter", "export"],
        "Check": ["doctor"],
    }
    assert {lines for commands in found.values() for lines in commands.values()} == {1}


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_examples_can_be_typed(command):
    lines = help_of(command, 80).split("Example:")[1].split("╭")[0].splitlines()
    joined = re.sub(r"\\\s*\n", " ", "\n".join(line.rstrip() for line in lines))
    examples = [shlex.split(line) for line in joined.splitlines() if line.strip().startswith("forgetfilter ")]
    assert examples and all(each[1] == command for each in examples if command)
    for _, name, *arguments in examples:
        parsed = GROUP.commands[name].make_context(name, arguments)  # raises for unknown options and missing values
        if name == "run":
            assert all(parsed.params[each] for each in ("model", "noisy", "safety", "output"))


def test_defaults_are_shown():
    for command, shown in (
        ("run", [f"[default: ({DEFAULT_MEASURE})]", "[default: (auto)]", "[default: (context of the model)]"]),
        ("filter", [f"[default: ({DEFAULT_MEASURE})]", "[default: (auto)]", "[default: (0.1)]"]),
        ("show", ["[default: 10]"]),
    ):
        assert all(default in help_of(command, 120) for default in shown)


@pytest.mark.parametrize("command", ["run", "show", "report", "filter", "export"])
def test_the_help_of_the_measure_names_all_measures(command):
    (described,) = re.findall(r"--measure +MEASURE +(\S+)", help_of(command, 80))
    assert described.split("|") == list(MEASURES)
