"""The progress bars of the demo: one for each stage, and one for the whole demo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments


BASE_ANSWERS = "Base model: answers"
NOISY = "Noisy finetuning"
NOISY_ANSWERS = "Noisy finetuning: answers"
SAFETY = "Safety finetuning"
REFIT = "Refit"
REFIT_ANSWERS = "Refit: answers"

# Seconds that each stage takes on two CPU cores with bfloat16. They are the weights of the bar of the whole demo.
SECONDS = {BASE_ANSWERS: 18, NOISY: 104, NOISY_ANSWERS: 14, SAFETY: 33, REFIT: 84, REFIT_ANSWERS: 14}


class DemoProgress(Progress):
    """Named progress bars. Use it as a context manager.

    Args:
        console ([`rich.console.Console`]):
            The console to draw on. Output of other code appears above the bars.
    """

    def __init__(self, console: Console):
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24, pulse_style="bar.back"),  # no pulse in bars that have not begun
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(compact=True),
            console=console,
        )
        self._bars = {stage: self.add_task(stage, start=False, total=1.0) for stage in SECONDS}
        self._whole = self.add_task("[bold]Whole demo", total=sum(SECONDS.values()))

    def begin(self, stage: str) -> Callable[[float], None]:
        """Starts the bar of a stage. Returns a function that sets the finished fraction, from 0 to 1."""
        self.start_task(self._bars[stage])
        before = sum(SECONDS[other] for other in list(SECONDS)[: list(SECONDS).index(stage)])

        def set_fraction(fraction: float) -> None:
            self.update(self._bars[stage], completed=fraction)
            self.update(self._whole, completed=before + fraction * SECONDS[stage])

        return set_fraction

    def train(self, stage: str, trainer: Trainer) -> None:
        """Trains with the bar of a stage instead of the trainer's own output."""
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_StepCallback(self.begin(stage)))
        trainer.train()


class _StepCallback(TrainerCallback):
    """Reports the finished fraction of the training steps."""

    def __init__(self, set_fraction: Callable[[float], None]):
        self._set_fraction = set_fraction

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._set_fraction(state.global_step / state.max_steps)
