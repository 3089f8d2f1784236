"""Errors of the library name arguments of Python. On the command line they name what can be typed there."""

from __future__ import annotations

import logging
import re

import pytest
import typer
from helpers import call, refused

from forgetfilter_callback.cli.commands import app
from forgetfilter_callback.cli.messages import LogFormatter
from forgetfilter_callback.cli.option_names import ALL_FILTER_OPTIONS, RUN_OPTIONS, with_option_names


RUN = ("run", "--model", "a", "--noisy", "b", "--safety", "c", "--output", "d")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("show", "out", "--threshold", "fdr"), "--threshold fdr needs verdicts"),
        (("show", "out", "--threshold", 0.5, "--fraction", 0.1), "`--threshold` and `--fraction` exclude each other"),
        (("show", "out", "--level", 0.2), "--level 0.2 has an effect only with --threshold fdr."),
        (("show", "out", "--fraction", 2), "--fraction 2.0 must be between 0 and 1"),
        ((*RUN, "--resume", "--overwrite"), "`--resume` continues an earlier run and `--overwrite` replaces it"),
        ((*RUN, "--max-length", 1), "--max-length 1 must be a whole number"),
        ((*RUN, "--record-steps", 1.5), "(for example `--record-steps 50`)"),
        ((*RUN, "--training", "resume_from_checkpoint=x"), "resume_from_checkpoint: use `--resume`"),
        (("review", "OUT", "--random-fraction", 2), "--random-fraction 2.0 must be a number between 0 and 1."),
    ],
)  # fmt: skip
def test_errors_name_options(arguments, said, finished_run):
    result = call(*(finished_run if each == "OUT" else each for each in arguments))
    refused(result, said)
    assert not re.search(rf"`({'|'.join((*RUN_OPTIONS, *ALL_FILTER_OPTIONS))})[`=]", result.output)


def test_the_names_are_those_of_options():
    commands = typer.main.get_command(app).commands
    for command, names in (("run", RUN_OPTIONS), ("show", ALL_FILTER_OPTIONS)):
        options = {option for each in commands[command].params for option in each.opts}
        assert {with_option_names(f"`{name}`") for name in names} <= {f"`{option}`" for option in options}


@pytest.mark.parametrize(
    "text",
    [
        "Use `ForgetTracker(rouge1=True)` or `FilterConfig(measure='loss')`.",
        "training: learning_rate=0 must be larger than 0.",
        "/data/step=5/rows.jsonl cannot be read.",
        "step=100 contains no trace.",
        "The trace in my step=4 does not name the file of its rows.",
        "The trace in threshold=0.5 cannot be read.",
        "Run `forgetfilter filter --reviewed` or `forgetfilter run --resume`.",
        "The model forgets a step.",
    ],
)
def test_other_words_stay_as_they_are(text):
    assert with_option_names(text) == text


def test_values_can_be_typed():
    assert with_option_names("source_column='the source' is missing") == "--source-column 'the source' is missing"
    assert with_option_names("Pass `resume=True` to continue.") == "Pass `--resume` to continue."


def test_warnings_name_options_too():
    record = logging.makeLogRecord({"msg": "The row is too long. Lower `max_length`."})
    assert LogFormatter().format(record) == "The row is too long. Lower `--max-length`."
