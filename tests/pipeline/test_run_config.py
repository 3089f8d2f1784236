"""RunConfig: settings that a run cannot use."""

from __future__ import annotations

import pytest

from forgetfilter_callback import FilterConfig, RunConfig


@pytest.mark.parametrize(
    "filter_config",
    [FilterConfig(decision="review_decision.json"), FilterConfig(reviewed="review"), FilterConfig(step=4)],
    ids=["decision", "reviewed", "step"],
)
def test_what_needs_a_finished_run_is_refused_before_training(filter_config):
    with pytest.raises(ValueError, match="need a finished run"):
        RunConfig("model", "noisy", "safety", "output", filter=filter_config)
