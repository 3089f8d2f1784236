"""The `evaluate` modules, loaded from the package with the network switched off."""

from __future__ import annotations

import evaluate
import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer

from forgetfilter_callback.measures.evaluate_metrics import METRICS


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)


def load(name):
    return evaluate.load(METRICS[name])


def test_loss_forgetting():
    result = load("loss_forgetting").compute(predictions=[1.0, 3.0, float("nan")], references=[0.5, 1.0, 1.0])
    np.testing.assert_allclose(result["forgetting"], [0.5, 2.0, np.nan])
    assert result["mean"] == pytest.approx(1.25)


def test_relative_forgetting():
    result = load("relative_forgetting").compute(predictions=[1.0, 3.0], references=[0.5, 1.0], base=[2.5, 1.01])
    np.testing.assert_allclose(result["forgetting"], [0.5 / 2.0, 2.0 / 0.1])


def test_rouge_forgetting():
    before, after, references = ["the cat sat", "a dog"], ["the dog ran", "a dog"], ["the cat sat down", "a dog"]
    result = load("rouge_forgetting").compute(predictions=after, predictions_before=before, references=references)
    scorer = RougeScorer(["rouge1"], use_stemmer=True)
    expected = [
        scorer.score(reference, first)["rouge1"].fmeasure - scorer.score(reference, then)["rouge1"].fmeasure
        for first, then, reference in zip(before, after, references, strict=True)
    ]
    np.testing.assert_allclose(result["forgetting"], expected)
    assert expected[0] > 0 == expected[1]


def test_values_can_be_added_in_batches():
    metric = load("loss_forgetting")
    metric.add_batch(predictions=[1.0, 2.0], references=[0.0, 0.0])
    metric.add(prediction=3.0, reference=0.5)
    assert metric.compute()["forgetting"] == [1.0, 2.0, 2.5]
