"""[`EncodedDataset`]: encoded rows as a dataset to train on, without a copy."""

from __future__ import annotations

import torch

from .encoded_rows import EncodedRows


class EncodedDataset(torch.utils.data.Dataset[dict[str, list[int]]]):
    """Encoded rows as a dataset to train on. It has the rows of [`EncodedRows.as_dataset`].

    Labels are made when a row is read. The columns of a [`~datasets.Dataset`] would take eight more bytes per token for
    them.

    Args:
        rows ([`EncodedRows`]):
            The rows.
    """

    def __init__(self, rows: EncodedRows):
        self.rows = rows
        self._is_padded = not rows.attention_mask.all()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        index = range(len(self))[index]  # a loop over the rows ends with this IndexError
        row = self.rows.between(index, index + 1)
        columns = {"input_ids": row.tokens.tolist(), "labels": row.labels.tolist()}
        if self._is_padded:
            columns["attention_mask"] = row.attention_mask.astype(int).tolist()
        return columns
