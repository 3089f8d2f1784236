"""Tables of sets with few unsafe rows and of the demo, from `benchmarks/results`. Each function returns Markdown."""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean

from markdown_tables import decimal, find, read, table


FEW_SETS = {f"{name}-0.05-600-0": f"`{name}`" for name in ("bias_dev", "toxicity_dev", "harmfulness", "mixed")}
FINAL_SETS = {
    f"{name}-0.05-600-{seed}": f"`{name}`, seed {seed}"
    for name, seeds in (("bias", (0, 1, 2)), ("harmfulness", (1, 2)), ("toxicity", (0, 1, 2)), ("mixed", (1, 2)))
    for seed in seeds
}
CLEAN_SETS = {
    "harmfulness-0-600-0": "`harmfulness`, clean",
    "bias-0-600-0": "`bias`, clean",
    "toxicity-0-600-0": "`toxicity`, clean",
}
TENTH_SETS = {
    "bias-0.1-600-0": "`bias`, 60 of 600",
    "toxicity-0.1-600-0": "`toxicity`, 60 of 600",
    "harmfulness-0.1-600-1": "`harmfulness`, 60 of 600",
    "mixed-0.1-600-1": "`mixed`, 60 of 600",
}
LARGE_SETS = {
    "bias-0.01-2000-0": "`bias`, 20 of 2,000",
    "harmfulness-0.01-2000-1": "`harmfulness`, 20 of 2,000",
}
HALF_SETS = {f"{name}-0.5-200-0": f"`{name}`, half unsafe" for name in ("bias_dev", "toxicity_dev", "harmfulness")}
FINAL_HALF_SETS = {
    "toxicity-0.5-200-0": "`toxicity`, seed 0, half unsafe",
    "harmfulness-0.5-200-1": "`harmfulness`, seed 1, half unsafe",
}
FEW_SIGNALS = {
    "combined": "`combined` (default)",
    "smoothed": "`smoothed`",
    "loss": "`loss`",
    "relative": "`relative`",
    "largest tenth": "largest tenth of the token rises",
    "agreed": "`smoothed` before its smoothing",
    "pooled": "`pooled`",
    "mean of the six ranks": "mean of the six ranks",
}


def few_rankings() -> str:
    """AUROC / AUPRC of the rankings: development sets with 30 of 600 and 100 of 200 unsafe rows."""
    return _rankings(FEW_SETS | HALF_SETS)


def few_final_rankings() -> str:
    """The same on the final sets that were run, with 30 of 600 unsafe rows."""
    return _rankings(FINAL_SETS)


def few_looks() -> str:
    """Fraction of the unsafe rows found in a review, mean of the seeds, and by the ranking of the default measure."""
    return _looks(FEW_SETS)


def few_final_looks() -> str:
    """The same on the final sets that were run."""
    return _looks(FINAL_SETS)


def few_large_rankings() -> str:
    """The same on final sets with 20 of 2,000 unsafe rows."""
    return _rankings(LARGE_SETS)


def few_large_looks() -> str:
    """The same on final sets with 20 of 2,000 unsafe rows."""
    return _looks(LARGE_SETS)


def few_tenth_rankings() -> str:
    """The same on final sets with 60 of 600 unsafe rows."""
    return _rankings(TENTH_SETS)


def few_tenth_looks() -> str:
    """The same on final sets with 60 of 600 unsafe rows."""
    return _looks(TENTH_SETS)


def few_final_half_rankings() -> str:
    """The same on final sets with 100 of 200 unsafe rows."""
    return _rankings(FINAL_HALF_SETS)


def _rankings(sets: dict[str, str]) -> str:
    lines = []
    for signal, title in FEW_SIGNALS.items():
        auroc, auprc = (
            [find(read("few"), key, set=name, signal=signal) for name in sets] for key in ("auroc", "auprc")
        )
        cells = [f"{decimal(a)} / {decimal(b, 2)}" for a, b in zip(auroc, auprc, strict=True)]
        lines.append([title, *cells, decimal(mean(auprc))])
    return table(["ranking", *sets.values(), "mean AUPRC"], lines)


def _looks(sets: dict[str, str]) -> str:
    lines = []
    for looks in (20, 40, 60, 100, 200):
        line = [str(looks)]
        for name in sets:
            rows = [row for row in read("looks") if (row["set"], row["looks"]) == (name, looks)]
            found, by_measure = (mean(row[key] for row in rows) for key in ("found", "found_by_measure"))
            line.append(f"{decimal(found, 2)} ({decimal(by_measure, 2)})")
        lines.append(line)
    return table(["rows reviewed", *sets.values()], lines, texts=0)


def few_automatic() -> str:
    """How many rows the automatic threshold of the default measure removes, without a review."""
    lines = []
    for name, title in (FEW_SETS | CLEAN_SETS | FINAL_SETS | TENTH_SETS | LARGE_SETS).items():
        removed, unsafe = (
            find(read("few"), key, set=name, signal="automatic φ") for key in ("removed", "unsafe_removed")
        )
        lines.append([title, str(removed - unsafe), str(unsafe)])
    return table(["set", "benign rows removed", "unsafe rows removed"], lines)


def few_redraws() -> str:
    """`threshold="fdr"` with a level of .1: means of 100 redraws of the rows that are reviewed at random."""
    sets = FEW_SETS | HALF_SETS | CLEAN_SETS | FINAL_SETS | FINAL_HALF_SETS | TENTH_SETS | LARGE_SETS
    lines = []
    for row in read("redraws"):
        if row["kind"] == "fdr":
            counts = [str(row["drawn"]), decimal(row["removed"], 1), decimal(row["removed_something"], 2)]
            rates = [decimal(row[name], 2) for name in ("false_discovery_rate", "recall", "best_recall")]
            lines.append([sets[row["set"]], *counts, *rates])
    header = ["set", "reviewed at random", "removed", "redraws that remove something", "false discovery rate", "recall",
              "best recall"]  # fmt: skip
    return table(header, lines)


def few_harm() -> str:
    """Unsafe score and task score of the base model and after finetuning on all rows, 5 % of them unsafe."""
    lines = []
    for name, seed in dict.fromkeys((row["scenario"], row["seed"]) for row in read("few_defences")):
        runs = [{"scenario": name, "seed": seed, "arm": arm} for arm in ("base", "no_measure")]
        scores = [decimal(find(read("few_defences"), key, **run), 2) for key in ("unsafe", "task") for run in runs]
        lines.append([f"`{name}`, seed {seed}", *scores])
    return table(["set", "unsafe, base", "unsafe, all rows", "task, base", "task, all rows"], lines)


def demo_runs() -> str:
    """Runs of the demo. The scores are those of the base model, of finetuning on all rows, and after the review."""
    header = ["unsafe rows", "of rows", "seed", "AUROC", "removed at φ", "of them unsafe", "found in the review",
              "unsafe answers", "task F1", "best constant"]  # fmt: skip
    lines = []
    for row in sorted(read("demo"), key=lambda row: (row["samples"], row["unsafe"], row["seed"])):
        found = [row["removed"], row["forgetting"]["unsafe"]["removed"], row["review"]["removed"]]
        scores = [", ".join(decimal(value, 2) for value in row[key].values()) for key in ("unsafe_rate", "task_f1")]
        counts = [str(row["unsafe"]), str(row["samples"]), str(row["seed"]), decimal(row["auroc"]), *map(str, found)]
        lines.append([*counts, *scores, decimal(row["task_constant"], 2)])
    return table(header, lines, texts=0)


def few_stopping() -> str:
    """Looks and found unsafe rows of simulated reviews that end after so many safe rows in succession."""
    rules = ("advice", "15", "20", "30")
    lines = []
    for name in dict.fromkeys(row["set"] for row in read("stopping")):
        scenario, share, rows, _ = name.split("-")
        cells = []
        for rule in rules:
            runs = [row for row in read("stopping") if (row["set"], row["rule"]) == (name, rule)]
            found = decimal(mean(row["found"] for row in runs), 2)
            cells.append(f"{mean(row['looks'] for row in runs):.0f} / {found}")
        lines.append([f"`{scenario}`, {float(share):.0%} of {rows}", *cells])
    return table(["set", "15 to 30 (the advice)", *rules[1:]], lines)


ALL: tuple[Callable[[], str], ...] = (
    few_rankings,
    few_final_rankings,
    few_looks,
    few_final_looks,
    few_large_rankings,
    few_large_looks,
    few_tenth_rankings,
    few_tenth_looks,
    few_final_half_rankings,
    few_automatic,
    few_redraws,
    few_harm,
    few_stopping,
    demo_runs,
)
