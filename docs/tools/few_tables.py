"""Tables of sets with few unsafe rows and of the demo, from `benchmarks/results`. Each function returns Markdown."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import mean

from markdown_tables import Row, decimal, find, read, table


FEW_SETS = {f"{name}-0.05-600-0": f"`{name}`" for name in ("bias_dev", "toxicity_dev", "harmfulness", "mixed")}


def seeds_of(fraction: str, seeds: dict[str, tuple[int, ...]], share: str = "") -> dict[str, str]:
    """Names and titles of sets of 600 rows that differ by their kind and seed."""
    return {f"{kind}-{fraction}-600-{seed}": f"`{kind}`, seed {seed}{share}" for kind in seeds for seed in seeds[kind]}


FINAL_SETS = seeds_of("0.05", {"bias": (0, 1, 2), "harmfulness": (1, 2), "toxicity": (0, 1, 2), "mixed": (1, 2)})
CLEAN_SETS = {"harmfulness-0-600-0": "`harmfulness`, clean"}
FINAL_CLEAN_SETS = {
    "bias-0-600-0": "`bias`, clean",
    "toxicity-0-600-0": "`toxicity`, clean",
    "harmfulness-0-600-1": "`harmfulness`, seed 1, clean",
    "mixed-0-600-1": "`mixed`, clean",
}
TENTH_SETS = {
    "bias-0.1-600-0": "`bias`, 60 of 600",
    "toxicity-0.1-600-0": "`toxicity`, 60 of 600",
    "harmfulness-0.1-600-1": "`harmfulness`, 60 of 600",
    "mixed-0.1-600-1": "`mixed`, 60 of 600",
}
LATER_SETS = seeds_of("0.05", dict.fromkeys(("bias", "harmfulness", "toxicity", "mixed"), (3, 4, 5)))
ONE_PERCENT_SETS = {
    "bias-0.01-600-0": "`bias`, 6 of 600",
    "toxicity-0.01-600-0": "`toxicity`, 6 of 600",
    "harmfulness-0.01-600-1": "`harmfulness`, 6 of 600",
    "mixed-0.01-600-1": "`mixed`, 6 of 600",
}
TWO_PERCENT_SETS = seeds_of(
    "0.02", {"bias": (0, 1), "toxicity": (0, 1), "harmfulness": (1, 2), "mixed": (1, 2)}, ", 12 of 600"
)
FIRST_TWO_PERCENT_SETS = {
    name: TWO_PERCENT_SETS[name]
    for name in ("bias-0.02-600-0", "toxicity-0.02-600-0", "harmfulness-0.02-600-1", "mixed-0.02-600-1")
}
LARGE_SETS = {
    "bias-0.01-2000-0": "`bias`, 20 of 2,000",
    "harmfulness-0.01-2000-1": "`harmfulness`, 20 of 2,000",
}
HUNDRED_SETS = {"harmfulness-0.05-2000-1": "`harmfulness`, 100 of 2,000"}
TEN_SETS = {
    "bias-0.05-200-0": "`bias`, 10 of 200",
    "toxicity-0.05-200-0": "`toxicity`, 10 of 200",
    "harmfulness-0.05-200-1": "`harmfulness`, 10 of 200",
    "mixed-0.05-200-1": "`mixed`, 10 of 200",
}
HALF_SETS = {f"{name}-0.5-200-0": f"`{name}`, half unsafe" for name in ("bias_dev", "toxicity_dev", "harmfulness")}
FINAL_HALF_SETS = {
    "toxicity-0.5-200-0": "`toxicity`, seed 0, half unsafe",
    "harmfulness-0.5-200-1": "`harmfulness`, seed 1, half unsafe",
}
SMALL_SETS = {
    "bias_dev-0.1-100-0": "`bias_dev`, 10 of 100",
    "toxicity_dev-0.1-100-0": "`toxicity_dev`, 10 of 100",
    "harmfulness-0.1-100-0": "`harmfulness`, 10 of 100",
    "toxicity_dev-0.05-200-0": "`toxicity_dev`, 10 of 200",
    "harmfulness-0.05-200-0": "`harmfulness`, 10 of 200",
    "mixed-0.1-200-0": "`mixed`, 20 of 200",
}
# AUPRC without a review, and fraction found after 60 rows.
GOALS = {"bias": (0.9, 0.95), "harmfulness": (0.75, 0.95), "toxicity": (0.4, 0.75), "mixed": (0.4, 0.7)}
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


def rankings(sets: dict[str, str]) -> str:
    """AUROC / AUPRC of the rankings of some sets, and the mean AUPRC."""
    lines = []
    for signal, title in FEW_SIGNALS.items():
        auroc, auprc = (
            [find(read("few"), key, set=name, signal=signal) for name in sets] for key in ("auroc", "auprc")
        )
        cells = [f"{decimal(a)} / {decimal(b, 2)}" for a, b in zip(auroc, auprc, strict=True)]
        lines.append([title, *cells, decimal(mean(auprc))])
    return table(["ranking", *sets.values(), "mean AUPRC"], lines)


def looks(sets: dict[str, str], results: str = "looks") -> str:
    """Fraction of the unsafe rows found in a review, mean of its seeds, and by the ranking of the default measure."""
    lines = []
    for count in (20, 40, 60, 100, 200):
        line = [str(count)]
        for name in sets:
            found, by_measure = (mean_at(read(results), name, count, key) for key in ("found", "found_by_measure"))
            line.append(f"{decimal(found, 2)} ({decimal(by_measure, 2)})")
        lines.append(line)
    return table(["rows reviewed", *sets.values()], lines, texts=0)


def few_goals() -> str:
    """The goals for 30 of 600 rows and what was measured: AUPRC without a review, and found rows. Means over seeds."""
    header = ["kind", "AUPRC: goal", "seeds 0 to 2", "seeds 3 to 5",
              "found after 60 rows: goal", "seeds 0 to 2, first version", "seeds 3 to 5, second version"]  # fmt: skip
    lines = []
    for kind, (auprc_goal, found_goal) in GOALS.items():
        first, later = ([name for name in sets if name.startswith(f"{kind}-")] for sets in (FINAL_SETS, LATER_SETS))
        auprc = [auprc_goal, mean_auprc(first), mean_auprc(later)]
        found = [found_goal, mean_found(first, "looks_first_version"), mean_found(later, "looks")]
        lines.append([f"`{kind}`", *(decimal(value, 2) for value in [*auprc, *found])])
    return table(header, lines)


def mean_auprc(sets: list[str]) -> float:
    """AUPRC of the default measure without a review, mean of the sets."""
    return mean(find(read("few"), "auprc", set=name, signal="combined") for name in sets)


def mean_found(sets: list[str], results: str) -> float:
    """Fraction of the unsafe rows found in a review of 60 rows, mean of the sets and of five reviews each."""
    return mean(row["found"] for row in read(results) if row["set"] in sets and row["looks"] == 60)


def few_automatic() -> str:
    """How many rows the automatic threshold of the default measure removes, without a review."""
    lines = []
    for name, title in (
        FEW_SETS
        | CLEAN_SETS
        | FINAL_CLEAN_SETS
        | FINAL_SETS
        | LATER_SETS
        | ONE_PERCENT_SETS
        | TWO_PERCENT_SETS
        | TENTH_SETS
        | TEN_SETS
        | LARGE_SETS
        | HUNDRED_SETS
    ).items():
        removed, unsafe = (
            find(read("few"), key, set=name, signal="automatic φ") for key in ("removed", "unsafe_removed")
        )
        lines.append([title, str(removed - unsafe), str(unsafe)])
    return table(["set", "benign rows removed", "unsafe rows removed"], lines)


def redraws(sets: dict[str, str], results: str = "redraws") -> str:
    """`threshold="fdr"` with a level of .1: means of 100 redraws of the rows that are reviewed at random."""
    lines = []
    for name, title in sets.items():
        cells = []
        for drawn in (100, 200, 300):
            wanted = {"kind": "fdr", "set": name, "drawn": drawn}
            keys = ("false_discovery_rate", "recall", "best_recall")
            if drawn >= int(name.split("-")[-2]):  # the set has no other rows
                cells.append("–")
                continue
            rate, recall, best = (decimal(find(read(results), key, **wanted), 2) for key in keys)
            cells.append(f"{rate} / {recall} ({best})")
        lines.append([title, *cells])
    return table(["set", "100 rows", "200 rows", "300 rows"], lines)


def few_harm() -> str:
    """Unsafe score / task score of each arm, 5 % of the rows unsafe."""
    arms = {"base": "base model", "no_measure": "all rows", "forgetfilter": "automatic φ",
            "forgetfilter_60_looks": "review of 60 rows", "oracle": "rows labeled safe"}  # fmt: skip
    results = read("few_defences")
    lines = []
    for scenario, seed in sorted({(row["scenario"], row["seed"]) for row in results}):
        cells = []
        for arm in arms:
            unsafe, task = (find(results, key, scenario=scenario, seed=seed, arm=arm) for key in ("unsafe", "task"))
            cells.append("–" if unsafe is None else f"{decimal(unsafe, 2)} / {decimal(task, 2)}")
        lines.append([f"`{scenario}`, seed {seed}", *cells])
    return table(["set", *arms.values()], lines)


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


def label_agreement() -> str:
    """How many of the rows that readers read have which label, and how many of these they call unsafe."""
    results = read("label_agreement")
    lines = []
    for name, reader in dict.fromkeys((row["set"], row["reader"]) for row in results):
        cells = []
        for label in ("unsafe", "safe"):
            counts = (find(results, key, set=name, reader=reader, label=label) for key in ("read", "called_unsafe"))
            cells += [f"{count:.0f}" for count in counts]
        lines.append([f"`{name.split('-')[0]}`, {label_share(name)}", reader, *cells])
    header = ["set", "reader", "labeled unsafe", "called unsafe", "labeled safe", "called unsafe"]
    return table(header, lines, texts=2)


def label_share(name: str) -> str:
    """Number of unsafe rows and of all rows in the name of a set."""
    fraction, rows = name.split("-")[1:3]
    return f"{float(fraction) * int(rows):.0f} of {int(rows):,}"


def readers_reviews() -> str:
    """Fraction of the rows that a reader calls unsafe that a review with the reader's verdicts finds."""
    results = [row for row in read("label_agreement") if "found" in row]
    lines = []
    for count in ("20", "40", "60", "100", "200"):
        cells = [f"{decimal(row['found'][count], 2)} ({decimal(row['found_by_measure'][count], 2)})" for row in results]
        lines.append([count, *cells])
    return table(["rows reviewed", *(row["reader"] for row in results)], lines, texts=0)


def mistakes() -> str:
    """Simulated reviews whose verdicts are right, and those in which a tenth of them are wrong. Means of the seeds."""
    wrong = read("looks_with_mistakes")
    names = {row["set"] for row in wrong}
    lines = []
    for name, title in (ONE_PERCENT_SETS | TWO_PERCENT_SETS | TEN_SETS | HUNDRED_SETS).items():
        if name not in names:
            continue
        cells = []
        for count in (60, 100):
            found = [decimal(mean_at(results, name, count, "found"), 2) for results in (read("looks"), wrong)]
            cells += [*found, f"{mean_at(wrong, name, count, 'safe_called_unsafe'):.0f}"]
        lines.append([title, *cells])
    columns = ("found", "found with mistakes", "safe rows removed")
    return table(["set", *(f"{count} rows: {column}" for count in (60, 100) for column in columns)], lines)


def mean_at(results: list[Row], name: str, count: int, key: str) -> float:
    return mean(row[key] for row in results if (row["set"], row["looks"]) == (name, count))


def stopping(sets: dict[str, str]) -> str:
    """Looks and found unsafe rows of simulated reviews that end after so many safe rows in succession."""
    rules = ("advice", "15", "20", "30")
    lines = []
    for name, title in sets.items():
        cells = []
        for rule in rules:
            runs = [row for row in read("stopping") if (row["set"], row["rule"]) == (name, rule)]
            found = decimal(mean(row["found"] for row in runs), 2)
            cells.append(f"{mean(row['looks'] for row in runs):.0f} / {found}")
        lines.append([title, *cells])
    return table(["set", "15 to 30 (the advice)", *rules[1:]], lines)


TABLES: dict[str, Callable[[], str]] = {
    "few_rankings": partial(rankings, FEW_SETS | HALF_SETS),
    "few_final_rankings": partial(rankings, FINAL_SETS),
    "few_later_rankings": partial(rankings, LATER_SETS),
    "few_one_percent_rankings": partial(rankings, ONE_PERCENT_SETS),
    "few_two_percent_rankings": partial(rankings, TWO_PERCENT_SETS),
    "few_tenth_rankings": partial(rankings, TENTH_SETS),
    "few_final_half_rankings": partial(rankings, FINAL_HALF_SETS),
    "few_ten_rankings": partial(rankings, TEN_SETS),
    "few_large_rankings": partial(rankings, LARGE_SETS | HUNDRED_SETS),
    "few_looks": partial(looks, FEW_SETS, "looks_first_version"),
    "few_final_looks": partial(looks, FINAL_SETS, "looks_first_version"),
    "few_later_looks": partial(looks, LATER_SETS),
    "few_later_looks_first_version": partial(looks, LATER_SETS, "looks_first_version"),
    "few_one_percent_looks": partial(looks, ONE_PERCENT_SETS),
    "few_two_percent_looks": partial(looks, TWO_PERCENT_SETS),
    "few_two_percent_looks_first_version": partial(looks, FIRST_TWO_PERCENT_SETS, "looks_first_version"),
    "few_tenth_looks": partial(looks, TENTH_SETS),
    "few_ten_looks": partial(looks, TEN_SETS),
    "few_large_looks": partial(looks, LARGE_SETS),
    "few_hundred_looks": partial(looks, HUNDRED_SETS),
    "few_goals": few_goals,
    "few_mistakes": mistakes,
    "few_automatic": few_automatic,
    "few_redraws": partial(
        redraws,
        FINAL_CLEAN_SETS
        | LATER_SETS
        | ONE_PERCENT_SETS
        | TWO_PERCENT_SETS
        | TENTH_SETS
        | TEN_SETS
        | FINAL_HALF_SETS
        | LARGE_SETS
        | HUNDRED_SETS,
    ),
    "few_redraws_first_version": partial(
        redraws, FEW_SETS | CLEAN_SETS | HALF_SETS | FINAL_SETS, "redraws_first_version"
    ),
    "few_harm": few_harm,
    "label_agreement": label_agreement,
    "readers_reviews": readers_reviews,
    "few_stopping": partial(stopping, SMALL_SETS),
    "few_final_stopping": partial(
        stopping,
        LATER_SETS | ONE_PERCENT_SETS | TWO_PERCENT_SETS | TENTH_SETS | TEN_SETS | LARGE_SETS | HUNDRED_SETS,
    ),
    "demo_runs": demo_runs,
}
