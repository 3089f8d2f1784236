"""The commands that load models: `demo`, `run` and `score`."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from ..data.source_paths import check_model, check_source
from ..filtering.config import FilterConfig
from ..pipeline.run_config import RunConfig
from ..utils.counted import counted
from .advice import how_to_finish, what_is_kept
from .app import (
    NOTHING_WRITTEN,
    JsonOption,
    after_interrupt,
    exit_codes,
    exit_if_not_separable,
    print_result,
    silence_libraries,
)
from .messages import say
from .next_step import command_to_review
from .option_names import RUN_FILTER_OPTIONS, RUN_OPTIONS
from .options import merge, options_from, parse_value, read_yaml


def demo(
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Aligned model.", show_default="SmolLM2-135M from its package"),
    ] = None,
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="Output folder.")] = Path("forgetfilter-demo"),
    seed: Annotated[int, typer.Option(metavar="N", help="Chooses the rows and their order.")] = 0,
) -> None:
    """See the whole method work on a small model.

    Example:

        forgetfilter demo --output forgetfilter-demo

    Without --model, it needs no network. OUTPUT then has example rows (noisy.jsonl and safety.jsonl) and a model
    (base-model) for `run`.
    """
    with exit_codes(f"The demo cannot be continued. Delete {output}, or choose another --output, and start it again."):
        from .demo import run_demo

        silence_libraries()
        run_demo(output, model, seed)


@options_from(RunConfig, "settings", RUN_OPTIONS)
@options_from(FilterConfig, "filter_settings", RUN_FILTER_OPTIONS)
def run(
    *,
    settings: dict[str, Any],
    filter_settings: dict[str, Any],
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="YAML file with these settings. Options override it.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", metavar="", help="Only estimate memory and time.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Finetune twice, and remove the most forgotten rows.

    Example:

        forgetfilter run --model base-model --noisy noisy.jsonl \\
            --safety safety.jsonl --output out --training learning_rate=1e-3

    Defaults: 3 epochs on the noisy set, 2 on the safety set, learning rate 2e-4, 4 rows per step and process, LoRA r=8.
    With --no-use-lora, the learning rate is 5e-5 on the noisy set and 2e-5 on the safety set.
    """
    with exit_codes(NOTHING_WRITTEN):
        run_config = _run_config(config, settings, filter_settings)
        if is_single_process():
            for source in (run_config.noisy, run_config.safety):
                check_source(source)
            check_models([run_config.model])
        from ..pipeline.cost_estimate import plan
        from ..pipeline.run import run as run_pipeline
        from ..trace.trace_folder import TRACE_FOLDER
        from ..utils.distributed import rank_and_world_size

        silence_libraries()
        if dry_run:
            cost = plan(run_config)
            if rank_and_world_size()[0] > 0:
                return
            if as_json:
                typer.echo(json.dumps(dataclasses.asdict(cost)))
            else:
                for line in str(cost).splitlines():
                    say(line)
            return
        output = Path(run_config.output)
        interrupted = after_interrupt(what_is_kept(output / TRACE_FOLDER))
        with interrupted, _stdout_to_stderr() if as_json else nullcontext():
            result = run_pipeline(run_config)
        with after_interrupt(lambda: f"The run in {output} is complete."):
            if rank_and_world_size()[0] == 0:
                print_result(result, output, as_json, command_to_review(output))
            exit_if_not_separable(result)


def _run_config(file: Path | None, settings: dict[str, Any], filter_settings: dict[str, Any]) -> RunConfig:
    """Settings of a YAML file with command line options on top."""
    content = read_yaml(file, RunConfig) if file is not None else {}
    for name in ("training", "safety_training", "lora", "filter"):
        section = content.get(name)
        section = {} if section is None else section
        if not isinstance(section, dict):
            raise ValueError(f"{file}: {name} must map names to values.")
        content[name] = {key: _from_yaml(key, value) for key, value in section.items()}
    merged = merge(content, {**settings, "filter": filter_settings})
    unknown = set(merged["filter"]) - set(RUN_FILTER_OPTIONS)
    if unknown:
        raise ValueError(f"{file}: `filter` contains unknown settings: {', '.join(sorted(unknown))}.")
    return RunConfig(**{**merged, "filter": FilterConfig(**merged["filter"])})


def _from_yaml(name: str, value: Any) -> Any:
    """Convert a YAML value to that of a command line option. YAML reads `1e-3` as text, and `save_strategy: no` as false."""
    if isinstance(value, str):
        return parse_value(value)
    return "no" if value is False and name.endswith("_strategy") else value


def score(
    noisy: Annotated[str, typer.Option(metavar="ROWS", help="A file, a folder or a Hub id.")],
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="Trace to write or to extend.")],
    before: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Model or adapter that has learned the rows.", rich_help_panel="Models"),
    ] = None,
    after: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The same model after safety finetuning.", rich_help_panel="Models"),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Base model, for --measure relative.", rich_help_panel="Models"),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Hub id or folder.",
            show_default="that of the first model",
            rich_help_panel="Models",
        ),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            min=2,
            metavar="TOKENS",
            help="Truncate longer rows.",
            show_default="context of the model",
            rich_help_panel="Scoring",
        ),
    ] = None,
    batch_tokens: Annotated[
        int | None,
        typer.Option(min=1, metavar="TOKENS", help="Padded tokens per batch.", rich_help_panel="Scoring"),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Record losses under models that you have already finetuned.

    Example:

        forgetfilter score --noisy noisy.jsonl --before model-1 \\
            --after model-2 --output out

    Also runs under `torchrun`.
    """
    checkpoints = {
        role: model for role, model in (("base", base), ("before", before), ("after", after)) if model is not None
    }
    if not checkpoints:
        raise typer.BadParameter("Pass at least one model: --before, --after or --base.")
    with exit_codes(NOTHING_WRITTEN):
        if is_single_process():
            check_source(noisy)
            check_models(checkpoints.values())
            if tokenizer is not None:
                check_model(tokenizer, "tokenizer")
        import numpy as np

        from ..pipeline.checkpoints import RECORD_OF, score_source
        from ..utils.distributed import rank_and_world_size

        silence_libraries()
        with after_interrupt(what_is_kept(output)):
            trace = score_source(output, noisy, checkpoints, tokenizer, max_length, batch_tokens)
        if rank_and_world_size()[0] > 0:
            return
        written = f"Wrote the trace to {output}."
        with after_interrupt(lambda: written):
            losses = {role: trace.mean_losses(RECORD_OF[role]) for role in checkpoints}
            finite = {role: values[np.isfinite(values)] for role, values in losses.items()}
            if as_json:  # JSON has no NaN
                means = {role: float(values.mean()) if len(values) else None for role, values in finite.items()}
                typer.echo(json.dumps({"trace": str(output), "samples": len(trace.rows), "mean_loss": means}))
                return
            for role, values in finite.items():
                if len(values):
                    say(f"{role}: mean loss {values.mean():.4f} nats per token over {counted(len(values), 'row')}")
                else:
                    say(f"{role}: no row has a finite loss. Check this model: its training may have diverged.")
            say(written)
            if all(map(len, finite.values())):
                say(how_to_finish(trace) or f"Next: {command_to_review(output)}")


def check_models(names: Iterable[str]) -> None:
    """Check that the folders of models exist, and say which names are Hub ids."""
    for name in names:
        check_model(name)
        if not Path(name).exists():
            say(f"forgetfilter: There is no folder {name}, so the model is taken from the Hub or its cache.", err=True)


def is_single_process() -> bool:
    """Whether this process was not started with others by `torchrun` or `accelerate launch`.

    Of several processes, only the main one reads the rows, and it may be on another machine than this one.
    """
    return int(os.environ.get("WORLD_SIZE", "1")) == 1


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Redirect what trainers print, so that standard output contains JSON only."""
    stdout, sys.stdout = sys.stdout, sys.stderr
    try:
        yield
    finally:
        sys.stdout = stdout
