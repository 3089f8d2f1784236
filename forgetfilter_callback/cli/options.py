"""Create command line options from the fields of a dataclass, and read settings from YAML."""

from __future__ import annotations

import dataclasses
import inspect
import json
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml


def options_from(
    config_class: type[Any], parameter: str, fields: tuple[str, ...]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replace one parameter of a command by options for fields of a dataclass.

    The command gets a dictionary with the options that were given on the command line, so that a YAML file or the
    dataclass can supply the others. The field's `metadata` has the option's "help" and, where needed, "metavar", "group"
    (the panel of the help) and "default" (in words, if the default is `None`).

    Args:
        config_class (`type`):
            A dataclass, such as [`RunConfig`] or [`FilterConfig`].
        parameter (`str`):
            The parameter of the command to replace.
        fields (`tuple[str, ...]`):
            The fields that become options.
    """
    field_types = typing.get_type_hints(config_class)
    by_name = {each.name: each for each in dataclasses.fields(config_class)}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        options = [_option(by_name[name], field_types[name]) for name in fields]

        def with_options(**arguments: Any) -> None:
            values = {name: arguments.pop(name) for name in fields}
            settings = {name: _parse(value) for name, value in values.items() if value is not None and value != []}
            command(**{parameter: settings}, **arguments)

        kept = [
            each for each in inspect.signature(command, eval_str=True).parameters.values() if each.name != parameter
        ]
        parameters = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in [*options, *kept]]
        with_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined] # read by typer
        with_options.__annotations__ = {each.name: each.annotation for each in parameters}
        with_options.__name__, with_options.__doc__ = command.__name__, command.__doc__
        return with_options

    return decorate


def _option(config_field: dataclasses.Field[Any], field_type: Any) -> inspect.Parameter:
    """An option whose default is "not given". The help shows the default of the field."""
    metadata = {"metavar": "", "group": None, "default": config_field.default, **config_field.metadata}
    default = metadata["default"]
    shown = str(default) if default not in (None, "", dataclasses.MISSING) and not isinstance(default, bool) else False
    option = typer.Option(
        help=metadata["help"], metavar=metadata["metavar"], show_default=shown, rich_help_panel=metadata["group"]
    )
    if typing.get_origin(field_type) is dict:
        option_type: Any = list[str]
    else:
        is_union = typing.get_origin(field_type) in (types.UnionType, typing.Union)
        members = (
            [member for member in typing.get_args(field_type) if member is not type(None)] if is_union else [field_type]
        )
        # Typer does not support unions. The dataclass converts and checks text.
        option_type = members[0] if len(members) == 1 else str
    return inspect.Parameter(
        config_field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[typing.Optional[option_type], option],  # noqa: UP045 # typer supports no `|`
    )


def _parse(value: Any) -> Any:
    """A list of `FIELD=VALUE` as a dictionary; any other value unchanged."""
    if not isinstance(value, list):
        return value
    settings = {}
    for item in value:
        name, equals, text = item.partition("=")
        if not equals:
            raise typer.BadParameter(f"{item!r} must be FIELD=VALUE, for example learning_rate=1e-3.")
        settings[name.replace("-", "_")] = parse_value(text)
    return settings


def parse_value(text: str) -> Any:
    """A value as JSON (`1e-3`, `true`, `["q_proj"]`) or Python writes it (`True`, `None`), or the text itself."""
    try:
        return json.loads({"True": "true", "False": "false", "None": "null"}.get(text, text))
    except json.JSONDecodeError:
        return text


def read_yaml(file: Path, config_class: type[Any]) -> dict[str, Any]:
    """Read settings from a YAML file.

    Raises:
        ValueError: if the file cannot be read, or if it contains an unknown setting.
    """
    settings = load_yaml(file)
    names = [each.name for each in dataclasses.fields(config_class)]
    if not isinstance(settings, dict):
        raise ValueError(f"{file} contains no settings. It must map names to values; the names are {names}.")
    unknown = sorted(map(str, set(settings) - set(names)))
    if unknown:
        raise ValueError(f"{file} contains unknown settings: {', '.join(unknown)}. Known settings: {', '.join(names)}.")
    return settings


def load_yaml(file: Path) -> Any:
    """The content of a YAML file.

    Raises:
        ValueError: if the file cannot be read.
    """
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}.") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def merge(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`settings` with `changes` on top. Dictionaries are merged too."""
    merged = dict(settings)
    for name, value in changes.items():
        both_dicts = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = {**merged[name], **value} if both_dicts else value
    return merged
