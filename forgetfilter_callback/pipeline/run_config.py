"""Settings of a run: the same for `run` in Python, for `forgetfilter run`, and in the `config.yaml` that it writes."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from ..measures.names import DEFAULT_MEASURE, Measure
from ..thresholds import Threshold
from ..utils.atomic_files import write_text
from ..utils.validation import check_record_steps


@dataclass
class RunConfig:
    """Settings of [`run`], of `forgetfilter run` and of the `config.yaml` that both write.

    Raises:
        ValueError: if settings contradict each other or lie outside of what they can be.
    """

    model: str = field(default="", metadata={"help": "Hub id or folder of the aligned model, M0."})
    noisy: str = field(
        default="",
        metadata={"help": "Your finetuning data: JSONL, JSON, CSV or Parquet, a `save_to_disk` folder, or a Hub id."},
    )
    safety: str = field(default="", metadata={"help": "Safe examples, none of them in the noisy set; the same forms."})
    output: str = field(default="", metadata={"help": "Folder for the trace, the decision, kept and removed rows."})
    refit: bool = field(default=False, metadata={"help": "Finetune M0 again on the kept rows, into OUTPUT/model."})
    epochs: float = field(default=3.0, metadata={"help": "Epochs of S1 and of the refit."})
    safety_epochs: float = field(default=2.0, metadata={"help": "Epochs of S1+."})
    learning_rate: float = field(
        default=2e-4,
        metadata={"help": "Of S1 and of the refit (AdamW, linear decay); small models need more, say 1e-3."},
    )
    safety_learning_rate: float | None = field(
        default=None, metadata={"help": "Of S1+; by default the same. See the README on a gentle S1+."}
    )
    batch_size: int = field(default=4, metadata={"help": "Rows a step and device."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Batches a step."})
    lora_r: int = field(
        default=8, metadata={"help": "Rank of the adapter on all linear layers; 0 finetunes all weights."}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Longer rows are cut at the right; by default at the model's context."}
    )
    dtype: str = field(default="auto", metadata={"help": "Of the model: auto, float32, bfloat16, float16."})
    measure: Measure = field(
        default=DEFAULT_MEASURE, metadata={"help": "Which forgetting: loss, relative, pooled, smoothed."}
    )
    threshold: str = field(default="auto", metadata={"help": "φ, or auto."})
    fraction: float | None = field(
        default=None, metadata={"help": "Remove this share of the rows, the most forgotten, instead."}
    )
    stop_early: bool = field(default=False, metadata={"help": "End S1+ once the ranking has settled."})
    record_steps: float | None = field(
        default=None, metadata={"help": "Record also every so many steps; below 1, as a share of a session."}
    )
    seed: int = field(default=0, metadata={"help": "Of adapters and trainers."})

    def __post_init__(self) -> None:
        missing = [name for name in ("model", "noisy", "safety", "output") if not getattr(self, name)]
        if missing:
            raise ValueError(f"{', '.join(f'--{name}' for name in missing)} must be given.")
        for name in ("epochs", "safety_epochs", "learning_rate", "batch_size", "gradient_accumulation_steps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be larger than 0, and finite.")
        if self.safety_learning_rate is not None and not 0 < self.safety_learning_rate < math.inf:
            raise ValueError(f"safety_learning_rate={self.safety_learning_rate} must be larger than 0, and finite.")
        check_record_steps(self.record_steps)
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"max_length={self.max_length} leaves no token to predict.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed} must lie between 0 and 2³² − 1.")
        if self.lora_r < 0:
            raise ValueError(f"lora_r={self.lora_r} must be 0 or larger.")
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"dtype={self.dtype!r} is none of auto, float32, bfloat16, float16.")
        if self.measure == "rouge1":
            raise ValueError("measure='rouge1' needs generation: use ForgetTracker(rouge1=True) in Python.")
        if self.fraction is not None and not 0 < self.fraction < 1:
            raise ValueError(f"share={self.fraction} must lie between 0 and 1.")
        if parse_threshold(self.threshold) != "auto" and self.fraction is not None:
            raise ValueError("Give `threshold` or `fraction`, not both.")

    def save(self, file: Path) -> None:
        """Writes YAML that `forgetfilter run --config` reads."""
        write_text(yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, allow_unicode=True), file)


def parse_threshold(text: str) -> Threshold:
    """`auto`, or a number."""
    if text == "auto":
        return "auto"
    try:
        phi = float(text)
    except ValueError:
        phi = math.nan
    if not math.isfinite(phi):
        raise ValueError(f"threshold={text!r} is neither a number nor 'auto'.")
    return phi
