"""The errors this library raises. All are `ValueError`s: each means that an input must change."""

from __future__ import annotations


class ForgetFilterError(ValueError):
    """Base class of the errors below. Each message says what is wrong, where, and what to do."""


class EncodingError(ForgetFilterError):
    """A row cannot be encoded as a sample. The message names the row."""


class UnsupportedDatasetError(EncodingError):
    """The losses of single rows cannot be followed: the dataset is packed, streamed, or has rows that are not one sample."""


class UnsupportedInputError(UnsupportedDatasetError):
    """The model is given more than tokens (images, token types, weights), or a mask or positions of another kind."""


class DataError(ForgetFilterError):
    """Rows, a tokenizer or a model cannot be loaded."""


class ScoringError(ForgetFilterError):
    """The rows cannot be scored with this model on this device."""


class BrokenPassError(ScoringError):
    """A process failed in a forward pass that needs weights of other processes. They wait for it and cannot be told."""


class TraceError(ForgetFilterError):
    """A trace cannot be read, or does not hold the requested records."""


class DecisionError(ForgetFilterError):
    """A filter result or a reviewer's decision cannot be read, or belongs to another trace."""
