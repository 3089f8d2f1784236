"""Names of sessions and records: which losses a trace holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args


# Noisy finetuning and the safety finetuning that follows it (S1 and S1+ in the paper), in that order.
Session = Literal["noisy", "safety"]
SESSIONS: tuple[Session, ...] = get_args(Session)


@dataclass(frozen=True, order=True)
class Record:
    """The checkpoint at which the losses of all samples were recorded.

    Attributes:
        session (`"noisy"` or `"safety"`):
            The finetuning run.
        step (`int`):
            Number of optimizer steps since the session began.
    """

    session: Session
    step: int

    def __str__(self) -> str:
        return f"{self.session} session, step {self.step}"

    @property
    def file_name(self) -> str:
        """Name of the record's file in the `records` folder of a trace."""
        return f"{self.session}-{self.step:08d}.parquet"

    @property
    def has_states(self) -> bool:
        """Whether the record may store the samples' hidden states, which only step 0 of the safety session is read for.

        The last record of the noisy session stores them where the first record of the safety session can be a copy of it.
        Older versions stored them in all records of the noisy session but the first.
        """
        return (self.session == "noisy") == (self.step > 0)


# The base model. With `ForgetTracker(record_base=False)`, the record holds only a sample of the rows.
BASE_RECORD = Record("noisy", 0)
