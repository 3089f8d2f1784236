"""Draw the figures of the documentation: `python docs/tools/plots.py`. They are committed, so that GitHub shows them too."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

import numpy as np
from matplotlib.figure import Figure

from forgetfilter_callback.filtering.thresholds import BASE_THRESHOLD
from forgetfilter_callback.measures.combined import combined_forgetting
from forgetfilter_callback.measures.common import mean_losses
from forgetfilter_callback.measures.loss import loss_forgetting
from forgetfilter_callback.measures.pooled import pooled_forgetting
from forgetfilter_callback.measures.relative import relative_forgetting
from forgetfilter_callback.measures.smoothed import smoothed_forgetting
from tables import SCENARIOS, ends, find


IMAGES = Path(__file__).parents[1] / "images"
NAMES = {
    "smoothed": "smoothed",
    "loss": "loss",
    "pooled": "pooled",
    "relative": "relative",
    "M0 loss": "loss under the base model",
    "word classifier": "word classifier (labels)",
}
COLORS = {"smoothed": "tab:blue", "loss": "tab:orange", "pooled": "tab:green", "relative": "tab:red",
          "M0 loss": "tab:gray", "word classifier": "tab:brown"}  # fmt: skip


def save(figure: Figure, name: str) -> None:
    figure.savefig(IMAGES / f"{name}.png", dpi=130)


def evidence_measures() -> None:
    """AUROC on three sets: one point per seed, and their mean as a line."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    for axes, (scenario, control) in zip(figure.subplots(1, 3, sharey=True), SCENARIOS.items(), strict=True):
        rows = ends(scenario=scenario, control=control, unsafe_share=0.5)
        for position, signal in enumerate(reversed(NAMES)):
            values = [find(rows, "auroc", signal=signal, seed=seed) for seed in range(3)]
            known = [value for value in values if value is not None]
            if known:
                axes.plot(known, [position] * len(known), "o", color=COLORS[signal], alpha=0.7)
                axes.plot([mean(known)] * 2, [position - 0.3, position + 0.3], color=COLORS[signal])
        axes.axvline(0.5, color="black", linewidth=0.8, linestyle=":")
        axes.set(title=scenario, xlim=(0.2, 1.02), xlabel="AUROC (.5 is chance)")
        axes.set_yticks(range(len(NAMES)), list(reversed(NAMES.values())))
        axes.grid(axis="x", alpha=0.3)
    save(figure, "evidence_measures")


def evidence_fractions() -> None:
    """AUROC by the fraction of unsafe rows."""
    shares = [0.05, 0.25, 0.5, 0.75]
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for axes, (scenario, control) in zip(panels, SCENARIOS.items(), strict=True):
        for signal in ("smoothed", "loss", "pooled", "word classifier"):
            values = [
                find(ends(scenario=scenario, control=control, unsafe_share=share, seed=0), "auroc", signal=signal)
                for share in shares
            ]
            known = [(share, value) for share, value in zip(shares, values, strict=True) if value is not None]
            axes.plot(*zip(*known, strict=True), "o-", color=COLORS[signal], label=NAMES[signal])
        axes.axhline(0.5, color="black", linewidth=0.8, linestyle=":")
        axes.set(title=scenario, xlabel="fraction of unsafe rows", ylim=(0.3, 1.02))
        axes.set_xticks(shares, [f"{share:.0%}" for share in shares])
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("AUROC, seed 0")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    save(figure, "evidence_fractions")


# What happens to the token losses of a row in safety finetuning. Each case is a row among 200 others.
CASES = (
    "unsafe: the whole answer rises",
    "unsafe: three harmful words in 40 tokens",
    "unsafe: one rare word rises by 4 nats",
    "unsafe: learned little, and lost all of it",
    "benign: all tokens rise a little",
    "benign: two tokens rise by chance",
)


def measures_at_work() -> None:
    """Forgetting of made-up rows by five measures, as a multiple of φ."""
    tokens, offsets, base, before, after, states = made_up_rows()
    means = [mean_losses(losses, offsets) for losses in (base, before, after)]
    values = {
        "loss": loss_forgetting(means[1], means[2]),
        "relative": relative_forgetting(*means),
        "pooled": pooled_forgetting(tokens, offsets, before, after),
        "smoothed": smoothed_forgetting(tokens, offsets, before, after, states),
        "combined": combined_forgetting(tokens, offsets, before, after, states),
    }
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, (name, forgetting) in zip(figure.subplots(1, 5, sharey=True), values.items(), strict=True):
        shown = forgetting[: len(CASES)] / BASE_THRESHOLD[name]
        colors = ["tab:red" if case.startswith("unsafe") else "tab:blue" for case in CASES]
        axes.barh(range(len(CASES)), np.clip(shown, -0.5, 4), color=colors)
        axes.axvline(1, color="black", linestyle="--")
        axes.set(title=name, xlabel="forgetting / φ", xlim=(-0.5, 4), ylim=(len(CASES) - 0.5, -0.5))
        axes.set_yticks(range(len(CASES)), CASES)
    save(figure, "measures")


def made_up_rows() -> tuple[np.ndarray, ...]:
    """The rows of `CASES`, followed by 40 rows like the first two and 160 benign rows.

    Returns:
        Token ids, offsets, the token losses of three models, and hidden states. Rows with harmful words lie apart; rows with
        a rare word and rows that were hardly learned do not.
    """
    rng = np.random.default_rng(0)
    harmful, words = np.arange(20), np.arange(20, 400)  # token ids
    rows = []
    for kind in [*range(len(CASES)), *[0] * 20, *[1] * 20, *[len(CASES)] * 160]:
        length = 12 if kind in (0, 3) else 40
        ids, rise = rng.choice(words, length), rng.normal(0, 0.15, length)
        learned = 0.05 if kind == 3 else 2.0
        if kind == 0:
            ids, rise = rng.choice(harmful, length), rise + 1.5
        elif kind == 1:
            ids[:3], rise[:3] = rng.choice(harmful, 3, replace=False), rise[:3] + 2.0
        elif kind == 2:
            ids[0], rise[0] = 500, 4.0
        elif kind == 3:
            rise += 0.2
        elif kind == 4:
            rise += 0.25
        elif kind == 5:
            rise[:2] += 2.5
        rows.append((ids, rise, learned, 2.0 * (kind < 2)))
    ids, rises = (np.concatenate([row[part] for row in rows]) for part in (0, 1))
    lengths = [len(row[0]) for row in rows]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    before = np.full(len(ids), 1.0)
    base = before + np.repeat([row[2] for row in rows], lengths)
    states = rng.normal(0, 1, (len(rows), 16))
    states[:, 0] += [row[3] for row in rows]
    return ids, offsets, base.astype(np.float32), before.astype(np.float32), (before + rises).astype(np.float32), states


if __name__ == "__main__":
    evidence_measures()
    evidence_fractions()
    measures_at_work()
