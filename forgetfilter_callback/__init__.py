"""ForgetFilter for transformers' `Trainer`: find unsafe finetuning data by how fast a model forgets it."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .callbacks.tracker import ForgetTracker
    from .data.encode_text import encode_rows
    from .data.load_rows import load_rows
    from .errors import ForgetFilterError
    from .filtering.config import FilterConfig
    from .filtering.find_forgotten import find_forgotten
    from .filtering.result import FilterResult
    from .pipeline.checkpoints import score_checkpoints
    from .pipeline.export import to_dataset
    from .pipeline.forget_filter import ForgetFilter
    from .pipeline.run import run
    from .pipeline.run_config import RunConfig
    from .review.review_queue import ReviewQueue
    from .trace.trace import Trace
    from .trainers.filtered_sft_trainer import FilteredSFTTrainer
    from .trainers.filtered_trainer import FilteredTrainer, filtered

# Names are imported on first use: torch and transformers take seconds to import, and `forgetfilter --help` needs neither.
_MODULE_OF = {
    "FilterConfig": "filtering.config",
    "FilterResult": "filtering.result",
    "FilteredSFTTrainer": "trainers.filtered_sft_trainer",
    "FilteredTrainer": "trainers.filtered_trainer",
    "ForgetFilter": "pipeline.forget_filter",
    "ForgetFilterError": "errors",
    "ForgetTracker": "callbacks.tracker",
    "ReviewQueue": "review.review_queue",
    "RunConfig": "pipeline.run_config",
    "Trace": "trace.trace",
    "encode_rows": "data.encode_text",
    "filtered": "trainers.filtered_trainer",
    "find_forgotten": "filtering.find_forgotten",
    "load_rows": "data.load_rows",
    "run": "pipeline.run",
    "score_checkpoints": "pipeline.checkpoints",
    "to_dataset": "pipeline.export",
}

__all__ = [
    "FilterConfig",
    "FilterResult",
    "FilteredTrainer",
    "ForgetFilter",
    "ForgetFilterError",
    "ForgetTracker",
    "ReviewQueue",
    "RunConfig",
    "Trace",
    "encode_rows",
    "filtered",
    "find_forgotten",
    "load_rows",
    "run",
    "score_checkpoints",
    "to_dataset",
]


if find_spec("trl") is not None:  # FilteredSFTTrainer needs the extra `trl`
    __all__ += ["FilteredSFTTrainer"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("forgetfilter-callback")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
