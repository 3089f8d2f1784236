"""The commands of `forgetfilter`.

Exit codes: 0 success, 1 failure, 2 wrong usage or unusable input, 3 not separable (nothing was removed).
"""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..data.source_paths import check_model, check_source
from ..filtering.config import FilterConfig
from ..pipeline.run_config import RunConfig
from ..utils.optional_packages import requires_extra
from ..utils.sanitize_text import sanitize
from .options import merge, options_from, parse_value, read_yaml


if TYPE_CHECKING:  # torch and transformers are imported in the commands, so that `--help` is fast
    import numpy as np
    from transformers import PreTrainedTokenizerBase

    from ..data.decode import Decoder
    from ..filtering.result import FilterResult
    from ..trace.trace import Trace


FAILED, BAD_INPUT, NOT_SEPARABLE = 1, 2, 3
RUN_OPTIONS = tuple(each.name for each in dataclasses.fields(RunConfig) if each.name != "filter")
RUN_FILTER_OPTIONS = ("measure", "threshold", "fraction")
ALL_FILTER_OPTIONS = ("measure", "threshold", "fraction", "step", "decision", "reviewed", "level")

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

TraceArgument = Annotated[Path, typer.Argument(metavar="TRACE", help="Folder of a trace, or output folder of a run.")]
TokenizerOption = Annotated[
    str | None, typer.Option(help="Hub id or folder of the tokenizer. Default: the one that the trace names.")
]
NoisyOption = Annotated[str | None, typer.Option(help="The noisy set. Default: the file that the trace names.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print only one JSON object to standard output.")]


def print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"forgetfilter-callback {version('forgetfilter-callback')}")
        raise typer.Exit


@app.callback()
def main(
    show_version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Find unsafe finetuning data by how fast a model forgets it."""
    for stream in (sys.stdout, sys.stderr):  # do not fail on terminals that cannot show φ
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("forgetfilter_callback").setLevel(logging.INFO)


@contextmanager
def exit_codes() -> Iterator[None]:
    """Print errors in one line, without a traceback, and exit with their code."""
    try:
        yield
    except ValueError as error:  # all errors about inputs and settings
        typer.echo(f"forgetfilter: {sanitize(str(error))}", err=True)
        raise typer.Exit(BAD_INPUT) from error
    except Exception as error:
        if isinstance(error, typer.Exit | typer.Abort | typer.BadParameter):
            raise
        typer.echo(f"forgetfilter: {type(error).__name__}: {sanitize(str(error))}", err=True)
        raise typer.Exit(FAILED) from error


def is_single_process() -> bool:
    """Whether this process was not started with others by `torchrun` or `accelerate launch`.

    Of several processes, only the main one reads the rows, and it may be on another machine than this one.
    """
    return int(os.environ.get("WORLD_SIZE", "1")) == 1


def silence_libraries() -> None:
    """Hide the progress bars and log messages that transformers and datasets print while they load."""
    from datasets import disable_progress_bars
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()


@app.command()
def demo(
    model: Annotated[
        str | None, typer.Option(help="Hub id or folder of an aligned model. Default: SmolLM2-135M from its package.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Output folder.")] = Path("forgetfilter-demo"),
    seed: Annotated[int, typer.Option(help="Seed for the choice of rows and for training.")] = 0,
) -> None:
    """Run the whole method on a small aligned model and questions with biased answers."""
    with exit_codes():
        from .demo import run_demo

        silence_libraries()
        run_demo(output, model, seed)


@app.command()
@options_from(RunConfig, "settings", RUN_OPTIONS)
@options_from(FilterConfig, "filter_settings", RUN_FILTER_OPTIONS)
def run(
    *,
    settings: dict[str, Any],
    filter_settings: dict[str, Any],
    config: Annotated[
        Path | None, typer.Option(help="YAML file with these settings. Options on the command line take precedence.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only estimate the cost.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Finetune on the noisy set, then on safe examples, and split the rows by how much was forgotten.

    Example: forgetfilter run --model MODEL --noisy noisy.jsonl --safety safety.jsonl --output out
    """
    with exit_codes():
        run_config = _run_config(config, settings, filter_settings)
        if is_single_process():
            check_model(run_config.model)
            for source in (run_config.noisy, run_config.safety):
                check_source(source)
        from ..pipeline.cost_estimate import plan
        from ..pipeline.run import run as run_pipeline
        from ..utils.distributed import rank_and_world_size

        silence_libraries()
        if dry_run:
            cost = plan(run_config)
            if rank_and_world_size()[0] == 0:
                typer.echo(json.dumps(dataclasses.asdict(cost)) if as_json else str(cost))
            return
        if as_json:
            with _stdout_to_stderr():
                result = run_pipeline(run_config)
        else:
            result = run_pipeline(run_config)
        if rank_and_world_size()[0] == 0:
            _print_result(result, Path(run_config.output), as_json)
        _exit_if_not_separable(result)


def _run_config(file: Path | None, settings: dict[str, Any], filter_settings: dict[str, Any]) -> RunConfig:
    """Settings of a YAML file with command line options on top."""
    content = read_yaml(file, RunConfig) if file is not None else {}
    for name in ("training", "safety_training", "lora", "filter"):
        section = content.get(name)
        section = {} if section is None else section
        if not isinstance(section, dict):
            raise typer.BadParameter(f"{file}: `{name}` must map names to values.")
        content[name] = {key: _from_yaml(key, value) for key, value in section.items()}
    merged = merge(content, {**settings, "filter": filter_settings})
    unknown = set(merged["filter"]) - set(RUN_FILTER_OPTIONS)
    if unknown:
        raise typer.BadParameter(f"{file}: `filter` contains unknown settings: {', '.join(sorted(unknown))}.")
    return RunConfig(**{**merged, "filter": FilterConfig(**merged["filter"])})


def _from_yaml(name: str, value: Any) -> Any:
    """Convert a YAML value to that of a command line option. YAML reads `1e-3` as text, and `save_strategy: no` as false."""
    if isinstance(value, str):
        return parse_value(value)
    return "no" if value is False and name.endswith("_strategy") else value


@app.command()
def score(
    noisy: Annotated[str, typer.Option(help="The rows: a file, a folder or a Hub id.")],
    output: Annotated[Path, typer.Option(help="Folder of the trace. An existing trace of the same rows is extended.")],
    before: Annotated[
        str | None, typer.Option(help="Model (or adapter) that has learned the rows, before safety finetuning.")
    ] = None,
    after: Annotated[str | None, typer.Option(help="The same model after safety finetuning.")] = None,
    base: Annotated[str | None, typer.Option(help="The base model, for measure `relative`.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Default: the tokenizer of the first model.")] = None,
    max_length: Annotated[
        int | None,
        typer.Option(min=2, help="Truncate longer rows on the right. Default: the context of the first model."),
    ] = None,
    batch_tokens: Annotated[int | None, typer.Option(min=1, help="Padded tokens per batch.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Record the losses of rows under models that are already finetuned. Also runs under `torchrun`."""
    checkpoints = {
        role: model for role, model in (("base", base), ("before", before), ("after", after)) if model is not None
    }
    if not checkpoints:
        raise typer.BadParameter("Pass at least one model: --before, --after or --base.")
    with exit_codes():
        if is_single_process():
            check_source(noisy)
            for model in checkpoints.values():
                check_model(model)
            if tokenizer is not None:
                check_model(tokenizer, "tokenizer")
        import numpy as np

        from ..pipeline.checkpoints import RECORD_OF, score_source
        from ..utils.distributed import rank_and_world_size

        silence_libraries()
        trace = score_source(output, noisy, checkpoints, tokenizer, max_length, batch_tokens)
        if rank_and_world_size()[0] > 0:
            return
        means = {role: float(np.nanmean(trace.mean_losses(RECORD_OF[role]))) for role in checkpoints}
        if as_json:
            typer.echo(json.dumps({"trace": str(output), "samples": len(trace.rows), "mean_loss": means}))
            return
        for role, mean in means.items():
            typer.echo(f"{role}: mean loss {mean:.4f} nats per token over {len(trace.rows):,} rows")
        is_complete = {RECORD_OF["before"], RECORD_OF["after"]} <= set(trace.records())
        next_step = (
            f"forgetfilter report {output}" if is_complete else "`score` with --before and --after into this folder"
        )
        typer.echo(f"Wrote the trace to {output}. Next: {next_step}")


@app.command(name="filter")
@options_from(FilterConfig, "filter_settings", ALL_FILTER_OPTIONS)
def filter_command(
    *,
    trace: TraceArgument,
    output: Annotated[Path, typer.Option(help="Folder for kept.jsonl, removed.jsonl, card.md and filter_result.")],
    filter_settings: dict[str, Any],
    noisy: NoisyOption = None,
    tokenizer: TokenizerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Split the rows of a trace into kept and removed rows. No model is needed."""
    with exit_codes():
        filter_config = FilterConfig(**filter_settings)
        opened = _open_trace(trace)
        from ..pipeline.outputs import filter_rows
        from ..trace.source_files import find_source, is_unchanged

        source = noisy if noisy is not None else find_source(opened)
        check_source(source)
        loaded_tokenizer = None
        if not is_unchanged(opened, source):  # otherwise no row is encoded again
            loaded_tokenizer = _load_tokenizer(opened, tokenizer)
        result = filter_rows(opened, output, filter_config, source, loaded_tokenizer)
        _print_result(result, output, as_json)
        _exit_if_not_separable(result)


@app.command()
@options_from(FilterConfig, "filter_settings", RUN_FILTER_OPTIONS)
def report(
    *,
    trace: TraceArgument,
    output: Annotated[Path, typer.Option(help="The HTML file to write.")] = Path("forgetfilter-review.html"),
    filter_settings: dict[str, Any],
    audit_column: Annotated[str | None, typer.Option(help="A column of the rows that is true for unsafe rows.")] = None,
    noisy: NoisyOption = None,
    tokenizer: TokenizerOption = None,
) -> None:
    """Write the review page: look at what would be removed, and decide."""
    with exit_codes():
        filter_config = FilterConfig(**filter_settings)
        opened = _open_trace(trace)
        from ..reports.review_page import write_review_page
        from ..reports.summary import page_summary

        unsafe = None if audit_column is None else _labels(opened, noisy, tokenizer, audit_column)
        result = write_review_page(opened, output, _load_decoder(opened, tokenizer), filter_config, unsafe)
        typer.echo(f"{page_summary(result)} Open {output} in a browser.")


@app.command()
@options_from(FilterConfig, "filter_settings", ("measure", "threshold", "fraction", "step"))
def show(
    *,
    trace: TraceArgument,
    filter_settings: dict[str, Any],
    head: Annotated[int, typer.Option(min=0, help="Number of most forgotten samples to show.")] = 10,
    tokenizer: TokenizerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show a trace in the terminal."""
    with exit_codes():
        filter_config = FilterConfig(**filter_settings)
        opened = _open_trace(trace)
        with requires_extra("cli", "`forgetfilter show`"):
            from rich.console import Console

        from ..filtering.find_forgotten import find_forgotten
        from ..reports.terminal import show as show_trace

        result = find_forgotten(opened, filter_config)
        if as_json:
            typer.echo(json.dumps(_as_dict(result)))
            return
        has_tokenizer = tokenizer is not None or opened.manifest["tokenizer"] is not None
        decoder = _load_decoder(opened, tokenizer) if has_tokenizer else None
        show_trace(opened, result, Console(), decoder, head)


@app.command()
def doctor(trace: TraceArgument, as_json: JsonOption = False) -> None:
    """Check the files of a trace. Exits with 2 if something is wrong."""
    with exit_codes():
        from ..trace.source_files import find_trace_folder
        from ..trace.validate_trace import validate_trace

        findings = validate_trace(find_trace_folder(trace))
        if as_json:
            typer.echo(json.dumps(findings._asdict()))
        else:
            for text in findings.problems + findings.notes:
                typer.echo(sanitize(text))
            typer.echo(f"{trace} {'has problems' if findings.problems else 'is valid'}.")
        if findings.problems:
            raise typer.Exit(BAD_INPUT)


def _open_trace(path: Path) -> Trace:
    from ..trace.source_files import find_trace_folder
    from ..trace.trace import Trace

    return Trace.open(find_trace_folder(path))


def _load_tokenizer(trace: Trace, name: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer, to encode rows again."""
    from ..data.tokenizers import load_tokenizer
    from ..trace.source_files import load_trace_tokenizer

    silence_libraries()
    return load_tokenizer(name) if name is not None else load_trace_tokenizer(trace)


def _load_decoder(trace: Trace, tokenizer: str | None) -> Decoder:
    from ..data.decode import load_decoder
    from ..trace.source_files import find_tokenizer

    return load_decoder(tokenizer if tokenizer is not None else find_tokenizer(trace))


def _labels(trace: Trace, noisy: str | None, tokenizer: str | None, audit_column: str) -> np.ndarray:
    """Audit labels of the samples, from a column of the rows."""
    from ..trace.source_files import find_labels, find_source

    source = noisy if noisy is not None else find_source(trace)
    check_source(source)
    loaded_tokenizer = _load_tokenizer(trace, tokenizer)
    from ..data.load_rows import load_rows

    return find_labels(trace, load_rows(source), loaded_tokenizer, audit_column)


def _as_dict(result: FilterResult) -> dict[str, Any]:
    return {
        **result.counts,
        "measure": result.measure,
        "threshold": result.threshold,
        "method": result.method,
        "reason": result.reason,
        "fingerprint": result.fingerprint,
        "separable": result.separability.separable,
    }


def _print_result(result: FilterResult, output: Path, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({**_as_dict(result), "output": str(output)}))
    else:
        summary = result.summary()
        typer.echo(f"{summary[0].upper()}{summary[1:]}.")
        files = sorted(file.name for file in output.iterdir() if not file.name.startswith("."))
        typer.echo(f"Files in {output}: {', '.join(files)}.")


def _exit_if_not_separable(result: FilterResult) -> None:
    if result.method == "auto" and not result.separability.separable:
        raise typer.Exit(NOT_SEPARABLE)


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Redirect what trainers print, so that standard output contains JSON only."""
    stdout, sys.stdout = sys.stdout, sys.stderr
    try:
        yield
    finally:
        sys.stdout = stdout
