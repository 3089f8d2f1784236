"""[`RunConfig`]: the settings of `forgetfilter run`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from ..errors import DataError
from ..filtering.config import FilterConfig, filter_config_or_default
from ..utils.argument_checks import check_max_length, check_record_steps
from ..utils.atomic_files import write_text


Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass
class RunConfig:
    """Settings of [`run`] and `forgetfilter run`, and of the `config.yaml` that both write.

    Args:
        model (`str`):
            Hub id or folder of the aligned base model.
        noisy (`str`):
            The finetuning data: a JSONL, JSON, CSV or Parquet file, a `save_to_disk` folder, or a Hub id.
        safety (`str`):
            Safe examples that are not in the noisy set, in the same formats.
        output (`str`):
            Output folder.
        refit (`bool`, defaults to `False`):
            Whether to finetune the base model on the kept rows and save it to `output/model`.
        training (`dict`, *optional*):
            Any field of [`~transformers.TrainingArguments`], for both sessions and the refit, except `output_dir`,
            `resume_from_checkpoint` and `push_to_hub`. By default `num_train_epochs=3`, `learning_rate=2e-4` (5e-5 without
            LoRA) and 4 rows per step and process: `per_device_train_batch_size=4`, or on a CPU
            `per_device_train_batch_size=1` and `gradient_accumulation_steps=4` unless one of the two is set.
            `num_train_epochs` and `max_steps` do not apply to the safety session.
        safety_training (`dict`, *optional*):
            Fields of `TrainingArguments` that differ in the safety session. By default `num_train_epochs=2`, and without
            LoRA `learning_rate=2e-5` unless `training` has a learning rate.
        use_lora (`bool`, defaults to `True`):
            Whether to train a LoRA adapter. Otherwise all weights are finetuned.
        lora (`dict`, *optional*):
            Any field of [`~peft.LoraConfig`]. By default `r=8`, `lora_alpha=2 * r` and `lora_dropout=0.05`, on all linear
            layers.
        resume (`bool`, defaults to `False`):
            Whether to continue an interrupted run in `output` from its last checkpoints, with the same settings. The run
            must save checkpoints, for example with `training={"save_strategy": "epoch"}`. A complete run is not trained
            again: its stored result is returned.
        overwrite (`bool`, defaults to `False`):
            Whether to replace an earlier run on the same rows in `output`. Its outputs, model and checkpoints are deleted,
            and other files are kept. Its records are kept in the folder `superseded` of the trace.
        max_length (`int`, *optional*):
            Longer rows are truncated on the right. Defaults to the context of the model.
        dtype (`"auto"`, `"float32"`, `"bfloat16"` or `"float16"`, defaults to `"auto"`):
            Data type of the model.
        stop_early (`bool`, defaults to `False`):
            Whether to stop the safety session once the ranking of forgetting is stable; see [`ForgetTracker`].
        record_base (`bool`, defaults to `True`):
            Whether to record all rows under the base model, or only 32; see [`ForgetTracker`].
        record_steps (`float`, *optional*):
            Also take a record every `record_steps` steps. Below 1, it is a fraction of a session.
        source_column (`str`, *optional*):
            A column of the noisy set that says where a row came from. `card.md` and later commands show how many rows of
            each source are kept and removed.
        filter (`FilterConfig`, *optional*):
            Which rows are removed: `measure`, `threshold` and `fraction`.

    Raises:
        TypeError: if `filter` is not a [`FilterConfig`].
        ValueError: if a required setting is missing, or if a value is out of range.
    """

    model: str = field(
        default="", metadata={"help": "Aligned base model: a Hub id or a folder. Required.", "metavar": "MODEL"}
    )
    noisy: str = field(
        default="",
        metadata={"help": "Finetuning data: JSONL, JSON, CSV, Parquet or a Hub id. Required.", "metavar": "ROWS"},
    )
    safety: str = field(
        default="", metadata={"help": "Safe examples that are not in the noisy set. Required.", "metavar": "ROWS"}
    )
    output: str = field(default="", metadata={"help": "Output folder. Required.", "metavar": "FOLDER"})
    refit: bool = field(
        default=False, metadata={"help": "Also finetune on the kept rows, into OUTPUT/model.", "group": "Model"}
    )
    training: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "Any TrainingArguments field. Repeatable.",
            "metavar": "FIELD=VALUE",
            "group": "Training",
        },
    )
    safety_training: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "Fields that differ in safety finetuning. Repeatable.",
            "metavar": "FIELD=VALUE",
            "group": "Training",
        },
    )
    use_lora: bool = field(default=True, metadata={"help": "Train an adapter, not all weights.", "group": "Model"})
    lora: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "Any LoraConfig field. Repeatable.", "metavar": "FIELD=VALUE", "group": "Model"},
    )
    resume: bool = field(
        default=False,
        metadata={"help": "Continue the run in OUTPUT, if it is not complete.", "group": "Output"},
    )
    overwrite: bool = field(
        default=False, metadata={"help": "Delete the earlier run on the same rows in OUTPUT first.", "group": "Output"}
    )
    max_length: int | None = field(
        default=None,
        metadata={
            "help": "Truncate longer rows.",
            "metavar": "TOKENS",
            "default": "context of the model",
            "group": "Training",
        },
    )
    dtype: Dtype = field(
        default="auto",
        metadata={"help": "auto, float32, bfloat16 or float16.", "metavar": "DTYPE", "group": "Training"},
    )
    stop_early: bool = field(
        default=False, metadata={"help": "End safety finetuning once the ranking is stable.", "group": "Recording"}
    )
    record_base: bool = field(
        default=True, metadata={"help": "Record all rows under the base model.", "group": "Recording"}
    )
    record_steps: float | None = field(
        default=None,
        metadata={
            "help": "Also record every N steps. Below 1: a fraction.",
            "metavar": "N",
            "group": "Recording",
        },
    )
    source_column: str | None = field(
        default=None,
        metadata={"help": "Source of a row, for counts by source.", "metavar": "COLUMN"},
    )
    filter: FilterConfig = field(default_factory=FilterConfig)

    def __post_init__(self) -> None:
        missing = [f"`{name}`" for name in ("model", "noisy", "safety", "output") if not getattr(self, name)]
        if missing:
            raise ValueError(f"Missing settings: {', '.join(missing)}.")
        for names, kind, described in (
            (("model", "noisy", "safety", "output"), str, "text"),
            (("refit", "use_lora", "resume", "overwrite", "stop_early", "record_base"), bool, "true or false"),
            (("training", "safety_training", "lora"), dict, "a mapping of names to values"),
        ):
            for name in names:
                if not isinstance(getattr(self, name), kind):
                    raise ValueError(f"{name}={getattr(self, name)!r} must be {described}.")
        if not (self.source_column is None or isinstance(self.source_column, str)):
            raise ValueError(f"source_column={self.source_column!r} must be text.")
        check_record_steps(self.record_steps)
        check_max_length(self.max_length)
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"dtype={self.dtype!r} is unknown. Choose auto, float32, bfloat16 or float16.")
        self.filter = filter_config_or_default(self.filter, "filter")
        if self.filter.measure == "rouge1":
            raise ValueError("measure='rouge1' needs generation. Use `ForgetTracker(rouge1=True)` in Python.")
        if self.filter.measure == "relative" and not self.record_base:
            raise ValueError("measure='relative' needs all rows under the base model. Leave out `record_base=False`.")
        if any(setting is not None for setting in (self.filter.decision, self.filter.reviewed, self.filter.step)):
            raise ValueError(
                "`decision`, `reviewed` and `step` need a finished run. Use `forgetfilter filter` afterwards."
            )
        if self.resume and self.overwrite:
            raise ValueError("`resume` continues an earlier run and `overwrite` replaces it. Pass one of them.")
        if self.lora and not self.use_lora:
            raise ValueError("`lora` has settings, but this run trains all weights and no adapter. Leave out `lora`.")
        for name in ("training", "safety_training"):
            for setting, advice in (
                ("output_dir", "the sessions are saved in OUTPUT/sessions"),
                ("resume_from_checkpoint", "use `resume`"),
                ("push_to_hub", "it would also publish the models that have learned the unsafe rows"),
            ):
                if setting in getattr(self, name):
                    raise ValueError(f"`{name}` must not contain {setting}: {advice}.")

    def to_dict(self) -> dict[str, Any]:
        """The settings of a new run: without access tokens, `resume` and `overwrite`."""
        settings = dataclasses.asdict(self)
        del settings["resume"], settings["overwrite"]
        settings["filter"] = {name: settings["filter"][name] for name in ("measure", "threshold", "fraction")}
        for section in ("training", "safety_training"):
            settings[section] = {key: value for key, value in settings[section].items() if not key.endswith("_token")}
        return settings

    def save(self, file: Path) -> None:
        """Write the settings as YAML, for `forgetfilter run --config`. Access tokens are left out."""
        write_text(yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True), file)

    def check_same_as(self, file: Path) -> None:
        """Check that a resumed run has the settings that an earlier run saved in `file`.

        Raises:
            DataError: if the file cannot be read.
            ValueError: if a setting differs.
        """
        try:
            saved = dict(yaml.safe_load(file.read_text(encoding="utf-8")))
        except (OSError, TypeError, ValueError, yaml.YAMLError) as error:
            raise DataError(f"{file} is damaged, so the run cannot be resumed: {error}") from error
        defaults = {
            each.name: each.default for each in dataclasses.fields(self)
        }  # of settings that are newer than the run
        changed = [
            name
            for name, value in self.to_dict().items()
            if name != "output" and saved.get(name, defaults[name]) != value
        ]
        if changed:
            raise ValueError(
                f"A resumed run must have the settings in {file}, but these differ: {', '.join(changed)}. Pass the same "
                "settings, or start a new run in another output folder."
            )
