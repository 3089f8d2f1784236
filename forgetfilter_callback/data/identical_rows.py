"""Apply what is known about a row to the rows that are trained on the same tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..utils.arrow_arrays import to_numpy
from .encoded_rows import content_hash, content_hashes


Label = TypeVar("Label", bound=str)
Content = TypeVar("Content", int, str)


def worst_labels(labels: Iterable[tuple[Content, Label]], worst: Label) -> dict[Content, Label]:
    """The label of each content: `worst` if one of its labels is, else the last one.

    Args:
        labels (`Iterable[tuple]`):
            Pairs of what identifies a content and one of two labels.
        worst (`str`):
            The label that counts where those of a content differ.

    Returns:
        `dict`: content to label.
    """
    found: dict[Content, Label] = {}
    for content, label in labels:
        found[content] = worst if found.get(content) == worst else label
    return found


def with_identical_rows(labels: Mapping[str, Label], ids: pa.StringArray, worst: Label) -> dict[str, Label]:
    """Apply labels to all rows that are trained on the same tokens.

    Args:
        labels (`Mapping[str, str]`):
            Sample id to one of two labels.
        ids (`pa.StringArray`):
            The sample ids of a set. Null ids have no label.
        worst (`str`):
            The label that counts where identical rows have different ones.

    Returns:
        `dict[str, str]`: labels of samples in `ids`. A sample without a label of its own has the label `worst` if an
        identical one has it.
    """
    by_content = worst_labels(((content_hash(id_), label) for id_, label in labels.items()), worst)
    contents = ((id_, content_hash(id_)) for id_ in ids.to_pylist() if id_ is not None)
    return {id_: labels.get(id_, by_content[content]) for id_, content in contents if content in by_content}


def places_in(ids: pa.StringArray, known_ids: pa.StringArray) -> pa.Int32Array:
    """Find rows in another set.

    Args:
        ids (`pa.StringArray` of length `samples`):
            The sample ids of the rows.
        known_ids (`pa.StringArray`):
            The sample ids of the other set.

    Returns:
        `pa.Int32Array` of length `samples`: the place of each row in `known_ids`. If a row is not there, it is the place of
        the first row that is trained on the same tokens. Null if there is none, and for null ids.
    """
    places = pc.index_in(ids, value_set=known_ids, skip_nulls=True)
    if places.null_count == ids.null_count:
        return places
    copies = pc.index_in(content_hashes(ids), value_set=content_hashes(known_ids), skip_nulls=True)
    return pc.coalesce(places, copies)


def content_numbers(ids: pa.StringArray) -> np.ndarray:
    """Number the distinct contents of rows.

    Args:
        ids (`pa.StringArray` of length `samples`):
            The sample ids of a set.

    Returns:
        `np.ndarray` of shape `(samples,)`, integer: equal for rows that are trained on the same tokens.
    """
    return to_numpy(pc.dictionary_encode(content_hashes(ids)).indices)
