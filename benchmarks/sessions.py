"""Finetuning sessions on a scenario, each run once: adapters, traces and judgements lie in a cache folder.

A session's adapter is found again by the rows that it was trained on, so arms that train on the same rows share it.
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
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from forgetfilter_callback import FilterResult, ForgetTracker, Trace, encode_rows, find_forgotten
from forgetfilter_callback.cli.demo_data import trainable
from forgetfilter_callback.cli.demo_model import demo_arguments, load_base
from forgetfilter_callback.measures.rouge import rouge1
from forgetfilter_callback.scoring.generation import greedy_completions, split_prompts
from forgetfilter_callback.utils.atomic_files import write_json, write_text
from forgetfilter_callback.utils.model_state import preserve_state
from scenarios import DRAW, Row, Scenario, Sizes


# Options that benchmarks share.
DataDir = Annotated[Path | None, typer.Option(help="Folder of the sets; by default they come from the Hub.")]
Scenarios = Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(DRAW)}; several times for several.")]
Seeds = Annotated[list[int] | None, typer.Option(help="Several times for several.")]
NoisyRows = Annotated[int, typer.Option("--rows", help="Of the noisy set.")]
Model = Annotated[str | None, typer.Option(help="Hub id or folder; by default the packaged SmolLM2-135M.")]
Smoke = Annotated[bool, typer.Option("--smoke", help="A few rows and steps, to see that it runs.")]
Cache = Annotated[Path, typer.Option(help="Where sessions are kept.")]
Json = Annotated[Path, typer.Option("--json", help="Where results go.")]
SIZES = Sizes()
SMOKE_SIZES = Sizes(noisy=24, safety=8, held_out=6, held_out_task=6)


@dataclass(frozen=True)
class Settings:
    """How all sessions train. LoRA with r=8, α=16 and dropout .05 on q_proj and v_proj, as the paper's."""

    epochs: int = 3
    learning_rate: float = 1e-3
    safety_epochs: int = 2
    safety_learning_rate: float = 3e-4
    batch_size: int = 4
    records: float | None = 0.25  # S1+ is recorded so often, as a share of it; None: after 1, 2, 4, 8, … steps


SMOKE_SETTINGS = Settings(epochs=1, safety_epochs=1, records=1.0)


def earlier_results(json_file: Path) -> list[dict[str, Any]]:
    """What earlier runs have measured; none if there is no file."""
    return json.loads(json_file.read_text()) if json_file.exists() else []


def write_results(results: list[dict[str, Any]], json_file: Path) -> None:
    """Writes results atomically, one a line, figures to six places."""
    rounded = ({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()} for row in results)
    lines = ",\n".join(json.dumps(row, ensure_ascii=False, separators=(",", ":")) for row in rounded)
    write_text(f"[\n{lines}\n]\n", json_file)


class Doubling(TrainerCallback):
    """Has a tracker record after 1, 2, 4, 8, … steps."""

    def __init__(self, tracker: ForgetTracker):
        self.tracker = tracker

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        step = state.global_step + 1
        self.tracker.record_steps = step if step.bit_count() == 1 else None


class Sessions:
    """The sessions of one scenario and seed, in `folder`.

    Args:
        folder (`Path`): The cache; made if it is not there.
        scenario (`Scenario`): The rows.
        model (`str`, *optional*): Hub id or folder; by default the packaged SmolLM2.
        seed (`int`): Of the adapters and the trainers.
        settings (`Settings`): How to train.
        sizes (`Sizes`): What the scenario was drawn with, to tell caches apart.
    """

    def __init__(
        self, folder: Path, scenario: Scenario, model: str | None, seed: int, settings: Settings, sizes: Sizes
    ):
        made_with = json.loads(
            json.dumps({"model": model, "settings": dataclasses.asdict(settings), "sizes": dataclasses.asdict(sizes)})
        )
        note = folder / "made_with.json"
        if note.exists() and json.loads(note.read_text()) != made_with:
            raise ValueError(f"{folder} holds sessions with other settings ({note}). Name another --cache.")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(made_with, note)
        self.folder = folder
        self.scenario = scenario
        self.model = model
        self.seed = seed
        self.settings = settings
        base = folder.parent / "base-model"
        unpacked = str(base) if model is None and (base / "config.json").exists() else model
        self.load_model, self.tokenizer = load_base(base, unpacked, seed)
        self.noisy = trainable(scenario.noisy, self.tokenizer)
        self.safety = trainable(scenario.safety, self.tokenizer)

    def base(self) -> PeftModel:
        """M0, with an adapter that has learnt nothing."""
        return self.load_model()

    def with_adapter(self, name: str) -> PeftModel:
        """M0 with the adapter of an earlier session."""
        model = self.load_model()
        set_peft_model_state_dict(model, load_peft_weights(str(self.folder / name), device="cpu"))
        return model

    def tracked(self) -> Trace:
        """S1 and S1+ with one tracker: adapters `s1` and `s1plus`, and the trace of both."""
        folder = self.folder / "forgetfilter"
        if not self.has("s1"):
            learnt = self.learnt()
            shutil.copytree(learnt / "forgetfilter", folder, dirs_exist_ok=True)
            shutil.copytree(learnt / "s1", self.folder / "s1", dirs_exist_ok=True)
        if not self.has("s1plus"):
            tracker = ForgetTracker(trace_dir=folder, record_steps=self.settings.records)
            callbacks = [tracker, Doubling(tracker)] if self.settings.records is None else [tracker]
            self._train("s1plus", self.with_adapter("s1"), self.safety, callbacks, safety=True)
        return Trace.open(folder)

    def learnt(self) -> Path:
        """S1, in a folder that scenarios share which differ in their safety set alone."""
        settings = self.settings
        made_with = (self.model, self.seed, settings.epochs, settings.learning_rate, settings.batch_size)
        learnt = self.folder.parent / f"s1-{_digest(self.scenario.noisy, *made_with)}"
        if not self.has("s1", learnt):
            tracker = ForgetTracker(trace_dir=learnt / "forgetfilter")
            self._train("s1", self.load_model(), self.noisy, [tracker], learnt)
        return learnt

    def replay(self) -> str:
        """The safety set mixed into S1. Returns the adapter's name."""
        return self.finetuned([*self.scenario.noisy, *self.scenario.safety])

    def kept(self, removed: np.ndarray) -> str:
        """M0 finetuned on the rows that are not removed. Returns the adapter's name; `s1` if none is."""
        if not removed.any():
            return "s1"
        return self.finetuned([row for row, gone in zip(self.scenario.noisy, removed, strict=True) if not gone])

    def finetuned(self, rows: Sequence[Row]) -> str:
        """M0 finetuned on other rows. Returns the adapter's name, which is a hash of the rows."""
        name = f"on-{len(rows)}-rows-{_digest(rows)}"
        if not self.has(name):
            self._train(name, self.load_model(), trainable(list(rows), self.tokenizer))
        return name

    def go_on(
        self,
        name: str,
        start: str,
        rows: Sequence[Row],
        callbacks: Sequence[TrainerCallback] = (),
        safety: bool = False,
    ) -> None:
        """A session from an earlier one's model (`base`: from M0), as adapter `name`; trained like S1+ if `safety`."""
        if not self.has(name):
            model = self.base() if start == "base" else self.with_adapter(start)
            self._train(name, model, trainable(list(rows), self.tokenizer), callbacks, safety=safety)

    def filtered_round(self, number: int, start: str, rows: Sequence[Row]) -> tuple[str, FilterResult]:
        """ForgetFilter on a round's rows, from the model of the rounds before. Returns its adapter and the decision."""
        tracker = ForgetTracker(trace_dir=self.folder / f"round-{number}-trace")
        learnt, safe, name = (f"round-{number}-filter-{part}" for part in ("s1", "s1plus", "refit"))
        self.go_on(learnt, start, rows, [tracker])
        self.go_on(safe, learnt, self.scenario.safety, [tracker], safety=True)
        trace = Trace.open(self.folder / f"round-{number}-trace")
        result = find_forgotten(trace)
        kept = [row for row, gone in zip(rows, result.removed, strict=True) if not gone]
        self.go_on(name, start, kept)
        return name, result

    def rouge1(self, name: str) -> np.ndarray:
        """ROUGE-1 of greedy completions of the noisy rows by the model with adapter `name`, as the paper measures."""
        file = self.folder / f"rouge1-{name}.json"
        if not file.exists():
            model = self.with_adapter(name)
            rows = encode_rows(self.scenario.noisy, self.tokenizer, disable_tqdm=True)
            prompts, references = split_prompts(rows, self.tokenizer)
            started = time.perf_counter()
            with preserve_state(model):
                longest = int(np.diff(rows.loss_offsets).max())
                completions = greedy_completions(model, self.tokenizer, prompts, longest, disable_tqdm=True)
            scores = rouge1(completions, references).tolist()
            write_json({"rouge1": scores, "seconds": time.perf_counter() - started}, file)
        return np.array(json.loads(file.read_text())["rouge1"])

    def rouge1_seconds(self) -> float:
        """How long the completions of M1 and of M2 took."""
        files = [self.folder / f"rouge1-{name}.json" for name in ("s1", "s1plus")]
        return sum(json.loads(file.read_text())["seconds"] for file in files)

    def has(self, name: str, folder: Path | None = None) -> bool:
        return ((folder or self.folder) / name / "seconds.json").exists()

    def seconds(self, name: str) -> float:
        """How long the session took, the tracker's work included."""
        return json.loads((self.folder / name / "seconds.json").read_text())

    def judged(self, name: str, judge: Callable[..., dict[str, Any]], cue: bool = False) -> dict[str, Any]:
        """What `judge` says of the model with adapter `name` (`base`: of M0)."""
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
            data_collator=DataCollatorForSeq2Seq(self.tokenizer),
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
