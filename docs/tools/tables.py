"""Tables of the evidence pages, from `benchmarks/results/*.json`. Each function returns Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import mean, stdev
from typing import Any

import few_tables
from forgetfilter_callback.trace.base_sample import BASE_SAMPLES
from markdown_tables import Row, decimal, find, read, table


SCENARIOS = {"bias": None, "toxicity": None, "harmfulness": "32 anchors"}  # with the control that the goals are about
SIGNALS = {
    "smoothed": "`smoothed`",
    "smoothed, safety rows at 0": "`smoothed`, with the safety rows as a reference",
    "largest tenth of rises": "largest tenth of the token rises",
    "loss": "`loss`",
    "sum of rises": "sum of the token rises",
    "pooled": "`pooled`",
    "relative": "`relative`",
    "learning gain": "learning gain in noisy finetuning",
    "M0 loss": "loss under the base model",
    "S1 loss": "loss after noisy finetuning",
    "word classifier": "word classifier, trained on labels",
    "representation matching (given labels)": "representation matching, given labels",
}
ARMS = {
    "base": "base model",
    "no_measure": "finetuned on all rows",
    "self_correction": "self-correction prompt",
    "replay": "replay of the safety set",
    "sequential": "safety finetuning afterwards",
    "forgetfilter_rouge": "filter by `rouge1`",
    "forgetfilter_relative": "filter by `relative`",
    "forgetfilter_loss": "filter by `loss`",
    "forgetfilter": "**ForgetFilter** (`smoothed`)",
    "forgetfilter_self_correction": "ForgetFilter and self-correction",
    "oracle": "unsafe rows removed by label",
}


def ends(**wanted: Any) -> list[Row]:
    """Values of `filters.json` at the end of gentle safety finetuning, after three epochs on 200 rows."""
    common = {"epochs": 3, "safety_epochs": 2, "rows": 200, "safety_learning_rate": 3e-4, "dtype": "torch.bfloat16"}
    return [
        row
        for row in read("filters")
        if row["experiment"] != "sweep" and all(row[key] == value for key, value in {**common, **wanted}.items())
    ]


def measures_by_seed() -> str:
    """AUROC of each signal, where half of the rows are unsafe: three seeds and their mean."""
    found = {name: ends(scenario=name, control=control, unsafe_share=0.5) for name, control in SCENARIOS.items()}
    lines = []
    for signal, title in SIGNALS.items():
        line = [title]
        for rows in found.values():
            values = [find(rows, "auroc", seed=seed, signal=signal) for seed in range(3)]
            known = [value for value in values if value is not None]
            line.append("&nbsp;".join(map(decimal, values)) if known else "–")
            line.append(f"**{decimal(mean(known))}**" if len(known) == 3 else "–")
        lines.append(line)
    return table(["signal", "bias", "mean", "toxicity", "mean", "harmfulness", "mean"], lines)


def combined_and_smoothed() -> str:
    """The default measure and the one before it, on the same traces."""
    rows = [row for row in read("combined") if row["experiment"] != "sweep"]
    lines = []
    for row in sorted(rows, key=lambda row: (-row["unsafe_share"], row["scenario"], row["seed"], row["signal"])):
        if row["signal"] in ("combined", "smoothed"):
            name = row["scenario"] + ", anchors" * (row["control"] is not None)
            texts = [f"{name}, seed {row['seed']}", f"{row['unsafe_share']:.0%}", f"`{row['signal']}`"]
            lines.append([*texts, *_decision(row)])
    header = ["set", "unsafe", "measure", "AUROC", "F1 at φ", "best F1", "removed of 200", "of them benign"]
    return table(header, lines, texts=3)


def automatic_threshold() -> str:
    """What the automatic φ of `smoothed` does where half of the rows are unsafe."""
    lines = []
    for scenario, control in [*SCENARIOS.items(), ("harmfulness", None)]:
        for row in sorted(ends(scenario=scenario, control=control, unsafe_share=0.5), key=lambda row: row["seed"]):
            if row["signal"] == "smoothed":
                name = "harmfulness, no anchors" if scenario == "harmfulness" and control is None else scenario
                lines.append([name, str(row["seed"]), *_decision(row)])
    return table(["set", "seed", "AUROC", "F1 at φ", "best F1", "removed of 200", "of them benign"], lines)


def unsafe_fractions() -> str:
    """`smoothed` and its automatic φ, by the fraction of unsafe rows."""
    lines = []
    for scenario, control in SCENARIOS.items():
        for share in (0.05, 0.25, 0.5, 0.75):
            rows = ends(scenario=scenario, control=control, unsafe_share=share, seed=0)
            (row,) = (row for row in rows if row["signal"] == "smoothed")
            lines.append([scenario, f"{share:.0%}", *_decision(row)])
    return table(["set", "unsafe", "AUROC", "F1 at φ", "best F1", "removed of 200", "of them benign"], lines)


def _decision(row: Row) -> list[str]:
    figures = [decimal(row["auroc"]), decimal(row["f1_auto"]), decimal(row["f1_best"])]
    return [*figures, str(row["removed_auto"]), str(row["removed_benign"])]


def measures_by_fraction() -> str:
    """AUROC of the measures by the fraction of unsafe rows."""
    names = ["smoothed", "largest tenth of rises", "loss", "pooled", "M0 loss", "word classifier"]
    shares = (0.05, 0.25, 0.5, 0.75)
    lines = []
    for scenario, control in SCENARIOS.items():
        for signal in names:
            found = [
                find(ends(scenario=scenario, control=control, unsafe_share=share, seed=0), "auroc", signal=signal)
                for share in shares
            ]
            lines.append([scenario, SIGNALS[signal], *map(decimal, found)])
    return table(["set", "signal", *(f"{share:.0%} unsafe" for share in shares)], lines, texts=2)


def controls() -> str:
    """AUROC on sets that were changed on purpose, seed 0, and what the automatic φ removes."""
    titles = {
        ("bias", None): "bias, unchanged",
        ("bias", "unsafe review"): "bias, safety set of unsafe rows",
        ("bias", "other safety"): "bias, safety set of safe tweets",
        ("bias", "near-duplicates"): "bias, 40 rows five times each",
        ("bias", "one topic"): "bias, all Alpaca rows about food",
        ("bias", "long completions"): "bias, benign text after the harm",
        ("toxicity", None): "toxicity, unchanged",
        ("toxicity", "unsafe review"): "toxicity, safety set of unsafe rows",
        ("mixed", None): "three kinds of harm at once",
        ("preference", None): "preferences instead of harm",
    }
    names = ["smoothed", "largest tenth of rises", "loss", "pooled", "relative"]
    lines = []
    for (scenario, control), title in titles.items():
        rows = ends(scenario=scenario, control=control, unsafe_share=0.5, seed=0)
        found = [decimal(find(rows, "auroc", signal=name)) for name in names]
        removed = find(rows, "removed_auto", signal="smoothed")
        benign = find(rows, "removed_benign", signal="smoothed")
        lines.append([title, *found, f"{removed} ({benign})"])
    header = ["set", "`smoothed`", "largest tenth", "`loss`", "`pooled`", "`relative`", "removed (of them benign)"]
    return table(header, lines)


def arms_over_seeds() -> str:
    """Safety and task score of each defence: mean ± standard deviation over the seeds."""
    titles = {"bias": "bias", "toxicity": "toxicity", "harmfulness": "harmfulness, with anchors"}
    lines = []
    for scenario, title in titles.items():
        wanted = "control" if scenario == "harmfulness" else "main"
        rows = [row for row in read("defences") if (row["scenario"], row["experiment"]) == (scenario, wanted)]
        for arm in ("base", "no_measure", "self_correction", "sequential", "forgetfilter", "oracle"):
            of_arm = [row for row in rows if row["arm"] == arm]
            filtered = arm == "forgetfilter"
            lines.append(
                [
                    title,
                    ARMS[arm],
                    str(len(of_arm)),
                    *(_mean_and_deviation(of_arm, key) for key in ("unsafe", "task")),
                    *(_mean_and_deviation(of_arm, key) if filtered else "–" for key in ("removed", "f1")),
                ]
            )
    return table(["set", "model", "seeds", "unsafe", "task", "removed", "F1 of the filter"], lines, texts=2)


def arms_by_the_default_measure() -> str:
    """ForgetFilter by `combined`, and the arms to compare it with: means over the seeds on which it was run."""
    titles = {
        "no_measure": "finetuned on all rows",
        "self_correction": "self-correction prompt",
        "forgetfilter": "ForgetFilter, `smoothed`",
        "forgetfilter_combined": "**ForgetFilter, `combined`**",
        "oracle": "unsafe rows removed by label",
    }
    lines = []
    for scenario in ("bias", "toxicity"):
        rows = [row for row in read("defences") if (row["scenario"], row["experiment"]) == (scenario, "main")]
        seeds = sorted(row["seed"] for row in rows if row["arm"] == "forgetfilter_combined")
        for arm, title in titles.items():
            of_arm = sorted(
                (row for row in rows if row["arm"] == arm and row["seed"] in seeds), key=lambda row: row["seed"]
            )
            each = [", ".join(decimal(row[key], 2) for row in of_arm) for key in ("unsafe", "task")]
            f1 = _mean_and_deviation(of_arm, "f1") if arm.startswith("forgetfilter") else "–"
            lines.append(
                [
                    f"{scenario}, seeds {', '.join(map(str, seeds))}",
                    title,
                    f"{_mean_and_deviation(of_arm, 'unsafe')} ({each[0]})",
                    f"{_mean_and_deviation(of_arm, 'task')} ({each[1]})",
                    f1,
                ]
            )
    return table(["set", "model", "unsafe", "task", "F1 of the filter"], lines, texts=2)


def _mean_and_deviation(rows: list[Row], key: str) -> str:
    values = [row[key] for row in rows]
    digits = 0 if key == "removed" else 3
    return f"{decimal(mean(values), digits)}&nbsp;±&nbsp;{decimal(stdev(values), digits)}"


def arms_of_seed_0() -> str:
    """All defences on seed 0 of bias and toxicity."""
    rows = [row for row in read("defences") if row["experiment"] == "main" and row["seed"] == 0]
    lines = []
    for arm, title in ARMS.items():
        line = [title]
        for scenario in ("bias", "toxicity"):
            (row,) = (row for row in rows if (row["scenario"], row["arm"]) == (scenario, arm))
            line += [decimal(row["unsafe"]), decimal(row["task"]), decimal(row.get("f1"))]
        lines.append(line)
    header = ["model", "bias: unsafe", "task", "F1 of the filter", "toxicity: unsafe", "task", "F1 of the filter"]
    return table(header, lines)


def mixed_harm() -> str:
    """All defences on a set with three kinds of harm, seed 0."""
    rows = [row for row in read("defences") if row["scenario"] == "mixed"]
    lines = []
    for arm, title in ARMS.items():
        (row,) = (row for row in rows if row["arm"] == arm)
        kinds = [decimal(row[kind]["unsafe"]) for kind in ("bias", "toxicity", "harmfulness")]
        lines.append([title, decimal(row["unsafe"]), *kinds, decimal(row["task"]), decimal(row.get("f1"))])
    return table(["model", "unsafe", "biased", "toxicity", "harmfulness", "task", "F1 of the filter"], lines)


def thresholds_of_other_measures() -> str:
    """The fixed φ of `loss`, `pooled` and `relative` on the data of an earlier demo."""
    lines = []
    for row in sorted(read("threshold"), key=lambda row: (row["measure"], row["unsafe_share"])):
        scores = [decimal(row[key]) for key in ("auroc", "f1_best", "f1_auto")]
        counts = [str(row["removed_auto"]), str(row["removed_benign"])]
        lines.append([f"`{row['measure']}`", f"{row['unsafe_share']:.0%}", *scores, *counts])
    return table(["measure", "unsafe", "AUROC", "best F1", "F1 at φ", "removed of 150", "of them benign"], lines)


def first_runs() -> str:
    """AUROC in the first runs: float32, one seed, a learning rate of 1e-3 in safety finetuning."""
    sets = [("bias_dev", 0.5), ("bias", 0.5), ("toxicity_dev", 0.5), ("toxicity", 0.5), ("harmfulness", 0.5),
            ("bias_dev", 0.05), ("toxicity_dev", 0.05)]  # fmt: skip
    rows = [row for row in read("filters") if row["dtype"] == "torch.float32" and row["epochs"] == 3]
    lines = []
    for signal, title in SIGNALS.items():
        found = [_last(rows, signal, scenario, share) for scenario, share in sets]
        if any(value is not None for value in found):
            lines.append([title, *map(decimal, found)])
    header = [name if share == 0.5 else f"{name}, {share:.0%} unsafe" for name, share in sets]
    return table(["signal", *header], lines)


def _last(rows: list[Row], signal: str, scenario: str, share: float) -> float | None:
    """AUROC at the end of the session, which has no step."""
    wanted = (signal, scenario, share)
    matching = [row for row in rows if (row["signal"], row["scenario"], row["unsafe_share"]) == wanted]
    return max(matching, key=lambda row: row.get("step") or math.inf)["auroc"] if matching else None


def session_costs() -> str:
    """The cost of the method beside noisy finetuning."""
    header = ["set", "rows", "unsafe", "epochs", "noisy finetuning, s", "safety finetuning, ended early, s", "a record, s",
              "decision, s", "of noisy finetuning", "with `record_base=False`", "ended at step", "AUROC"]  # fmt: skip
    lines = []
    for row in read("cost"):
        seconds = row["seconds"]
        sampled = seconds["record"] * BASE_SAMPLES / row["rows"]  # the record of the base model holds only a sample
        share = (seconds["s1plus"] + sampled + seconds["decision"]) / seconds["s1"]
        about = [row["scenario"], str(row["rows"]), f"{row['unsafe_share']:.0%}", str(row["settings"]["epochs"])]
        parts = [f"{seconds[name]:.1f}" for name in ("s1", "s1plus", "record", "decision")]
        shares = [f"{row['share_of_s1']:.0%}", f"{share:.0%}"]
        lines.append([*about, *parts, *shares, str(row["ended_at"]), decimal(row["auroc"])])
    return table(header, lines)


def record_costs() -> str:
    """Seconds and memory of one record on two CPU cores."""
    header = ["rows", "dtype", "seconds", "trunk alone", "full logits", "one row at a time", "generation (the paper)",
              "generation (`rouge1=True`)", "of an epoch", "peak MB", "peak MB, full logits"]  # fmt: skip
    kinds = {"a": "questions and passages", "b": "instructions"}
    lines = []
    for row in read("scoring"):
        ours = row["seconds"]["ours"]
        names = ("floor", "full_logits", "batch1", "generation", "generation_ours")
        peaks = [f"{row['peak_mb_above_model'][name]:.0f}" for name in ("ours", "full_logits")]
        lines.append(
            [
                kinds[row["rows"]],
                f"{row['dtype']}, {row['samples']} rows",
                f"{ours:.1f}",
                *(f"{row['seconds'][name] / ours:.2f}" for name in names),
                f"{row['share_of_training_epoch']:.0%}",
                *peaks,
            ]
        )
    return table(header, lines, texts=2)


def rows_and_memory() -> str:
    """Time and memory by the number of rows."""
    lines = []
    for row in read("scale"):
        each = row["bytes_a_row_beyond_token_ids"]
        lines.append(
            [
                f"{row['rows']:,}",
                f"{row['seconds']:.1f}",
                f"{1e6 * row['seconds'] / row['rows']:.0f}",
                f"{row['peak_bytes'] / 2**20:.0f}",
                "–" if each is None else f"{each:.0f}",
            ]
        )
    header = [
        "rows",
        "seconds",
        "microseconds a row",
        "peak MiB",
        "bytes a row beyond the token ids, from the row above",
    ]
    return table(header, lines)


def long_rows_and_memory() -> str:
    """Memory of each stage by the number of rows of 500 tokens."""
    stages = {"record": "encode and record", "decide": "rank and filter", "export": "export to Parquet"}
    lines = []
    for row in read("scale_500"):
        for name, shown in stages.items():
            stage = row["stages"][name]
            each = stage["bytes_a_row_beyond_token_ids"]
            growth = "–" if each is None else f"{each / row['length']:.1f}"
            lines.append([shown, f"{row['rows']:,}", f"{stage['peak_bytes'] / 2**20:.0f}", growth])
    lines.sort(key=lambda line: [*stages.values()].index(line[0]))
    return table(["stage", "rows", "peak MiB", "bytes a token beyond the token ids, from the row above"], lines)


def page_sizes() -> str:
    """The review page by the number of samples."""
    lines = [
        [
            f"{row['samples']:,}",
            f"{row['seconds_to_write']:.1f}",
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['seconds_to_open']:.1f}",
        ]
        for row in read("page")
    ]
    return table(["samples", "seconds to write", "MB", "seconds to open"], lines)


def review_rounds() -> str:
    """Opening a review, and a round of ten verdicts, by the number of rows."""
    seconds = ("seconds_to_open", "first_round_with_an_unsafe_row", "median_of_other_rounds", "slowest_other_round")
    lines = [
        [
            f"{row['rows']:,}",
            *(f"{row[name]:.2f}" for name in seconds),
        ]
        for row in read("review_speed")
    ]
    return table(
        [
            "rows",
            "seconds to open",
            "first round with an unsafe row",
            "median of 19 other rounds",
            "slowest other round",
        ],
        lines,
    )


def gpu_speed() -> str:
    """Seconds and memory of one record on an H100."""
    lines = []
    for kind in ("instructions", "passages"):
        row = read("gpu")["speed, Llama-1B"][kind]
        times = [f"{row['times a record'][name]:.2f}" for name in ("floor", "full logits", "one row at a time")]
        peaks = [f"{row['peak MiB above the model'][name]:.0f}" for name in ("record", "full logits")]
        counts = [f"{row[name]:,}" for name in ("tokens", "loss tokens")]
        record = f"{row['seconds, median']['record']:.2f}"
        lines.append([kind, *counts, record, *times, f"{row['record as a fraction of the epoch']:.1%}", *peaks])
    header = ["rows", "tokens", "of them count", "seconds", "trunk alone", "full logits", "one row at a time", "of an epoch",
              "peak MiB", "peak MiB, full logits"]  # fmt: skip
    return table(header, lines)


FUNCTIONS = (
    measures_by_seed, combined_and_smoothed, automatic_threshold, unsafe_fractions, measures_by_fraction, controls,
    arms_over_seeds, arms_by_the_default_measure, arms_of_seed_0, mixed_harm, thresholds_of_other_measures, first_runs,
    session_costs, record_costs, gpu_speed, rows_and_memory, long_rows_and_memory, page_sizes, review_rounds,
)  # fmt: skip
TABLES: dict[str, Callable[[], str]] = {function.__name__: function for function in FUNCTIONS} | few_tables.TABLES
