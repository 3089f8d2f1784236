"""TODO"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args


Session = Literal["noisy", "safety"]
SESSIONS: tuple[Session, ...] = get_args(Session)


@dataclass(frozen=True, order=True)
class Record:
    """Which checkpoint a record was taken at.

    Attributes:
        session (`"S1"` or `"S1+"`):
            Finetuning on the noisy set, or safety finetuning.
        step (`int`):
            Optimizer steps since the session began.
    """

    session: Session
    step: int

    @property
    def file_name(self) -> str:
        return f"{self.session}-{self.step:08d}.parquet"


def has_states(record: Record) -> bool:
    """Whether a record keeps the samples' states: those of M1 are wanted, where S1 ends and S1+ begins."""
    return (record.session == "noisy") == (record.step > 0)
