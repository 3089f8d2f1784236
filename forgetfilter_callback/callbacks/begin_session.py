"""Begin a session: decide which one a training run is, check that it fits the trace, and write it to the manifest."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import cast

from accelerate.logging import get_logger
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerState, TrainingArguments

from ..data.encoded_rows import EncodedRows
from ..trace.records import BASE_RECORD, Record, Session
from ..trace.trace import Trace
from ..utils.distributed import run_on_all, run_on_main
from .open_trace import model_and_tokenizer_names
from .session_rows import truncates_on_the_left
from .sessions import (
    DetectedSession,
    SessionArgument,
    check_session,
    detect_session,
    digest_of_rows,
    warn_if_noisy_session_is_unfinished,
)


logger = get_logger(__name__)


def begin_session(
    trace: Trace,
    requested: SessionArgument,
    training_rows: EncodedRows | None,
    finished_sessions: Sequence[Session],
    *,
    args: TrainingArguments,
    state: TrainerState,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
) -> DetectedSession:
    """Decide which session a training run is, and write it to the manifest of `trace`.

    Args:
        trace ([`Trace`]):
            The trace.
        requested (`"auto"`, `"noisy"` or `"safety"`):
            As `session` in [`ForgetTracker`].
        training_rows ([`EncodedRows`], *optional*):
            The rows the run trains on, if they could be encoded.
        finished_sessions (`Sequence[Session]`):
            The sessions that the tracker has recorded to their end.
        args, state, model, tokenizer:
            Of the trainer.

    Raises:
        TraceError: if the session does not fit the trace; see [`check_session`].
    """
    # All processes use the result of the first one.
    keep_end = truncates_on_the_left(args)
    detected = run_on_all(partial(detect_session, requested, training_rows, trace.rows, keep_end))[0]
    session, output_dir = detected.session, cast(str, args.output_dir)
    resumed = state.global_step > 0
    records = run_on_main(trace.records)
    already_recorded = session in finished_sessions and not resumed
    # Only the main process has the current manifest.
    run_on_main(
        partial(
            check_session,
            detected,
            training_rows,
            trace,
            records,
            output_dir=output_dir,
            already_recorded=already_recorded,
            resumed=resumed,
        )
    )
    digest = digest_of_rows(training_rows) if training_rows is not None else None
    begin = partial(trace.begin_session, session, output_dir, state.max_steps, digest, args.load_best_model_at_end)
    begun = run_on_main(begin)
    if session == "safety" and resumed and Record("safety", 0) not in records:
        logger.warning(
            f"The safety session resumes at step {state.global_step}, but the trace in {trace.folder} has no record of its "
            "step 0. Forgetting cannot be measured without it: start the safety session again to measure it."
        )
    if session == "safety" and "noisy" in begun:
        warn_if_noisy_session_is_unfinished(trace, records)
    has_base = "noisy" in begun or BASE_RECORD in records
    if not resumed and (session == "noisy" or not has_base):
        run_on_main(partial(trace.set_model, *model_and_tokenizer_names(model, tokenizer)))
    return detected
