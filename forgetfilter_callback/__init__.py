"""ForgetFilter for transformers' `Trainer`: find unsafe finetuning data by how fast it is forgotten."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .checkpoints import score_checkpoints
    from .config import RunConfig
    from .encoding import EncodedRows, EncodingError, NotOneSampleARow, encode_rows
    from .filtering import DecisionError, FilterResult, Review, decide, find_forgotten
    from .forgetting import MEASURES
    from .loading import DataError, load_rows
    from .pipeline import ForgetFilter
    from .review import write_review_page
    from .run import Plan, filter_rows, plan
    from .separability import Separability, separate
    from .trace import Record, Trace
    from .trace_files import TraceError
    from .tracker import ForgetTracker
    from .trainer import FilteredTrainer, filtered

# Where each name lives. Imported when first used: torch and transformers take seconds, and `forgetfilter --help` should not.
_MODULES = {
    "checkpoints": ("score_checkpoints",),
    "config": ("RunConfig",),
    "encoding": ("EncodedRows", "EncodingError", "NotOneSampleARow", "encode_rows"),
    "filtering": ("DecisionError", "FilterResult", "Review", "decide", "find_forgotten"),
    "forgetting": ("MEASURES",),
    "loading": ("DataError", "load_rows"),
    "pipeline": ("ForgetFilter",),
    "review": ("write_review_page",),
    "run": ("Plan", "filter_rows", "plan"),
    "separability": ("Separability", "separate"),
    "trace": ("Record", "Trace"),
    "trace_files": ("TraceError",),
    "tracker": ("ForgetTracker",),
    "trainer": ("FilteredTrainer", "filtered"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "MEASURES",
    "DataError",
    "DecisionError",
    "EncodedRows",
    "EncodingError",
    "FilterResult",
    "FilteredTrainer",
    "ForgetFilter",
    "ForgetTracker",
    "NotOneSampleARow",
    "Plan",
    "Record",
    "Review",
    "RunConfig",
    "Separability",
    "Trace",
    "TraceError",
    "decide",
    "encode_rows",
    "filter_rows",
    "filtered",
    "find_forgotten",
    "load_rows",
    "plan",
    "score_checkpoints",
    "separate",
    "write_review_page",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
