"""Checks of arguments that several entry points accept."""

from __future__ import annotations

import dataclasses
import difflib
import math
from numbers import Integral, Real
from types import NoneType
from typing import Any, get_args, get_type_hints


_BOOLEAN_WORDS = ("true", "false", "yes", "no", "on", "off")


def check_record_steps(record_steps: float | None) -> None:
    """Check that `record_steps` is `None`, a whole number of steps, or a fraction of a session below 1.

    Raises:
        ValueError: if it is anything else.
    """
    if record_steps is None:
        return
    is_number = isinstance(record_steps, Real) and not isinstance(record_steps, bool)
    if not is_number or not (0 < record_steps < 1 or (record_steps >= 1 and record_steps % 1 == 0)):
        raise ValueError(
            f"record_steps={record_steps} is invalid. Use a whole number of optimizer steps, at least 1 (for example "
            "`record_steps=50`), or a fraction of the session between 0 and 1 (for example `record_steps=0.25`)."
        )


def check_positive(name: str, value: Any, whole: bool = False) -> None:
    """Check that `value` is a finite number larger than 0 and, with `whole`, an integer. Errors begin with `name`.

    Raises:
        ValueError: if it is anything else.
    """
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not 0 < value < math.inf or (whole and not isinstance(value, Integral)):
        raise ValueError(f"{name}={value!r} must be a {'whole' if whole else 'finite'} number larger than 0.")


def check_true_or_false(name: str, value: Any) -> None:
    """Check that `value` is `True` or `False`. The text "no" would count as true. Errors begin with `name`.

    Raises:
        ValueError: if it is anything else.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be True or False.")


def check_minimum(name: str, value: Any, minimum: int) -> None:
    """Check that `value` is `None` or an integer of at least `minimum`. Errors begin with `name`.

    Raises:
        ValueError: if it is anything else.
    """
    is_whole = isinstance(value, Integral) and not isinstance(value, bool)
    if value is not None and not (is_whole and value >= minimum):
        raise ValueError(f"{name}={value!r} must be a whole number of at least {minimum}.")


def check_max_length(max_length: int | None) -> None:
    """Check that `max_length` is `None` or an integer of at least 2, because nothing predicts the first token.

    Raises:
        ValueError: if it is anything else.
    """
    check_minimum("max_length", max_length, 2)


def check_fraction(name: str, value: Any) -> None:
    """Check that `value` is a number from 0 to 1. Errors begin with `name`.

    Raises:
        ValueError: if it is anything else.
    """
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= 1:
        raise ValueError(f"{name}={value!r} must be a number between 0 and 1.")


def check_fields(section: str, config_class: type[Any], settings: dict[str, Any]) -> None:
    """Check that settings are fields of a dataclass.

    Text is refused for fields whose type allows only numbers or Booleans: the text "False" would be true. Fields that
    allow a Boolean or certain names, such as `init_lora_weights`, refuse the words for true and false.

    Raises:
        ValueError: if there is no such field, or if a value is text. The message starts with `section`.
    """
    fields = [each.name for each in dataclasses.fields(config_class) if each.init]
    types = get_type_hints(config_class)
    for name, value in settings.items():
        if name not in fields:
            similar = difflib.get_close_matches(name, fields, n=1)
            suggestion = f" Did you mean {similar[0]}?" if similar else ""
            raise ValueError(f"{section}: {config_class.__name__} has no field {name}.{suggestion}")
        allowed = set(get_args(types[name]) or [types[name]]) - {NoneType}
        takes_no_text = allowed <= {bool, int, float}
        is_boolean_word = bool in allowed and str not in allowed and str(value).lower() in _BOOLEAN_WORDS
        if isinstance(value, str) and (takes_no_text or is_boolean_word):
            kind = "true or false" if bool in allowed else "a number"
            raise ValueError(f"{section}: {name}={value!r} must be {kind}.")
