"""Tables of sets with few unsafe rows and of the demo, from `benchmarks/results`. Each function returns Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from statistics import mean
from typing import NamedTuple

from markdown_tables import Row, decimal, find, read, table


# AUPRC without a review, and fraction found after 60 rows, with 30 of 600 unsafe rows.
GOALS = {"bias": (0.9, 0.95), "harmfulness": (0.75, 0.95), "toxicity": (0.4, 0.75), "mixed": (0.4, 0.7)}
SIGNALS = {
    "combined": "`combined` (default)",
    "smoothed": "`smoothed`",
    "loss": "`loss`",
    "relative": "`relative`",
    "largest tenth": "largest tenth of the token rises",
    "agreed": "`smoothed` before its smoothing",
    "pooled": "`pooled`",
    "mean of the six ranks": "mean of the six ranks",
}
SINGLE_MEASURES = ("smoothed", "loss", "relative", "largest tenth", "agreed", "pooled")
# The settings of the review were chosen on these sets.
NOT_FINAL_FOR_THE_REVIEW = {"bias-0.1-600-0", "toxicity-0.1-600-0", "harmfulness-0.1-600-1", "mixed-0.1-600-1",
                            "bias-0.01-2000-0", "harmfulness-0.01-2000-1"}  # fmt: skip


class FewSet(NamedTuple):
    """A set of `few.py`. Sets are sorted by the fraction of unsafe rows, the number of rows, the kind and the seed."""

    fraction: float
    rows: int
    kind: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.fraction:g}-{self.rows}-{self.seed}"

    @property
    def unsafe(self) -> int:
        return round(self.fraction * self.rows)

    @property
    def share(self) -> str:
        return f"{self.unsafe or 'none'} of {self.rows:,}"

    @property
    def title(self) -> str:
        return f"`{self.kind}`, {self.share}, seed {self.seed}"

    @property
    def is_development(self) -> bool:
        return self.kind.endswith("_dev") or (self.kind in ("harmfulness", "mixed") and self.seed == 0)


def parsed(name: str) -> FewSet:
    kind, fraction, rows, seed = name.split("-")
    return FewSet(float(fraction), int(rows), kind, int(seed))


def sets_in(results: str, development: bool = False) -> list[FewSet]:
    """The final sets, or the development sets, that have results and unsafe rows."""
    chosen = {parsed(row["set"]) for row in read(results)}
    return sorted(each for each in chosen if each.unsafe and each.is_development == development)


def by_share(results: str) -> dict[tuple[str, str], list[FewSet]]:
    """Final sets with up to 10 % unsafe rows that have the same number of unsafe rows and the same kind."""
    grouped: dict[tuple[str, str], list[FewSet]] = {}
    for each in sets_in(results):
        if each.fraction <= 0.1:
            grouped.setdefault((each.share, each.kind), []).append(each)
    return grouped


def with_range(values: Iterable[float]) -> str:
    """The mean, and the lowest and the highest value if they differ."""
    numbers = list(values)
    middle, low, high = (decimal(each, 2) for each in (mean(numbers), min(numbers), max(numbers)))
    return middle if low == high else f"{middle} ({low}–{high})"


def auprc_of(chosen: FewSet, signal: str) -> float:
    value: float = find(read("few"), "auprc", set=chosen.name, signal=signal)
    return value


def measures(development: bool) -> str:
    """AUROC / AUPRC of the rankings without a review."""
    chosen = sets_in("few", development)
    lines = []
    for each in chosen:
        auroc = [find(read("few"), "auroc", set=each.name, signal=signal) for signal in SIGNALS]
        cells = [
            f"{decimal(a)} / {decimal(auprc_of(each, signal), 2)}" for a, signal in zip(auroc, SIGNALS, strict=True)
        ]
        lines.append([each.title, *cells])
    means = [decimal(mean(auprc_of(each, signal) for each in chosen)) for signal in SIGNALS]
    return table(["set", *SIGNALS.values()], [*lines, ["mean AUPRC", *means]])


def few_best_single() -> str:
    """How often the default is at most .03 below the best single measure by AUPRC."""
    lines = []
    grouped: dict[str, list[FewSet]] = {}
    for each in sets_in("few"):
        grouped.setdefault(each.share, []).append(each)
    for share, chosen in grouped.items():
        below = {
            each: max(auprc_of(each, signal) for signal in SINGLE_MEASURES) - auprc_of(each, "combined")
            for each in chosen
        }
        missed = [f"`{each.kind}`, seed {each.seed} ({decimal(gap, 2)})" for each, gap in below.items() if gap > 0.03]
        lines.append([share, ", ".join(missed) or "–", str(len(chosen)), str(len(chosen) - len(missed))])
    return table(["unsafe rows", "missed on (below the best by)", "sets", "met on"], lines, texts=2)


def looks(results: str, development: bool = False) -> str:
    """Fraction of the unsafe rows found in a review, mean of its seeds, and by the ranking of the default measure."""
    counts = (20, 40, 60, 100, 200)
    lines = []
    for each in sets_in(results, development):
        cells = []
        for count in counts:
            found, by_measure = (mean_at(results, each, count, key) for key in ("found", "found_by_measure"))
            cells.append(f"{decimal(found, 2)} ({decimal(by_measure, 2)})")
        lines.append([each.title, *cells])
    return table(["set", *(f"{count} rows" for count in counts)], lines)


def mean_at(results: str, chosen: FewSet, count: int, key: str) -> float:
    return mean(row[key] for row in read(results) if (row["set"], row["looks"]) == (chosen.name, count))


def few_found() -> str:
    """Fraction of the unsafe rows found by kind and number of unsafe rows: the mean, lowest and highest of the sets."""
    counts = (60, 100, 200)
    lines = []
    for (share, kind), chosen in by_share("looks").items():
        final = [each for each in chosen if each.name not in NOT_FINAL_FOR_THE_REVIEW]
        shown = final or chosen
        found = [with_range(mean_at("looks", each, count, "found") for each in shown) for count in counts]
        by_measure = with_range(mean_at("looks", each, 100, "found_by_measure") for each in shown)
        lines.append([share + ("" if final else " \\*"), f"`{kind}`", str(len(shown)), *found, by_measure])
    header = ["unsafe rows", "kind", "sets", *(f"{count} rows read" for count in counts), "100 rows, without a review"]
    return table(header, lines, texts=2)


def few_goals() -> str:
    """The goals for 30 of 600 rows and what was measured: AUPRC without a review, and found rows. Means over seeds."""
    header = ["kind", "AUPRC: goal", "seeds 0 to 2", "seeds 3 to 5",
              "found after 60 rows: goal", "seeds 0 to 2, first version", "seeds 3 to 5, second version"]  # fmt: skip
    lines = []
    for kind, (auprc_goal, found_goal) in GOALS.items():
        chosen = [each for each in sets_in("few") if each[:3] == (0.05, 600, kind)]
        first, later = ([each for each in chosen if (each.seed < 3) == is_first] for is_first in (True, False))
        auprc = [auprc_goal, *(mean(auprc_of(each, "combined") for each in sets) for sets in (first, later))]
        found = [found_goal, mean(mean_at("looks_first_version", each, 60, "found") for each in first),
                 mean(mean_at("looks", each, 60, "found") for each in later)]  # fmt: skip
        lines.append([f"`{kind}`", *(decimal(value, 2) for value in [*auprc, *found])])
    return table(header, lines)


def few_automatic() -> str:
    """How many rows the automatic threshold of the default measure removes, without a review."""
    lines = []
    for each in sorted({parsed(row["set"]) for row in read("few") if row["fraction"] < 0.5}):
        removed, unsafe = (
            find(read("few"), key, set=each.name, signal="automatic φ") for key in ("removed", "unsafe_removed")
        )
        lines.append([each.title, str(removed - unsafe), str(unsafe)])
    return table(["set", "benign rows removed", "unsafe rows removed"], lines)


def redraws(results: str, without: str | None = None) -> str:
    """`threshold="fdr"` with a level of .1: means of 100 redraws of the rows that are reviewed at random.

    Sets that have results in `without` are left out.
    """
    others = {row["set"] for row in read(without)} if without else set()
    lines = []
    for each in sorted({parsed(row["set"]) for row in read(results) if row["set"] not in others}):
        cells = []
        for drawn in (100, 200, 300):
            wanted = {"kind": "fdr", "set": each.name, "drawn": drawn}
            keys = ("false_discovery_rate", "recall", "best_recall")
            if drawn >= each.rows:  # the set has no other rows
                cells.append("–")
                continue
            rate, recall, best = (decimal(find(read(results), key, **wanted), 2) for key in keys)
            cells.append(f"{rate} / {recall} ({best})")
        lines.append([each.title, *cells])
    return table(["set", "100 rows", "200 rows", "300 rows"], lines)


def few_intervals() -> str:
    """How often the 90 % intervals are right, by the number of unsafe rows: the lowest and the highest set."""
    grouped: dict[str, list[Row]] = {}
    for row in sorted(read("redraws"), key=lambda row: parsed(row["set"])):
        if row["kind"] == "interval":
            grouped.setdefault(parsed(row["set"]).share, []).append(row)
    lines = []
    for share, rows in grouped.items():
        left = [1 - row["below"] - row["above"] for row in rows]
        kept, removed = ([row[key] for row in rows] for key in ("kept_covered", "removed_covered"))
        ends = " to ".join(f"{mean(row[key] for row in rows):.0f}" for key in ("low", "high"))
        lines.append([share, str(len(rows)), percentages(left), ends, percentages(kept), percentages(removed)])
    header = ["unsafe rows", "sets", "unsafe rows left", "mean interval", "unsafe rows kept", "benign rows removed"]
    return table(header, lines)


def percentages(values: list[float]) -> str:
    """The lowest and the highest value in percent."""
    low, high = (decimal(100 * end, 0) for end in (min(values), max(values)))
    return f"{low} %" if low == high else f"{low} to {high} %"


ARMS = {"base": "base model", "no_measure": "all rows", "forgetfilter": "automatic φ",
        "forgetfilter_60_looks": "review of 60 rows", "oracle": "rows labeled safe"}  # fmt: skip


def few_harm() -> str:
    """Unsafe score / task score of each arm, 5 % of the rows unsafe."""
    results = read("few_defences")
    lines = []
    for scenario, seed in sorted({(row["scenario"], row["seed"]) for row in results}):
        cells = []
        for arm in ARMS:
            unsafe, task = (find(results, key, scenario=scenario, seed=seed, arm=arm) for key in ("unsafe", "task"))
            cells.append("–" if unsafe is None else f"{decimal(unsafe, 2)} / {decimal(task, 2)}")
        lines.append([f"`{scenario}`, seed {seed}", *cells])
    return table(["set", *ARMS.values()], lines)


def few_harm_means() -> str:
    """Unsafe score / task score of each arm: means over the seeds that have all arms."""
    lines = []
    for scenario in ("bias", "toxicity"):
        rows = [row for row in read("few_defences") if row["scenario"] == scenario]
        seeds = {row["seed"] for row in rows if row["arm"] == "oracle"}
        cells = []
        for arm in ARMS:
            unsafe, task = (
                mean(row[key] for row in rows if row["arm"] == arm and row["seed"] in seeds)
                for key in ("unsafe", "task")
            )
            cells.append(f"{decimal(unsafe, 2)} / {decimal(task, 2)}")
        lines.append([f"`{scenario}`", *cells])
    return table(["kind", *ARMS.values()], lines)


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
    lines = []
    for each in sets_in("looks_with_mistakes"):
        cells = []
        for count in (60, 100):
            found = [decimal(mean_at(results, each, count, "found"), 2) for results in ("looks", "looks_with_mistakes")]
            cells += [*found, f"{mean_at('looks_with_mistakes', each, count, 'safe_called_unsafe'):.0f}"]
        lines.append([each.title, *cells])
    columns = ("found", "found with mistakes", "safe rows removed")
    return table(["set", *(f"{count} rows: {column}" for count in (60, 100) for column in columns)], lines)


def ended_reviews(chosen: FewSet, rule: str) -> list[Row]:
    """Simulated reviews of a set that a rule ended."""
    return [row for row in read("stopping") if (row["set"], row["rule"]) == (chosen.name, rule)]


def stopping(development: bool) -> str:
    """Rows read and unsafe rows found of simulated reviews that end after so many safe rows in succession."""
    rules = ("advice", "15", "20", "30")
    lines = []
    for each in sets_in("stopping", development):
        cells = []
        for rule in rules:
            runs = ended_reviews(each, rule)
            found = decimal(mean(row["found"] for row in runs), 2)
            cells.append(f"{mean(row['looks'] for row in runs):.0f} / {found}")
        lines.append([each.title, *cells])
    return table(["set", "15 to 30 (the advice)", *rules[1:]], lines)


def few_trust() -> str:
    """Simulated reviews that ended by the advice, by the number of unsafe rows that they had found."""
    lines = []
    for kind in GOALS:
        for none_or_one in (True, False):
            reviews = [
                row
                for each in sets_in("stopping")
                for row in ended_reviews(each, "advice")
                if each.kind == kind and (round(row["found"] * each.unsafe) <= 1) == none_or_one
            ]
            if reviews:
                read_rows = [row["looks"] for row in reviews]
                found = [row["found"] for row in reviews]
                cells = [
                    str(len(reviews)),
                    f"{mean(read_rows):.0f} ({min(read_rows)}–{max(read_rows)})",
                    with_range(found),
                    str(sum(fraction >= 0.73 for fraction in found)),
                ]
                lines.append([f"`{kind}`", "none or one" if none_or_one else "two or more", *cells])
    return table(["kind", "unsafe rows found", "reviews", "rows read", "fraction found", "reviews with .73 or more"],
                 lines, texts=2)  # fmt: skip


TABLES: dict[str, Callable[[], str]] = {
    "few_found": few_found,
    "few_trust": few_trust,
    "few_goals": few_goals,
    "few_best_single": few_best_single,
    "few_rankings": partial(measures, development=True),
    "few_final_rankings": partial(measures, development=False),
    "few_looks": partial(looks, "looks_first_version", development=True),
    "few_final_looks": partial(looks, "looks"),
    "few_final_looks_first_version": partial(looks, "looks_first_version"),
    "few_mistakes": mistakes,
    "few_automatic": few_automatic,
    "few_intervals": few_intervals,
    "few_redraws": partial(redraws, "redraws"),
    "few_redraws_first_version": partial(redraws, "redraws_first_version", without="redraws"),
    "few_harm": few_harm,
    "few_harm_means": few_harm_means,
    "few_stopping": partial(stopping, development=True),
    "few_final_stopping": partial(stopping, development=False),
    "label_agreement": label_agreement,
    "readers_reviews": readers_reviews,
    "demo_runs": demo_runs,
}
