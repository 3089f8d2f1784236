"""The command line: `forgetfilter demo`, `run`, `score`, `filter`, `report`, `show`.

Exit codes: 0 done, 1 failed, 2 bad usage or bad data, 3 not separable (nothing was removed).
"""

from __future__ import annotations

import dataclasses
import inspect
import io
import json
import logging
import sys
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from transformers import PreTrainedTokenizerBase

from ..filtering.result import FilterResult
from ..measures.names import DEFAULT_MEASURE, Measure
from ..pipeline.run_config import RunConfig, parse_threshold
from ..trace.trace import Trace
from ..utils.sanitize import sanitize


FAILED, BAD_DATA, NOT_SEPARABLE = 1, 2, 3

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

TraceArgument = Annotated[Path, typer.Argument(metavar="TRACE", help="Folder of a trace, or of a run.")]
MeasureOption = Annotated[Measure, typer.Option(help="Which forgetting.")]
ThresholdOption = Annotated[str, typer.Option(help="φ, or auto.")]
FractionOption = Annotated[float | None, typer.Option(help="Remove this share, the most forgotten, instead.")]
TokenizerOption = Annotated[str | None, typer.Option(help="Hub id or folder; by default that of the trace.")]
StepOption = Annotated[int | None, typer.Option(help="A record of S1+; by default the last.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, nothing else.")]
NoisyOption = Annotated[str | None, typer.Option(help="The rows; by default where the trace says that they lie.")]


def print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"forgetfilter-callback {version('forgetfilter-callback')}")
        raise typer.Exit


@app.callback()
def main(
    show_version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Say the version and end.")
    ] = False,
) -> None:
    """Find unsafe finetuning data by how fast a model forgets it."""
    for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show φ is no reason to fail
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    logging.basicConfig(format="%(message)s", stream=sys.stderr)


@contextmanager
def exit_codes() -> Iterator[None]:
    """Says what is wrong in a line, without a traceback, and ends with the code for it."""
    from datasets import disable_progress_bars
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()  # of reading and writing files
    try:
        yield
    except ValueError as error:  # all errors about data and settings are such
        typer.echo(f"forgetfilter: {sanitize(str(error))}", err=True)
        raise typer.Exit(BAD_DATA) from error
    except Exception as error:
        if isinstance(error, typer.Exit | typer.Abort | typer.BadParameter):
            raise
        typer.echo(f"forgetfilter: {type(error).__name__}: {sanitize(str(error))}", err=True)
        raise typer.Exit(FAILED) from error


@app.command()
def demo(
    model: Annotated[
        str | None, typer.Option(help="Hub id or folder of an aligned model; by default SmolLM2-135M from its package.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("forgetfilter-demo"),
    seed: Annotated[int, typer.Option(help="Draws the rows and seeds the trainers.")] = 0,
) -> None:
    """Run ForgetFilter end to end: a small aligned model, real questions with biased answers among them."""
    with exit_codes():
        from .demo import run_demo

        run_demo(output, model, seed)


def read_config(context: typer.Context, file: Path | None) -> Path | None:
    """Settings of a YAML file become the defaults that flags stand on top of."""
    if file is None:
        return None
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise typer.BadParameter(f"{file} cannot be read: {error}") from error
    names = [each.name for each in dataclasses.fields(RunConfig)]
    if not isinstance(settings, dict) or not set(settings) <= set(names):
        unknown = sorted(map(str, set(settings) - set(names))) if isinstance(settings, dict) else "no settings"
        raise typer.BadParameter(f"{file} holds {unknown}; what can be set is {', '.join(names)}.")
    context.default_map = {name: value for name, value in settings.items() if value is not None}
    return file


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command, in place of its `settings`, an option for each field of [`RunConfig`]."""
    types = typing.get_type_hints(RunConfig)
    options = [
        inspect.Parameter(
            each.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=each.default,
            annotation=Annotated[types[each.name], typer.Option(help=each.metadata["help"])],
        )
        for each in dataclasses.fields(RunConfig)
    ]

    def with_options(**given: Any) -> None:
        settings = {option.name: given.pop(option.name) for option in options}
        command(settings=settings, **given)

    own = inspect.signature(command, eval_str=True).parameters.values()
    parameters = [*options, *(each for each in own if each.name != "settings")]
    with_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    with_options.__annotations__ = {each.name: each.annotation for each in parameters}
    with_options.__name__, with_options.__doc__ = command.__name__, command.__doc__
    return with_options


@app.command()
@with_settings
def run(
    *,
    settings: dict[str, Any],
    config: Annotated[
        Path | None,
        typer.Option(callback=read_config, is_eager=True, help="YAML of these settings; flags stand on top of it."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it would cost.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Learn the noisy set, finetune on safe examples, and part the rows by what was forgotten."""
    with exit_codes():
        made = RunConfig(**settings)
        from ..pipeline.plan import plan
        from ..pipeline.run import run as run_sessions

        if dry_run:
            cost = plan(made)
            typer.echo(json.dumps(dataclasses.asdict(cost)) if as_json else str(cost))
            return
        if as_json:
            with _standard_output_on_error():
                result = run_sessions(made)
        else:
            result = run_sessions(made)
        _end(result, Path(made.output), as_json)


@app.command()
def score(
    noisy: Annotated[str, typer.Option(help="The rows: a file, a folder or a Hub id.")],
    output: Annotated[Path, typer.Option(help="Folder of the trace; one that `score` made of these rows is added to.")],
    before: Annotated[str | None, typer.Option(help="M1: a model that has learnt the rows (or its adapter).")] = None,
    after: Annotated[str | None, typer.Option(help="M2: M1 after safety finetuning.")] = None,
    base: Annotated[str | None, typer.Option(help="M0, for relative forgetting.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="By default that of the first model named.")] = None,
    max_length: Annotated[
        int | None,
        typer.Option(min=2, help="Longer rows are cut at the right; by default at the first model's context."),
    ] = None,
    batch_tokens: Annotated[int | None, typer.Option(min=1, help="Padded tokens a batch.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Record the losses of rows under models that you have already. Runs under `torchrun` too."""
    checkpoints = {
        role: model for role, model in (("base", base), ("before", before), ("after", after)) if model is not None
    }
    if not checkpoints:
        raise typer.BadParameter("Name a model: --before, --after or --base.")
    with exit_codes():
        import numpy as np

        from ..data.loading import encode_source, load_rows
        from ..data.tokenizers import load_tokenizer, model_context_length
        from ..measures.common import mean_losses
        from ..pipeline.checkpoints import RECORD_OF, score_checkpoints
        from ..utils.distributed import rank_and_world_size
        from ..utils.paths import absolute_path_or_hub_id

        first = next(iter(checkpoints.values()))
        loaded = load_tokenizer(tokenizer if tokenizer is not None else first)
        max_length = max_length if max_length is not None else model_context_length(first)
        rows = encode_source(noisy, load_rows(noisy), loaded, max_length)
        trace = score_checkpoints(output, rows, loaded, checkpoints, max_length, batch_tokens)
        if rank_and_world_size()[0] > 0:
            return
        trace.note_source(absolute_path_or_hub_id(noisy), rows.truncated)
        offsets = trace.rows.loss_offsets
        means = {
            role: float(np.nanmean(mean_losses(trace.token_losses(RECORD_OF[role]), offsets))) for role in checkpoints
        }
        if as_json:
            typer.echo(json.dumps({"trace": str(output), "samples": len(rows), "mean_loss": means}))
            return
        for role, mean in means.items():
            typer.echo(f"{role}: mean loss {mean:.4f} nats per token over {len(rows):,} rows")
        complete = {RECORD_OF["before"], RECORD_OF["after"]} <= set(trace.records())
        rest = f"forgetfilter report {output}" if complete else "`score` --before and --after there too"
        typer.echo(f"Trace in {output}. Next: {rest}")


@app.command(name="filter")
def filter_command(
    trace: TraceArgument,
    output: Annotated[Path, typer.Option(help="Folder for kept.jsonl, removed.jsonl, card.md and decision/.")],
    measure: Annotated[Measure | None, typer.Option(help=f"Which forgetting; {DEFAULT_MEASURE} by default.")] = None,
    threshold: ThresholdOption = "auto",
    fraction: FractionOption = None,
    step: StepOption = None,
    decision: Annotated[Path | None, typer.Option(help="What the review page exported.")] = None,
    noisy: NoisyOption = None,
    tokenizer: TokenizerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Part the rows of a trace into kept and removed ones."""
    with exit_codes():
        from ..pipeline.outputs import filter_rows

        phi = parse_threshold(threshold)
        opened = _open(trace)
        result = filter_rows(
            opened,
            output,
            noisy,
            _tokenizer(opened, tokenizer),
            measure,
            phi,
            fraction,
            decision,
            step,
        )
        _end(result, output, as_json)


@app.command()
def report(
    trace: TraceArgument,
    output: Annotated[Path, typer.Option(help="The HTML file.")] = Path("forgetfilter-review.html"),
    measure: MeasureOption = DEFAULT_MEASURE,
    threshold: ThresholdOption = "auto",
    fraction: FractionOption = None,
    audit_column: Annotated[str | None, typer.Option(help="A column of the rows that is true for unsafe ones.")] = None,
    noisy: NoisyOption = None,
    tokenizer: TokenizerOption = None,
) -> None:
    """Make the page on which you look at what would be removed, and decide."""
    with exit_codes():
        from ..data.loading import load_rows
        from ..reports.review_page import write_review_page
        from ..reports.summary import page_summary
        from ..trace.source import audit_labels, source_path

        opened = _open(trace)
        loaded = _tokenizer(opened, tokenizer)
        unsafe = None
        if audit_column is not None:
            rows = load_rows(noisy if noisy is not None else source_path(opened))
            unsafe = audit_labels(opened, rows, loaded, audit_column)
        result = write_review_page(opened, output, loaded, measure, parse_threshold(threshold), fraction, unsafe)
        typer.echo(f"{page_summary(result)} Open {output} in a browser.")


@app.command()
def show(
    trace: TraceArgument,
    measure: MeasureOption = DEFAULT_MEASURE,
    threshold: ThresholdOption = "auto",
    fraction: FractionOption = None,
    step: StepOption = None,
    head: Annotated[int, typer.Option(min=0, help="How many of the most forgotten samples.")] = 10,
    tokenizer: TokenizerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Look at a trace in the terminal."""
    with exit_codes():
        from rich.console import Console

        from ..filtering.find_forgotten import find_forgotten
        from ..reports.terminal import show as show_trace

        opened = _open(trace)
        result = find_forgotten(opened, measure, parse_threshold(threshold), fraction, step)
        if as_json:
            typer.echo(json.dumps(_account(result)))
            return
        named = tokenizer is not None or opened.manifest["tokenizer"] is not None
        show_trace(opened, result, Console(), _tokenizer(opened, tokenizer) if named else None, head)


@app.command()
def doctor(trace: TraceArgument, as_json: JsonOption = False) -> None:
    """Check the files of a trace, and say what is wrong with them. Ends with 2 if anything is."""
    with exit_codes():
        from ..trace.trace import find_trace_folder
        from ..trace.validation import validate_trace

        found = validate_trace(find_trace_folder(trace))
        if as_json:
            typer.echo(json.dumps(found._asdict()))
        else:
            for text in found.problems + found.notes:
                typer.echo(sanitize(text))
            typer.echo(f"{trace} is {'damaged' if found.problems else 'sound'}.")
        if found.problems:
            raise typer.Exit(BAD_DATA)


def _open(path: Path) -> Trace:
    from ..trace.trace import Trace, find_trace_folder

    return Trace.open(find_trace_folder(path))


def _tokenizer(trace: Trace, name: str | None) -> PreTrainedTokenizerBase:
    from ..data.tokenizers import load_tokenizer
    from ..trace.source import load_trace_tokenizer

    return load_tokenizer(name) if name is not None else load_trace_tokenizer(trace)


def _account(result: FilterResult) -> dict[str, Any]:
    account = {name: getattr(result, name) for name in ("measure", "threshold", "method", "reason", "fingerprint")}
    return {**result.counts, **account, "separable": result.separability.separable}


def _end(result: FilterResult, output: Path, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({**_account(result), "output": str(output)}))
    else:
        typer.echo(result.summary())
        typer.echo(f"In {output}: {', '.join(sorted(each.name for each in output.iterdir() if each.name[0] != '.'))}.")
    if result.method == "auto" and not result.separability.separable:
        raise typer.Exit(NOT_SEPARABLE)


@contextmanager
def _standard_output_on_error() -> Iterator[None]:
    """Sends what trainers print to standard error, so that standard output holds JSON only."""
    output, sys.stdout = sys.stdout, sys.stderr
    try:
        yield
    finally:
        sys.stdout = output
