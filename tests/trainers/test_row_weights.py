"""Training with a weight per row, against a plain training loop and against a Trainer without weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import VOCABULARY, plain_loop, run_both, tiny_llama, tiny_lora
from sft_helpers import rows_of
from tiny_models import gpt2, prompt_tuned, qwen, scaled_logits, soft_capped, state_space, unusual_trunk
from torch.nn.functional import cross_entropy
from transformers import MixtralConfig, MixtralForCausalLM, Trainer
from trl import SFTTrainer

from forgetfilter_callback import (
    FilterConfig,
    FilteredSFTTrainer,
    FilteredTrainer,
    FilterResult,
    ForgetTracker,
    ReviewQueue,
    encode_rows,
    filtered,
)
from forgetfilter_callback.errors import DecisionError, ForgetFilterError
from forgetfilter_callback.filtering import find_reviewed
from forgetfilter_callback.trainers.row_weights import WeighingCollator


@pytest.fixture
def tracker(noisy, safety, make_args, collator):
    """A tracker after both sessions, with a verdict."""
    tracker = ForgetTracker()
    run_both(tiny_llama(), noisy, safety, make_args, collator, tracker)
    ReviewQueue(tracker.trace).add({0: "safe"})
    return tracker


@pytest.fixture
def given_weights(monkeypatch):
    """Sets the weights of the rows of the noisy set."""

    def give(weights: np.ndarray) -> np.ndarray:
        monkeypatch.setattr(find_reviewed, "unsafe_probabilities", lambda queue: 1 - weights)
        return weights

    return give


@pytest.fixture
def weighted(tracker, noisy, make_args, collator):
    """Makes a trainer with weights."""

    def make(model=None, folder="weighted", trainer_class=FilteredTrainer, rows=noisy, **args):
        return trainer_class(
            model if model is not None else tiny_llama(), make_args(folder, **args), train_dataset=rows,
            data_collator=collator, forgetting=tracker, filter_config=weights_of(tracker),
        )  # fmt: skip

    return make


def weights_of(tracker) -> FilterConfig:
    return FilterConfig(reviewed=tracker.trace.folder / "review", weights=True)


def some_weights(count: int = 24) -> np.ndarray:
    weights = np.random.default_rng(0).random(count)
    weights[:3] = 0.0
    return weights


def parameters_after(trainer) -> dict[str, torch.Tensor]:
    trainer.train()
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def assert_equal(first, second) -> None:
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def assert_close(first, second, start) -> None:
    """Parameters agree, to a small part of how far they moved."""
    moved = max(float((value - start[name]).abs().max()) for name, value in first.items())
    assert moved > 1e-5
    for name, value in first.items():
        torch.testing.assert_close(
            value, second[name], rtol=1e-5, atol=5e-3 * moved, msg=lambda text, name=name: f"{name}: {text}"
        )


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif "dropout" in vars(module):
            module.dropout = 0.0  # OPT calls the function
    return model


GRADIENT_DESCENT = {
    "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0,
    "per_device_train_batch_size": 6, "gradient_accumulation_steps": 4,
}  # fmt: skip


@pytest.mark.parametrize(
    "make_model",
    [tiny_llama, tiny_lora, prompt_tuned, gpt2, qwen, soft_capped, scaled_logits, state_space, unusual_trunk],
    ids=lambda f: f.__name__,
)
def test_weights_equal_a_plain_loop(make_model, weighted, noisy, given_weights, monkeypatch):
    weights = given_weights(some_weights())
    monkeypatch.setattr(FilteredTrainer, "add_callback", lambda self, callback: None)  # the check of the base model
    start = {name: p.detach().clone() for name, p in make_model().named_parameters()}
    expected = plain_loop(without_dropout(make_model()), noisy, weights, epochs=2)
    trainer = weighted(without_dropout(make_model()), **GRADIENT_DESCENT)
    assert_close(parameters_after(trainer), expected, start)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_label_smoothing_and_accumulation(smoothing, accumulation, weighted, noisy, given_weights):
    weights, start = given_weights(some_weights()), dict(tiny_llama().named_parameters())
    expected = plain_loop(tiny_llama(), noisy, weights, 2, smoothing)
    batches = {"per_device_train_batch_size": 24 // accumulation, "gradient_accumulation_steps": accumulation}
    trainer = weighted(label_smoothing_factor=smoothing, **{**GRADIENT_DESCENT, **batches})
    assert_close(parameters_after(trainer), expected, start)


class OwnLoss(Trainer):
    """Half of the usual loss."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        return super().compute_loss(model, inputs, return_outputs, **kwargs) / 2


class OwnFilteredLoss(FilteredTrainer):
    """The same, without a call of the method that it replaces."""

    def compute_loss(self, model, inputs, return_outputs=False, *, num_items_in_batch=None):
        return model(**inputs, num_items_in_batch=num_items_in_batch).loss / 2


@pytest.mark.parametrize("trainer_class", [filtered(OwnLoss), OwnFilteredLoss])
def test_own_losses_are_weighted_too(trainer_class, weighted, noisy, given_weights):
    weights, start = given_weights(some_weights()), dict(tiny_llama().named_parameters())
    expected = plain_loop(tiny_llama(), noisy, weights, 2, learning_rate=0.05)
    assert_close(parameters_after(weighted(trainer_class=trainer_class, **GRADIENT_DESCENT)), expected, start)


class OwnStep(FilteredTrainer):
    """A training step without a call of the method that it replaces."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = self.loss_of(model, self._prepare_inputs(inputs))
        self.accelerator.backward(loss)
        return loss.detach()

    def loss_of(self, model, inputs):
        return self.compute_loss(model, inputs)


class OwnStepAndLoss(OwnStep):
    def loss_of(self, model, inputs):
        return model(input_ids=inputs["input_ids"], labels=inputs["labels"]).loss


@pytest.mark.parametrize("trainer_class", [OwnStep, OwnStepAndLoss])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_an_own_training_step_is_not_trained_without_weights(accumulation, trainer_class, weighted, given_weights):
    given_weights(some_weights())
    trainer = weighted(trainer_class=trainer_class, gradient_accumulation_steps=accumulation)
    with pytest.raises(ForgetFilterError, match=r"`training_step` does not call `super"):
        trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize(
    "args",
    [{}, {"bf16": True}, {"label_smoothing_factor": 0.1}, {"gradient_accumulation_steps": 2}, {"neftune_noise_alpha": 5},
     {"dataloader_num_workers": 2}, {"gradient_checkpointing": True}, {"train_sampling_strategy": "group_by_length"}],
    ids=str,
)  # fmt: skip
def test_weights_of_one_change_nothing(args, weighted, noisy, make_args, collator, given_weights):
    given_weights(np.ones(24))
    plain = Trainer(tiny_llama(), make_args("plain", **args), train_dataset=noisy, data_collator=collator)
    expected = parameters_after(plain)
    trainer = weighted(**args)
    assert_equal(expected, parameters_after(trainer))
    losses = [[log["loss"] for log in each.state.log_history if "loss" in log] for each in (plain, trainer)]
    assert losses[0] == losses[1] and len(losses[0]) > 5


def test_weights_in_mixed_precision(weighted, noisy, given_weights):
    """accelerate converts the outputs of the model to float32, so they are not the tensors that the loss is made of."""
    given_weights(np.zeros(24))
    start = {name: parameter.detach().clone() for name, parameter in tiny_llama().named_parameters()}
    assert_equal(parameters_after(weighted(bf16=True, weight_decay=0.0)), start)


def test_rows_without_weight_do_not_matter(weighted, noisy, given_weights):
    """Other labels in these rows change the logged losses, and nothing that is trained."""
    weights = np.where(np.arange(24) < 6, 0.0, some_weights())
    given_weights(weights)
    trained = parameters_after(weighted(folder="a"))
    trainer = weighted(folder="b")

    def unlearn(row: dict, index: int) -> dict:
        return {"labels": [label if label == -100 else 7 for label in row["labels"]]} if index < 6 else row

    collate = trainer._weighing
    changed = noisy.map(unlearn, with_indices=True)
    trainer._weighing = lambda given: collate_changed(collate(given), noisy, changed)
    assert_equal(trained, parameters_after(trainer))


def collate_changed(weighing, rows, changed):
    """Collates other labels, with the weights of the rows as they were."""
    labels = {tuple(row["input_ids"]): other["labels"] for row, other in zip(rows, changed, strict=True)}

    def collate(features):
        batch = weighing(features)
        for index, feature in enumerate(features):
            other = torch.tensor(labels[tuple(feature["input_ids"])])
            batch["labels"][index, : len(other)] = other
        return batch

    return collate


def test_the_losses_that_are_logged_are_not_weighted(weighted, noisy, make_args, collator, given_weights):
    given_weights(np.zeros(24))
    trainer = weighted(max_steps=1, per_device_train_batch_size=24)
    trainer.train()
    plain = Trainer(tiny_llama(), make_args("plain"), data_collator=collator)
    tokens = [sum(label != -100 for label in row["labels"][1:]) for row in noisy]
    losses = [plain.evaluate(noisy.select([index]))["eval_loss"] for index in range(24)]
    assert trainer.state.log_history[0]["loss"] == pytest.approx(np.average(losses, weights=tokens), rel=1e-5)


def test_evaluation_and_prediction_have_no_weights(weighted, noisy, make_args, collator, given_weights):
    given_weights(some_weights())
    plain = Trainer(tiny_llama(), make_args("plain"), data_collator=collator)
    trainer = weighted()
    assert trainer.evaluate(noisy)["eval_loss"] == plain.evaluate(noisy)["eval_loss"]
    np.testing.assert_array_equal(trainer.predict(noisy).predictions, plain.predict(noisy).predictions)


def test_rows_are_found_wherever_they_are(tracker, noisy, make_args, collator, given_weights):
    weights, start = given_weights(some_weights()), dict(tiny_llama().named_parameters())
    order = np.random.default_rng(5).permutation(24)
    args = make_args("shuffled", **GRADIENT_DESCENT)
    trainer = FilteredTrainer(
        tiny_llama(), args, train_dataset=noisy.select(order), data_collator=collator, forgetting=tracker,
        filter_config=weights_of(tracker),
    )  # fmt: skip
    np.testing.assert_array_equal(trainer.filter_result.weights, weights[order])
    assert_close(parameters_after(trainer), plain_loop(tiny_llama(), noisy, weights, 2), start)


def test_equal_rows_get_the_lowest_of_their_weights(noisy, safety, make_args, collator, given_weights):
    twice, tracker = Dataset.from_list(noisy.to_list()[:12] * 2), ForgetTracker()
    run_both(tiny_llama(), twice, safety, make_args, collator, tracker)
    ReviewQueue(tracker.trace).add({0: "safe"})
    weights, start = given_weights(some_weights()), dict(tiny_llama().named_parameters())
    trainer = FilteredTrainer(
        tiny_llama(), make_args("twice", **GRADIENT_DESCENT), train_dataset=twice, data_collator=collator,
        forgetting=tracker, filter_config=weights_of(tracker),
    )  # fmt: skip
    lowest = np.tile(np.minimum(weights[:12], weights[12:]), 2)
    assert_close(parameters_after(trainer), plain_loop(tiny_llama(), twice, lowest, 2), start)


def test_the_weights_are_stored(weighted, noisy, given_weights, caplog):
    weights = given_weights(some_weights())
    trainer = weighted()
    assert len(trainer.train_dataset) == 24 and len(trainer.removed_dataset) == 0
    loaded = FilterResult.load(f"{trainer.args.output_dir}/_forgetfilter-result")
    np.testing.assert_allclose(loaded.weights, weights)
    below = (weights < 0.5).sum()
    assert loaded.method == "weights" and f"(mean weight {weights.mean():.3f}, {below} below 0.5)" in loaded.reason
    assert not [record for record in caplog.records if "removed 0" in record.message and record.levelname == "WARNING"]


def test_too_few_verdicts_are_refused(weighted):
    with pytest.raises(
        DecisionError,
        match=r"There are 0 unsafe and 1 safe verdicts on distinct rows. 0 of these rows were drawn at random",
    ):
        weighted()


@pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated:FutureWarning")
@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_sfttrainer(loss_type, sft_config, chat_tokenizer, given_weights):
    rows, tracker, model = rows_of("prompt and completion"), ForgetTracker(), tiny_llama()
    for data in (rows, rows_of("text", 5)):
        args = sft_config(max_steps=6)
        SFTTrainer(model, args, train_dataset=data, processing_class=chat_tokenizer, callbacks=[tracker]).train()
    ReviewQueue(tracker.trace).add({0: "safe"})
    given = {
        "max_steps": 2, "gradient_accumulation_steps": 3, "per_device_train_batch_size": 3, "loss_type": loss_type,
        "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0,
    }  # fmt: skip

    def trained(weights=None, **more) -> dict[str, torch.Tensor]:
        args = sft_config(**{**given, **more})
        if weights is None:
            trainer = SFTTrainer(tiny_llama(), args, train_dataset=rows, processing_class=chat_tokenizer)
        else:
            given_weights(weights)
            trainer = FilteredSFTTrainer(
                tiny_llama(), args, train_dataset=rows, processing_class=chat_tokenizer, forgetting=tracker,
                filter_config=weights_of(tracker),
            )  # fmt: skip
            assert len(trainer.train_dataset) == 9
        return parameters_after(trainer)

    start = {name: parameter.detach().clone() for name, parameter in tiny_llama().named_parameters()}
    assert_equal(trained(), trained(np.ones(9)))
    assert_equal(start, trained(np.zeros(9)))
    for smoothing in (0.0, 0.1) if loss_type == "nll" else ():
        weights = some_weights(9)
        prepared = SFTTrainer(tiny_llama(), sft_config(), train_dataset=rows, processing_class=chat_tokenizer)
        expected = plain_loop(tiny_llama(), prepared.train_dataset, weights, 2, smoothing)
        assert_close(trained(weights, label_smoothing_factor=smoothing), expected, start)
    for joined in ({"packing": True}, {"padding_free": True, "max_length": None}):
        with pytest.raises(ValueError, match=r"packing and padding-free batches join rows\. Disable"):
            trained(np.ones(9), **joined)


def test_auxiliary_losses_are_not_weighted(weighted, given_weights, monkeypatch):
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=2, output_router_logits=True, router_aux_loss_coef=10.0,
    )  # fmt: skip
    given_weights(np.zeros(24))
    monkeypatch.setattr(FilteredTrainer, "add_callback", lambda self, callback: None)
    model = MixtralForCausalLM(config)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trained = parameters_after(weighted(model, weight_decay=0.0))
    moved = {name for name, value in trained.items() if not torch.equal(value, start[name])}
    assert any("gate" in name for name in moved) and "lm_head.weight" not in moved


def test_setups_that_cannot_be_weighted_are_refused(weighted, given_weights, monkeypatch):
    given_weights(np.ones(24))
    with pytest.raises(ForgetFilterError, match="needs a model that is not compiled"):
        weighted(torch.compile(tiny_llama(), backend="eager"))
    with pytest.raises(ForgetFilterError, match="needs a model that is not compiled"):
        weighted(torch_compile=True, torch_compile_backend="eager")
    trainer = weighted()
    monkeypatch.setattr(type(trainer.args), "n_gpu", 2)
    with pytest.raises(ForgetFilterError, match="DataParallel"):
        weighted()


def test_a_collator_that_takes_the_rows_apart(weighted, noisy, collator, given_weights):
    weights, start = given_weights(some_weights()), dict(tiny_llama().named_parameters())

    def take_apart(rows):
        return collator([{"labels": row.pop("labels"), "input_ids": row.pop("input_ids")} for row in rows])

    trainer = weighted(**GRADIENT_DESCENT)
    trainer.data_collator = take_apart
    assert_close(parameters_after(trainer), plain_loop(tiny_llama(), noisy, weights, 2), start)


def test_a_fused_loss_is_refused(weighted, given_weights, monkeypatch):
    """A loss from the hidden states and the weights of the head, as Liger computes it."""
    given_weights(np.ones(24))
    model = tiny_llama()

    def forward(input_ids, labels=None, attention_mask=None, **kwargs):
        states = model.model(input_ids, attention_mask=attention_mask).last_hidden_state
        return {"loss": cross_entropy((states[:, :-1] @ model.lm_head.weight.T).flatten(0, 1), labels[:, 1:].flatten())}

    trainer = weighted(model)
    trainer.callback_handler.callbacks = [
        callback for callback in trainer.callback_handler.callbacks if "BaseModelCheck" not in type(callback).__name__
    ]
    monkeypatch.setattr(model, "forward", forward)
    with pytest.raises(ForgetFilterError, match=r"but there were 0\. Disable fused losses"):
        trainer.train()


def test_a_row_that_changes_is_refused(weighted, noisy, given_weights):
    given_weights(np.ones(24))
    trainer = weighted()
    trainer.train_dataset = noisy.map(lambda row: {"input_ids": row["input_ids"][:-1], "labels": row["labels"][:-1]})
    with pytest.raises(ForgetFilterError, match="A row of a training batch has no weight"):
        trainer.train()


def test_a_loader_without_the_collator_is_refused(weighted, given_weights):
    given_weights(np.ones(24))
    trainer = weighted()
    loader = Trainer.get_train_dataloader(trainer)
    trainer.get_train_dataloader = lambda: loader
    with pytest.raises(ForgetFilterError, match="A training batch has no weights of its rows"):
        trainer.train()


@pytest.mark.parametrize("more", [{}, {"reviewed": "x", "threshold": 1.0}, {"reviewed": "x", "fraction": 0.5}], ids=str)
def test_weights_need_verdicts_and_exclude_a_threshold(more):
    with pytest.raises(ValueError, match="it excludes `threshold` and `fraction`, and it needs verdicts"):
        FilterConfig(weights=True, **more)


def test_a_collator_that_changes_a_list_in_place_gets_the_rows_as_they_are():
    """Each row is collated alone for its weight before the batch is."""

    def collate(rows):
        for row in rows:
            row["input_ids"].append(2)
        tokens = torch.tensor([row["input_ids"] for row in rows])
        return {"input_ids": tokens, "labels": tokens}

    rows = [{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9, 10]}]
    ids = encode_rows([{"input_ids": [*row["input_ids"], 2]} for row in rows], disable_tqdm=True).ids
    batch = WeighingCollator(collate, ids, np.array([0.25, 1.0]), None)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 2], [8, 9, 10, 2]]
    assert batch["forgetfilter_weights"].tolist() == [0.25, 1.0]
