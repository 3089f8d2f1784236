"""Whether the ranking of forgetting has settled, so that S1+ may end: losses of a few samples, now and then."""

from __future__ import annotations

import json
import math
from functools import partial
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from ..data.encoded_rows import EncodedRows
from ..measures.common import mean_losses
from ..trace.records import Record
from ..trace.trace import Trace
from ..utils.atomic_files import write_json
from ..utils.distributed import run_on_main


# A tenth of the samples is followed, so that a check costs little beside a record, and no more than FOLLOWED_SAMPLES; with
# fewer than LEAST_SAMPLES a correlation says nothing.
FOLLOWED_SAMPLES, FOLLOWED_FRACTION, MIN_SAMPLES = 128, 0.1, 20
# Before this step rankings still change, and a check would not pay.
FIRST_CHECK = 4
# Settled: at two checks running, Spearman's correlation with the check at half as many steps was at least this, and
# forgetting had at least this standard deviation (nats per token): below it S1+ has done nothing yet.
STABLE_CORRELATION, STABLE_CHECKS, MIN_SPREAD = 0.95, 2, 0.02


def is_checked(step: int) -> bool:
    """Whether there is a check after so many steps since the warm-up: 4, 6, 8, 12, 16, 24, …

    Each but the first two has another at half as many steps. At powers of two alone, 40 steps ended at 32, not at 16.
    """
    return step >= FIRST_CHECK and (step.bit_count() == 1 or (step % 3 == 0 and (step // 3).bit_count() == 1))


def followed(samples: int) -> int:
    """How many of so many samples are followed."""
    return min(samples, FOLLOWED_SAMPLES, max(MIN_SAMPLES, math.ceil(FOLLOWED_FRACTION * samples)))


class RankingMonitor:
    """Follows the ranking of a fixed subsample through S1+. What it has seen lies in `early_stopping.json` beside the trace, so
    that a resumed session goes on with it.

    Args:
        trace ([`Trace`]):
            With the record of S1+ at step 0, which forgetting is measured from.
        step (`int`):
            Steps since the warm-up. Checks after this step, of a run that was cut off, are dropped.

    Attributes:
        rows ([`EncodedRows`]):
            The samples to score for [`check`]: those of the smallest ids, which are hashes, so the choice is fixed and has
            nothing to do with what the rows say.
    """

    def __init__(self, trace: Trace, step: int):
        offsets = trace.rows.loss_offsets
        scorable = np.flatnonzero(np.diff(offsets))
        ids = trace.rows.ids.take(scorable).to_numpy(zero_copy_only=False)
        samples = np.sort(scorable[np.argsort(ids)[: followed(len(scorable))]])
        self.rows: EncodedRows = trace.rows.select(samples)
        self._before = mean_losses(trace.token_losses(Record("safety", 0)), offsets)[samples]
        self._file = trace.folder / "settling.json"
        known: list[dict[str, Any]] = json.loads(self._file.read_text()) if self._file.exists() and step else []
        count = len(self.rows)
        self._checks = [
            check
            for check in known
            if is_checked(check["step"]) and check["step"] <= step and len(check["forgetting"]) == count
        ]

    def check(self, step: int, losses: np.ndarray) -> bool:
        """Notes the losses of the counted tokens of `rows` so many steps after the warm-up. Returns whether the ranking has
        settled."""
        forgetting = mean_losses(losses, self.rows.loss_offsets) - self._before
        correlation = None
        earlier = [check for check in self._checks if 2 * check["step"] == step]
        if earlier and len(forgetting) >= MIN_SAMPLES and np.nanstd(forgetting) >= MIN_SPREAD:
            correlation = float(spearmanr(earlier[0]["forgetting"], forgetting, nan_policy="omit").statistic)
        self._checks.append({"step": step, "spearman": correlation, "forgetting": forgetting.tolist()})
        run_on_main(partial(write_json, self._checks, self._file))
        last = [check["spearman"] for check in self._checks[-STABLE_CHECKS:]]
        return len(last) == STABLE_CHECKS and all(value is not None and value >= STABLE_CORRELATION for value in last)
