"""Record the noisy set while a `Trainer` runs: when to record, which session a run is, what to log."""
