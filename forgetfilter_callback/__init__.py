"""ForgetFilter for transformers' `Trainer`: find unsafe finetuning data by how fast it is forgotten."""

from .encoding import EncodedRows, EncodingError, NotOneSampleARow, encode_rows
from .filtering import FilterResult, decide
from .forgetting import MEASURES
from .pipeline import ForgetFilter
from .separability import Separability, separate
from .trace import Record, Trace, TraceError
from .tracker import ForgetTracker
from .trainer import FilteredTrainer, filtered


__all__ = [
    "MEASURES",
    "EncodedRows",
    "EncodingError",
    "FilterResult",
    "FilteredTrainer",
    "ForgetFilter",
    "ForgetTracker",
    "NotOneSampleARow",
    "Record",
    "Separability",
    "Trace",
    "TraceError",
    "decide",
    "encode_rows",
    "filtered",
    "separate",
]
