"""The errors that this library raises on bad data. All are `ValueError`s, and so are errors of arguments out of range."""

from __future__ import annotations


class ForgetFilterError(ValueError):
    """Base class of the errors below. Each message says what is wrong, where, and what to do."""


class EncodingError(ForgetFilterError):
    """A row cannot be encoded as a sample. The message names the row."""


class UnsupportedDatasetError(EncodingError):
    """The losses of single rows cannot be followed: the dataset is packed, streamed, or has rows that are not one sample."""


class RandomRowsError(EncodingError):
    """A row changes each time it is read, so it has no fixed loss, and reading it would change training."""


class UnsupportedInputError(UnsupportedDatasetError):
    """The model is given more than tokens (images, token types, weights), or a mask or positions of another kind."""


class DataError(ForgetFilterError):
    """Rows, a tokenizer or a model are missing or cannot be loaded, or the rows do not belong to the values or the trace."""


class UnknownRowsError(DataError):
    """Too many rows have no forgetting value, so they are not the rows that were tracked."""


class ScoringError(ForgetFilterError):
    """The rows cannot be scored with this model on this device."""


class BrokenPassError(ScoringError):
    """A process failed in a forward pass that needs weights of other processes.

    The others are still waiting in that pass, so they cannot be told.
    """


class TraceError(ForgetFilterError):
    """A trace cannot be read, or does not hold the requested records."""


class DecisionError(ForgetFilterError):
    """A filter result or a reviewer's decision cannot be read or belongs to another trace, or would remove every row."""
