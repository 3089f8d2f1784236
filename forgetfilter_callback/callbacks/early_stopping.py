"""Stop the safety session early: watch whether the ranking of forgetting has become stable on a few samples."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.logging import get_logger
from scipy.stats import spearmanr
from transformers import TrainerState, TrainingArguments

from ..data.encoded_rows import EncodedRows
from ..errors import TraceError
from ..measures.common import mean_losses
from ..trace.records import Record
from ..trace.superseded import supersede
from ..trace.trace import Trace
from ..utils.atomic_files import write_json
from ..utils.counted import counted_of
from ..utils.distributed import run_on_main


logger = get_logger(__name__)

# A tenth of the samples is monitored, so that a check is cheap compared with a record. Below MIN_SAMPLES a rank
# correlation is not meaningful.
MAX_SAMPLES, MONITORED_FRACTION, MIN_SAMPLES = 128, 0.1, 20
# Rankings still change before this step, so earlier checks would not pay off.
FIRST_CHECK = 4
# The ranking is stable if, at two checks in a row, its Spearman correlation with the check at half the steps is at least
# STABLE_CORRELATION and forgetting has at least the standard deviation MIN_SPREAD (nats per token). With a smaller spread,
# safety finetuning has hardly changed the model yet.
STABLE_CORRELATION, STABLE_CHECKS, MIN_SPREAD = 0.95, 2, 0.02


def steps_since_warmup(args: TrainingArguments, state: TrainerState) -> int:
    """Number of optimizer steps since the end of the warm-up; 0 during it."""
    return max(0, state.global_step - args.get_warmup_steps(state.max_steps))


def is_check_step(step: int) -> bool:
    """Whether there is a check `step` steps after the warm-up: at 4, 6, 8, 12, 16, 24, …

    From step 8 on, there was also a check at half the steps. In a measured session of 40 steps, checks at powers of two only
    would have stopped at step 32, these at step 16.
    """
    return step >= FIRST_CHECK and (step.bit_count() == 1 or (step % 3 == 0 and (step // 3).bit_count() == 1))


def _read_checks(file: Path) -> list[dict[str, Any]]:
    """The stored checks, each with `step`, `spearman` and `forgetting`."""
    if not file.exists():
        return []
    try:
        checks = [dict(check) for check in json.loads(file.read_text(encoding="utf-8"))]
        for check in checks:
            is_valid = isinstance(check["step"], int) and isinstance(check["spearman"], float | None)
            if not is_valid or np.array(check["forgetting"], dtype=np.float64).ndim != 1:
                raise ValueError(f"the check at step {check['step']!r} has a value of a wrong type")
    except (OSError, TypeError, ValueError, KeyError) as error:
        raise TraceError(
            f"{file} is damaged ({type(error).__name__}: {error}). Move it to another folder: the checks of early stopping "
            "then start again."
        ) from error
    return checks


def monitored_samples(samples: int) -> int:
    """How many of `samples` samples are monitored."""
    return min(samples, MAX_SAMPLES, max(MIN_SAMPLES, math.ceil(MONITORED_FRACTION * samples)))


class RankingMonitor:
    """Follows the ranking of a fixed subset of the samples during the safety session.

    Its checks are stored in `early_stopping.json` in the trace's folder, so that a resumed session continues with them.

    Args:
        trace ([`Trace`]):
            A trace with a record at step 0 of the safety session.
        step (`int`):
            Number of steps since the warm-up. Stored checks after this step are moved to `superseded`.

    Attributes:
        rows ([`EncodedRows`]):
            The samples to score for [`check`]: those with the smallest ids whose loss at step 0 is finite. Ids are hashes,
            so the choice is fixed and does not depend on the content of the rows.

    Raises:
        TraceError: if `early_stopping.json` is damaged.
    """

    def __init__(self, trace: Trace, step: int):
        losses_before = run_on_main(partial(trace.mean_losses, Record("safety", 0)))
        scorable = np.flatnonzero(np.isfinite(losses_before))
        ids = trace.rows.ids.take(scorable).to_numpy(zero_copy_only=False)
        samples = np.sort(scorable[np.argsort(ids)[: monitored_samples(len(scorable))]])
        self.rows: EncodedRows = trace.rows.select(samples)
        if len(samples) < MIN_SAMPLES:
            logger.warning(
                f"`stop_early` has no effect: {counted_of(len(samples), len(trace.rows), 'row', 'have')} a finite loss, "
                f"and a ranking of fewer than {MIN_SAMPLES} is not meaningful. The safety session runs to its end."
            )
        self._losses_before = losses_before[samples]
        self._file = trace.folder / "early_stopping.json"
        stored = run_on_main(partial(_read_checks, self._file))
        self._checks = [
            check
            for check in stored
            if is_check_step(check["step"]) and check["step"] <= step and len(check["forgetting"]) == len(self.rows)
        ]
        if len(self._checks) < len(stored):
            run_on_main(partial(self._supersede_checks, trace.folder))

    def _supersede_checks(self, folder: Path) -> None:
        """Keep the stored checks that this run does not continue with in `superseded`."""
        supersede(folder, [], [self._file])
        write_json(self._checks, self._file)

    def check(self, step: int, losses: np.ndarray) -> bool:
        """Add a check and return whether the ranking is stable.

        Args:
            step (`int`):
                Number of steps since the warm-up.
            losses (`np.ndarray` of shape `(loss_tokens,)`):
                Losses of the tokens of `rows`, in nats.
        """
        forgetting = mean_losses(losses, self.rows.loss_offsets) - self._losses_before
        correlation = None
        earlier = [np.array(check["forgetting"]) for check in self._checks if 2 * check["step"] == step]
        if earlier:
            finite = np.isfinite([earlier[0], forgetting]).all(axis=0)
            if finite.sum() >= MIN_SAMPLES and np.std(forgetting[finite]) >= MIN_SPREAD:
                correlation = float(spearmanr(earlier[0][finite], forgetting[finite]).statistic)
        self._checks.append({"step": step, "spearman": correlation, "forgetting": forgetting.tolist()})
        run_on_main(partial(write_json, self._checks, self._file))
        latest = [check["spearman"] for check in self._checks[-STABLE_CHECKS:]]
        return len(latest) == STABLE_CHECKS and all(
            value is not None and value >= STABLE_CORRELATION for value in latest
        )
