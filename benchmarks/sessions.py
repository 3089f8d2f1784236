"""Finetuning sessions on a scenario, with a cache of adapters, traces and scores.

Each session runs once. Adapters are cached under a hash of the training rows, so arms that train on the same rows share
one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from datasets import Dataset
from peft import PeftModel
from peft.utils import load_peft_weights, set_peft_model_state_dict
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from forgetfilter_callback import FilterResult, ForgetTracker, Trace, encode_rows, find_forgotten
from forgetfilter_callback.cli.demo_data import trainable
from forgetfilter_callback.cli.demo_model import demo_arguments, load_base
from forgetfilter_callback.data.tokenizers import padding_collator
from forgetfilter_callback.measures.rouge import rouge1
from forgetfilter_callback.scoring.generation import greedy_completions, split_prompts
from forgetfilter_callback.utils.atomic_files import write_json, write_text
from forgetfilter_callback.utils.model_state import preserve_state
from scenarios import DRAW, Row, Scenario, Sizes


# Options of several benchmarks.
DataDir = Annotated[Path | None, typer.Option(help="Folder of the data sets. Defaults to the Hub.")]
Scenarios = Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(DRAW)}; can be given several times.")]
Seeds = Annotated[list[int] | None, typer.Option(help="Seed; can be given several times.")]
NoisyRows = Annotated[int, typer.Option("--rows", help="Size of the noisy set.")]
Model = Annotated[str | None, typer.Option(help="Hub id or folder. Defaults to the packaged SmolLM2-135M.")]
Smoke = Annotated[bool, typer.Option("--smoke", help="Use a few rows and steps, as a quick check.")]
Cache = Annotated[Path, typer.Option(help="Folder in which sessions are cached.")]
Json = Annotated[Path, typer.Option("--json", help="The file for the results.")]
SIZES = Sizes()
SMOKE_SIZES = Sizes(noisy=24, safety=8, held_out=6, held_out_task=6)


@dataclass(frozen=True)
class Settings:
    """Training settings of all sessions. The LoRA settings are those of [`load_base`].

    Attributes:
        epochs (`int`): Epochs of noisy finetuning.
        learning_rate (`float`): Learning rate of noisy finetuning.
        safety_epochs (`int`): Epochs of safety finetuning.
        safety_learning_rate (`float`): Learning rate of safety finetuning.
        batch_size (`int`): Rows per batch.
        records (`float` or `None`):
            Interval between records of safety finetuning, as a fraction of the session. `None` records after
            1, 2, 4, 8, … steps.
    """

    epochs: int = 3
    learning_rate: float = 1e-3
    safety_epochs: int = 2
    safety_learning_rate: float = 3e-4
    batch_size: int = 4
    records: float | None = 0.25


SMOKE_SETTINGS = Settings(epochs=1, safety_epochs=1, records=1.0)


def earlier_results(json_file: Path) -> list[dict[str, Any]]:
    """Reads the results of earlier runs. Returns an empty list if there is no file."""
    return json.loads(json_file.read_text()) if json_file.exists() else []


def write_results(results: list[dict[str, Any]], json_file: Path) -> None:
    """Writes results atomically, one per line, with floats rounded to six decimals."""
    rounded = ({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()} for row in results)
    lines = ",\n".join(json.dumps(row, ensure_ascii=False, separators=(",", ":")) for row in rounded)
    write_text(f"[\n{lines}\n]\n", json_file)


class Doubling(TrainerCallback):
    """Makes a tracker record after 1, 2, 4, 8, … steps."""

    def __init__(self, tracker: ForgetTracker):
        self.tracker = tracker

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        step = state.global_step + 1
        self.tracker.record_steps = step if step.bit_count() == 1 else None


class Sessions:
    """The sessions of one scenario and seed, cached in `folder`.

    A session is named by its adapter: `"base"` is the base model (M0 in the paper) with an untrained adapter, `"noisy"`
    the model after noisy finetuning, and `"safety"` the model after safety finetuning.

    Args:
        folder (`Path`): The cache folder. It is created if it does not exist.
        scenario (`Scenario`): The rows.
        model (`str`, *optional*): Hub id or folder. Defaults to the packaged SmolLM2-135M.
        seed (`int`): Seed of the adapters and the trainers.
        settings (`Settings`): The training settings.
        sizes (`Sizes`): The sizes of the scenario, to detect a cache of other sizes.

    Raises:
        ValueError: if `folder` holds sessions with other settings.
    """

    def __init__(
        self, folder: Path, scenario: Scenario, model: str | None, seed: int, settings: Settings, sizes: Sizes
    ):
        made_with = json.loads(
            json.dumps({"model": model, "settings": dataclasses.asdict(settings), "sizes": dataclasses.asdict(sizes)})
        )
        settings_file = folder / "made_with.json"
        if settings_file.exists() and json.loads(settings_file.read_text()) != made_with:
            raise ValueError(
                f"{folder} holds sessions with other settings (see {settings_file}). Choose another --cache."
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_json(made_with, settings_file)
        self.folder = folder
        self.scenario = scenario
        self.model = model
        self.seed = seed
        self.settings = settings
        base_folder = folder.parent / "base-model"
        unpacked = str(base_folder) if model is None and (base_folder / "config.json").exists() else model
        self.load_model, self.tokenizer = load_base(base_folder, unpacked, seed)
        self.noisy = trainable(scenario.noisy, self.tokenizer)
        self.safety = trainable(scenario.safety, self.tokenizer)

    def base(self) -> PeftModel:
        """Loads the base model with an untrained adapter."""
        return self.load_model()

    def with_adapter(self, name: str) -> PeftModel:
        """Loads the base model with the adapter of a finished session."""
        model = self.load_model()
        set_peft_model_state_dict(model, load_peft_weights(str(self.folder / name), device="cpu"))
        return model

    def tracked(self) -> Trace:
        """Runs noisy and safety finetuning (adapters `"noisy"` and `"safety"`) with one tracker. Returns the trace."""
        folder = self.folder / "forgetfilter"
        if not self.has("noisy"):
            noisy_folder = self.noisy_session()
            shutil.copytree(noisy_folder / "forgetfilter", folder, dirs_exist_ok=True)
            shutil.copytree(noisy_folder / "noisy", self.folder / "noisy", dirs_exist_ok=True)
        if not self.has("safety"):
            tracker = ForgetTracker(trace_dir=folder, record_steps=self.settings.records)
            callbacks = [tracker, Doubling(tracker)] if self.settings.records is None else [tracker]
            self._train("safety", self.with_adapter("noisy"), self.safety, callbacks, safety=True)
        return Trace.open(folder)

    def noisy_session(self) -> Path:
        """Runs noisy finetuning. Scenarios that differ only in their safety set share the folder, which is returned."""
        settings = self.settings
        made_with = (self.model, self.seed, settings.epochs, settings.learning_rate, settings.batch_size)
        folder = self.folder.parent / f"noisy-{_digest(self.scenario.noisy, *made_with)}"
        if not self.has("noisy", folder):
            tracker = ForgetTracker(trace_dir=folder / "forgetfilter")
            self._train("noisy", self.load_model(), self.noisy, [tracker], folder)
        return folder

    def replay(self) -> str:
        """Finetunes the base model on the noisy and the safety set together. Returns the adapter's name."""
        return self.finetuned([*self.scenario.noisy, *self.scenario.safety])

    def kept(self, removed: np.ndarray) -> str:
        """Finetunes the base model on the rows that are not removed. Returns the adapter's name."""
        if not removed.any():
            return "noisy"
        return self.finetuned(
            [row for row, is_removed in zip(self.scenario.noisy, removed, strict=True) if not is_removed]
        )

    def finetuned(self, rows: Sequence[Row]) -> str:
        """Finetunes the base model on `rows`. Returns the adapter's name, which is a hash of the rows."""
        name = f"on-{len(rows)}-rows-{_digest(rows)}"
        if not self.has(name):
            self._train(name, self.load_model(), trainable(list(rows), self.tokenizer))
        return name

    def train_from(
        self,
        name: str,
        start: str,
        rows: Sequence[Row],
        callbacks: Sequence[TrainerCallback] = (),
        safety: bool = False,
    ) -> None:
        """Trains adapter `name` on `rows` from adapter `start`, with the settings of safety finetuning if `safety`."""
        if not self.has(name):
            model = self.base() if start == "base" else self.with_adapter(start)
            self._train(name, model, trainable(list(rows), self.tokenizer), callbacks, safety=safety)

    def filtered_round(self, number: int, start: str, rows: Sequence[Row]) -> tuple[str, FilterResult]:
        """Runs ForgetFilter on a round's rows from adapter `start`. Returns the adapter's name and the result."""
        tracker = ForgetTracker(trace_dir=self.folder / f"round-{number}-trace")
        noisy, safety, refit = (f"round-{number}-filter-{session}" for session in ("noisy", "safety", "refit"))
        self.train_from(noisy, start, rows, [tracker])
        self.train_from(safety, noisy, self.scenario.safety, [tracker], safety=True)
        trace = Trace.open(self.folder / f"round-{number}-trace")
        result = find_forgotten(trace)
        kept = [row for row, is_removed in zip(rows, result.removed, strict=True) if not is_removed]
        self.train_from(refit, start, kept)
        return refit, result

    def rouge1(self, name: str) -> np.ndarray:
        """Scores greedy completions of the noisy rows with adapter `name` by ROUGE-1, the paper's measure."""
        file = self.folder / f"rouge1-{name}.json"
        if not file.exists():
            model = self.with_adapter(name)
            rows = encode_rows(self.scenario.noisy, self.tokenizer, disable_tqdm=True)
            prompts, references = split_prompts(rows, self.tokenizer)
            started = time.perf_counter()
            with preserve_state(model):
                max_new_tokens = int(np.diff(rows.loss_offsets).max())
                completions = greedy_completions(model, self.tokenizer, prompts, max_new_tokens, disable_tqdm=True)
            scores = rouge1(completions, references).tolist()
            write_json({"rouge1": scores, "seconds": time.perf_counter() - started}, file)
        return np.array(json.loads(file.read_text())["rouge1"])

    def rouge1_seconds(self) -> float:
        """Returns the seconds that the completions before and after safety finetuning took."""
        files = [self.folder / f"rouge1-{name}.json" for name in ("noisy", "safety")]
        return sum(json.loads(file.read_text())["seconds"] for file in files)

    def has(self, name: str, folder: Path | None = None) -> bool:
        """Returns whether the cache contains adapter `name`."""
        return ((folder or self.folder) / name / "seconds.json").exists()

    def seconds(self, name: str) -> float:
        """Returns the seconds of a session, including the work of the tracker."""
        return json.loads((self.folder / name / "seconds.json").read_text())

    def judged(self, name: str, judge: Callable[..., dict[str, Any]], cue: bool = False) -> dict[str, Any]:
        """Returns the result of `judge` on the model with adapter `name`, from the cache if it is there."""
        file = self.folder / "judged" / f"{name}{'-cue' if cue else ''}.json"
        if not file.exists():
            model = self.base() if name == "base" else self.with_adapter(name)
            file.parent.mkdir(exist_ok=True)
            write_json(judge(model, self.tokenizer, self.scenario, cue), file)
        return json.loads(file.read_text(encoding="utf-8"))

    def _train(
        self,
        name: str,
        model: PeftModel,
        rows: Dataset,
        callbacks: Sequence[TrainerCallback] = (),
        folder: Path | None = None,
        safety: bool = False,
    ) -> None:
        args = dataclasses.replace(
            demo_arguments(self.folder / "trainer", self.seed),
            num_train_epochs=self.settings.safety_epochs if safety else self.settings.epochs,
            learning_rate=self.settings.safety_learning_rate if safety else self.settings.learning_rate,
            per_device_train_batch_size=self.settings.batch_size,
            logging_steps=25,
            disable_tqdm=True,
        )
        trainer = Trainer(
            model,
            args,
            train_dataset=rows,
            data_collator=padding_collator(self.tokenizer),
            processing_class=self.tokenizer,
            callbacks=list(callbacks),
        )
        started = time.perf_counter()
        trainer.train()
        folder = folder or self.folder
        model.save_pretrained(folder / name)
        write_json(time.perf_counter() - started, folder / name / "seconds.json")


def _digest(rows: Sequence[Row], *others: Any) -> str:
    texts = json.dumps([*((row["prompt"], row["completion"]) for row in rows), *others])
    return hashlib.blake2b(texts.encode(), digest_size=6).hexdigest()
