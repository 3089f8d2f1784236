"""Which settings are options of commands, and messages that name them.

The library names its arguments in errors and warnings. On the command line, users have to type options instead.
"""

from __future__ import annotations

import dataclasses
import re
import shlex

from ..pipeline.run_config import RunConfig


RUN_OPTIONS = tuple(each.name for each in dataclasses.fields(RunConfig) if each.name != "filter")
RUN_FILTER_OPTIONS = ("measure", "threshold", "fraction")
PAGE_FILTER_OPTIONS = (*RUN_FILTER_OPTIONS, "decision", "reviewed", "level")
ALL_FILTER_OPTIONS = (*PAGE_FILTER_OPTIONS, "step")
_QUOTE = "'"
_NAMES = "|".join((*RUN_OPTIONS, *ALL_FILTER_OPTIONS, "random_fraction"))
# Without quotes, "step=4" can be the name of a folder. It is an argument only if one of these words follows.
_VALUE = r"'[^']*'|[\w.+-]+(?=`| must | is invalid| has an effect )"
_ARGUMENT = re.compile(rf"(?<=`)({_NAMES})(?=`)|(?<![^\s`])({_NAMES})=({_VALUE})")


def with_option_names(message: str) -> str:
    """Replace arguments of Python by options, such as `resume` by `--resume`, and threshold='fdr' by --threshold fdr."""
    return _ARGUMENT.sub(_as_option, message)


def _as_option(found: re.Match[str]) -> str:
    name, name_of_value, value = found.groups()
    option = (name or name_of_value).replace("_", "-")
    if value == "False":
        return f"--no-{option}"
    option = f"--{option}"
    return option if value in (None, "True") else f"{option} {shlex.quote(value.strip(_QUOTE))}"
