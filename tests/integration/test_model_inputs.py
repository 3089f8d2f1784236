"""What the model is given is what is scored, or it is refused by name: rows that are adopted, named and filtered."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import VOCABULARY, call, random_rows, tiny_llama
from tiny_models import gpt2
from transformers import (
    CLIPVisionConfig,
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
    Trainer,
    default_data_collator,
)
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling as TRLCollator

from forgetfilter_callback import FilterConfig, FilteredTrainer, ForgetTracker, Trace, encode_rows
from forgetfilter_callback.data.encode_collated import encode_collated
from forgetfilter_callback.errors import EncodingError, UnsupportedInputError
from forgetfilter_callback.trace.validate_trace import validate_trace


TEXTS = ["the cat sat on the mat", "the dog ran", "the cat and the dog sat on the mat"]


def evaluate_each(model, rows, make_args, collator=default_data_collator) -> np.ndarray:
    """`Trainer.evaluate` of each row alone."""
    args = make_args("evaluate", per_device_eval_batch_size=1)
    trainer = Trainer(model, args, data_collator=collator)
    return np.array([trainer.evaluate(Dataset.from_list([row]))["eval_loss"] for row in rows])


def first_record(model, rows, safety, make_args, how, collator=default_data_collator) -> ForgetTracker:
    """A tracker whose first record is the model before training on `rows`, which are adopted or named."""
    tracker = ForgetTracker() if how == "adopted" else ForgetTracker(rows, session="safety")
    train_dataset = rows if how == "adopted" else safety
    args = make_args(how, max_steps=1, per_device_train_batch_size=1)
    Trainer(model, args, train_dataset=train_dataset, data_collator=collator, callbacks=[tracker]).train()
    return tracker


def padded(tokenizer, side: str, pad_token: str) -> Dataset:
    """The recipe of many tutorials: every label is a copy, also on the padding."""
    tokenizer.pad_token, tokenizer.padding_side = pad_token, side
    texts = [text + tokenizer.eos_token for text in TEXTS]
    batch = tokenizer(texts, padding="max_length", max_length=24, return_token_type_ids=False)
    # The first label has no prediction, but `Trainer` divides the loss of some models by it too.
    labels = [[-100, *tokens[1:]] for tokens in batch["input_ids"]]
    return Dataset.from_dict({**batch, "labels": labels})


@pytest.mark.parametrize("how", ["adopted", "named"])
@pytest.mark.parametrize("pad_token", ["<pad>", "<eos>"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("make_model", [tiny_llama, gpt2])
def test_labels_on_padding_count(make_model, side, pad_token, how, chat_tokenizer, safety, make_args, caplog):
    rows = padded(chat_tokenizer, side, pad_token)
    expected = evaluate_each(make_model(), rows, make_args)
    tracker = first_record(make_model(), rows, safety, make_args, how)
    np.testing.assert_allclose(tracker.trace.losses()[0], expected, rtol=1e-5)
    lengths = np.array(rows["attention_mask"]).sum(1)
    padding = 24 * len(rows) - lengths.sum() - (len(rows) if side == "left" else 0)
    assert f"{padding} of {23 * len(rows)} loss tokens are padding with a label other than -100" in caplog.text


def test_padded_rows_are_filtered_and_reopened(chat_tokenizer, safety, make_args):
    rows = padded(chat_tokenizer, "right", "<eos>")
    tracker = first_record(tiny_llama(), rows, safety, make_args, "adopted")
    values = np.array([0.0, 1.0, 0.0])
    trainer = FilteredTrainer(
        tiny_llama(), make_args("filtered"), train_dataset=rows, data_collator=default_data_collator,
        forgetting=(tracker.trace.rows.ids.to_pylist(), values), filter_config=FilterConfig("loss", 0.5),
    )  # fmt: skip
    assert trainer.removed_dataset["input_ids"] == [rows[1]["input_ids"]]
    again = Trace.open(tracker.trace.folder).rows
    assert again.is_padded.all() and not validate_trace(tracker.trace.folder).problems
    made = again.as_dataset()
    expected = evaluate_each(tiny_llama(), rows, make_args)
    np.testing.assert_allclose(evaluate_each(tiny_llama(), made, make_args), expected, rtol=1e-6)
    assert encode_rows(made).ids == encode_rows(rows).ids == again.ids


def test_sft_trainer_ignores_the_attention_mask(chat_tokenizer, safety, sft_config):
    """It trains on padding as on any other token, so named rows must do so too."""
    rows = padded(chat_tokenizer, "right", "<eos>")
    config = sft_config(per_device_eval_batch_size=1)
    trainer = SFTTrainer(tiny_llama(), config, train_dataset=rows, processing_class=chat_tokenizer)
    expected = [trainer.evaluate(rows.select([index]))["eval_loss"] for index in range(len(rows))]
    for tracker, train_dataset in ((ForgetTracker(), rows), (ForgetTracker(rows, session="safety"), safety)):
        SFTTrainer(
            tiny_llama(), sft_config(output_dir=f"{config.output_dir}/{len(train_dataset)}"),
            train_dataset=train_dataset, processing_class=chat_tokenizer, callbacks=[tracker],
        ).train()  # fmt: skip
        np.testing.assert_allclose(tracker.trace.losses()[0], expected, rtol=1e-5)


def test_padding_on_the_left_is_reported_where_it_changes_losses(noisy, safety, make_args, caplog):
    rows = Dataset.from_list(
        [{"input_ids": [0, 0, *row["input_ids"]], "labels": [-100, -100, *row["labels"]],
          "attention_mask": [0, 0] + [1] * len(row["labels"])} for row in noisy]
    )  # fmt: skip
    tracker = first_record(tiny_llama(), rows, safety, make_args, "named")
    expected = first_record(tiny_llama(), noisy, safety, make_args, "adopted")
    assert tracker.trace.rows.ids == expected.trace.rows.ids and "padded on the left" not in caplog.text
    first_record(gpt2(), rows, safety, lambda name, **more: make_args("gpt2", **more), "named")
    assert "24 of 24 rows are padded on the left" in caplog.text


def token_types(zeros: bool = False) -> Dataset:
    rng = np.random.default_rng(0)
    rows = []
    for row in random_rows(12):
        speakers = rng.choice([0] if zeros else [90, 91], len(row["input_ids"])).tolist()
        rows.append({**row, "labels": [-100, *row["labels"][1:]], "token_type_ids": speakers})
    return Dataset.from_list(rows)


class Rows(torch.utils.data.Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("how", ["adopted", "named", "filtered", "torch dataset", "list"])
def test_token_types_of_gpt2_are_refused(how, zeros, safety, make_args):
    """GPT-2 adds the embedding of the token with this id, so its loss is another one."""
    rows = token_types(zeros)
    plain = evaluate_each(gpt2(), rows.remove_columns("token_type_ids"), make_args)
    assert (np.abs(evaluate_each(gpt2(), rows, make_args) - plain) > 1e-4).all()
    with pytest.raises(UnsupportedInputError, match="Row 0: the row has `token_type_ids`"):
        if how == "filtered":
            FilteredTrainer(
                gpt2(), make_args(), train_dataset=rows, data_collator=default_data_collator,
                forgetting=np.zeros(12), filter_config=FilterConfig("loss", 0.5),
            )  # fmt: skip
        elif how == "torch dataset":
            first_record(gpt2(), Rows(rows), safety, make_args, "adopted")
        else:
            given = rows.to_list() if how == "list" else rows
            first_record(gpt2(), given, safety, make_args, "adopted" if how == "adopted" else "named")


def test_token_types_that_a_model_does_not_read_are_harmless(safety, make_args):
    rows = token_types()
    expected = evaluate_each(tiny_llama(), rows, make_args)
    for how in ("adopted", "named"):
        tracker = first_record(tiny_llama(), rows, safety, make_args, how)
        np.testing.assert_allclose(tracker.trace.losses()[0], expected, rtol=1e-5)


@pytest.mark.parametrize("make_model", [tiny_llama, gpt2])
def test_classes_of_a_dataset_for_classification_are_harmless(make_model, safety, make_args, tokenizer):
    """`Trainer` keeps such a column and gives it to the model, which does not read it."""
    rows = Dataset.from_list([{"input_ids": row["input_ids"], "label": i % 2} for i, row in enumerate(random_rows(12))])
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    plain = Dataset.from_list(
        [{**row, "labels": [-100, *row["input_ids"][1:]]} for row in rows.select_columns("input_ids")]
    )
    expected = evaluate_each(make_model(), plain, make_args)
    for how in ("adopted", "named"):
        tracker = first_record(make_model(), rows, safety, make_args, how, collate)
        np.testing.assert_allclose(tracker.trace.losses()[0], expected, rtol=1e-5)
    tracker = ForgetTracker(rows)
    Trainer(make_model(), make_args("auto"), train_dataset=rows, data_collator=collate, callbacks=[tracker]).train()
    assert {record.session for record in tracker.trace.records()} == {"noisy"}


def text_config(**overrides) -> dict[str, object]:
    return {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, **overrides,
    }  # fmt: skip


VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 8, "patch_size": 4}  # fmt: skip


def llava() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(**VISION), text_config=LlamaConfig(**text_config()),
            image_token_id=3, vision_feature_layer=-1,
        )
    ).eval()  # fmt: skip


def gemma3() -> Gemma3ForConditionalGeneration:
    torch.manual_seed(0)
    config = Gemma3Config(
        text_config=text_config(head_dim=8), vision_config=SiglipVisionConfig(**VISION).to_dict(),
        image_token_index=3, mm_tokens_per_image=4,
    )  # fmt: skip
    return Gemma3ForConditionalGeneration(config).eval()


def pictures() -> Dataset:
    rng = np.random.default_rng(0)
    rows = []
    for row in random_rows(6):
        tokens = [3] * 4 + row["input_ids"]
        image = rng.normal(size=(3, 8, 8)).astype(np.float32).tolist()
        rows.append({"input_ids": tokens, "labels": [-100] * 5 + tokens[5:], "pixel_values": image})
    return Dataset.from_list(rows)


@pytest.mark.parametrize("how", ["adopted", "named", "filtered"])
def test_images_are_refused(how, safety, make_args):
    rows = pictures()
    assert np.isfinite(evaluate_each(llava(), rows, make_args)).all()  # the model can train on them
    with pytest.raises(UnsupportedInputError, match="Row 0: the row has `pixel_values`"):
        if how == "filtered":
            FilteredTrainer(
                llava(), make_args(), train_dataset=rows, data_collator=default_data_collator,
                forgetting=np.zeros(6), filter_config=FilterConfig("loss", 0.5),
            )  # fmt: skip
        else:
            first_record(llava(), rows, safety, make_args, how)


@pytest.mark.parametrize("make_model", [llava, gemma3])
def test_rows_of_text_are_scored_by_models_that_read_images(make_model, make_args, safety):
    """Processors return zeros as token types of text."""
    rows = token_types(zeros=True)
    expected = evaluate_each(make_model(), rows, make_args)
    tracker = first_record(make_model(), rows, safety, make_args, "adopted")
    np.testing.assert_allclose(tracker.trace.losses()[0], expected, rtol=1e-5)


def test_a_safety_set_with_images_is_not_scored(noisy, make_args, caplog):
    """Only the noisy rows are scored, so the safety set may have images."""
    tracker = ForgetTracker(noisy.to_list())
    args = make_args(max_steps=1, per_device_train_batch_size=1)
    model = llava()
    expected = evaluate_each(model, noisy, make_args)
    Trainer(model, args, train_dataset=pictures(), data_collator=default_data_collator, callbacks=[tracker]).train()
    np.testing.assert_allclose(tracker.trace.losses()[0], expected, rtol=1e-5)
    assert "treated as safety finetuning. (Row 0: the row has `pixel_values`" in caplog.text


OTHER_INPUTS = {
    "input_features": torch.zeros(1, 80, 9),
    "decoder_input_ids": torch.ones(1, 4, dtype=torch.long),
    "weights": torch.ones(1, 9),
    "shift_labels": torch.ones(1, 9, dtype=torch.long),
    "image_grid_thw": torch.ones(1, 3, dtype=torch.long),
    "inputs_embeds": torch.zeros(1, 9, 32),
    "encoder_hidden_states": torch.zeros(1, 9, 32),
}


@pytest.mark.parametrize("name", OTHER_INPUTS)
@pytest.mark.parametrize("how", ["adopted", "named"])
def test_inputs_that_a_collator_adds_are_refused(how, name, noisy, safety, make_args, collator):
    def collate(rows):
        return {**collator(rows), name: OTHER_INPUTS[name]}

    with pytest.raises(UnsupportedInputError, match=f"Row 0: the row has `{name}`"):
        first_record(tiny_llama(), noisy, safety, make_args, how, collate)


def test_columns_are_kept_where_the_trainer_keeps_them(noisy, safety, make_args, collator):
    """A collator that reads an image from a path which is a column of the rows."""
    rows = noisy.add_column("path", ["image.png"] * len(noisy))

    def collate(rows):
        batch = collator([{name: row[name] for name in ("input_ids", "labels")} for row in rows])
        return {**batch, "pixel_values": torch.zeros(1, 3, 8, 8)} if rows[0]["path"] else batch

    def keeping(name, **more):
        return make_args(name, remove_unused_columns=False, **more)

    for how in ("adopted", "named"):
        with pytest.raises(UnsupportedInputError, match="Row 0: the row has `pixel_values`"):
            first_record(tiny_llama(), rows, safety, keeping, how, collate)


@pytest.mark.parametrize("name", ["pixel_values", "input_features", "decoder_input_ids", "token_type_ids", "weights"])
def test_encode_rows_refuses_other_inputs(name):
    row = {"input_ids": [5, 6, 7], name: [0, 1, 1]}
    with pytest.raises(UnsupportedInputError, match=f"Row 0: the row has `{name}`"):
        encode_rows([row])
    assert len(encode_rows([{**row, name: None}])) == 1
    assert len(encode_rows([{"input_ids": [5, 6, 7], "token_type_ids": [0, 0, 0], "weight": 1}])) == 1


COLLATORS = {
    "flattening": lambda tokenizer: DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True),
    "flattening without positions": lambda tokenizer: DataCollatorWithFlattening(
        return_position_ids=False, return_flash_attn_kwargs=True
    ),
    "padding-free": lambda tokenizer: TRLCollator(pad_token_id=1, padding_free=True, pad_to_multiple_of=8),
    "with positions": lambda tokenizer: TRLCollator(pad_token_id=1, return_position_ids=True, pad_to_multiple_of=8),
    "labels made": lambda tokenizer: DataCollatorForLanguageModeling(tokenizer, mlm=False, pad_to_multiple_of=8),
}


@pytest.mark.parametrize("name", COLLATORS)
def test_collators_of_single_runs_of_tokens(name, noisy, safety, make_args, tokenizer):
    collate = COLLATORS[name](tokenizer)
    rows = Dataset.from_list([{**row, "labels": [-100, *row["labels"][1:]]} for row in noisy])

    def collate_for_evaluation(rows):
        batch = collate(rows)  # one of them makes the labels
        batch["labels"][:, 0] = -100
        return batch

    expected = evaluate_each(tiny_llama(), rows, make_args, collate_for_evaluation)
    tracker = first_record(tiny_llama(), rows, safety, make_args, "adopted", collate)
    np.testing.assert_allclose(tracker.trace.losses()[0], expected, rtol=1e-5)


def batch(**more) -> dict[str, torch.Tensor]:
    tokens = torch.tensor([[5, 6, 7, 8]])
    return {"input_ids": tokens, "labels": tokens, **more}


@pytest.mark.parametrize(
    "more",
    [
        {"position_ids": torch.tensor([[2, 3, 4, 5]])},
        {"position_ids": torch.tensor([[3, 2, 1, 0]])},
        {"position_ids": torch.tensor([[0, 2, 4, 6]])},
        {"position_ids": torch.arange(4).expand(3, 1, 4)},
        {"position_ids": torch.tensor([[0, 1, 0, 0]]), "attention_mask": torch.tensor([[1, 1, 0, 0]])},
    ],
)
def test_other_positions_are_refused(more):
    with pytest.raises(UnsupportedInputError, match="Row 0: `position_ids` are"):
        encode_collated([0], lambda rows: batch(**more), tiny_llama(), disable_tqdm=True)


@pytest.mark.parametrize(
    "mask",
    [torch.ones(1, 1, 4, 4), torch.ones(1, 4, 4), torch.ones(4, 4), torch.tensor([[1, 1, 2, 2]]), torch.ones(1, 3)],
    ids=lambda mask: "x".join(map(str, mask.shape)),
)
def test_other_attention_masks_are_refused(mask, noisy, safety, make_args, collator):
    with pytest.raises(UnsupportedInputError, match="Row 0: `attention_mask` has shape"):
        encode_collated([0], lambda rows: batch(attention_mask=mask), tiny_llama(), disable_tqdm=True)
    row = {"input_ids": [5, 6, 7, 8], "attention_mask": mask.tolist() if mask.ndim > 2 else mask[0].tolist()}
    if mask.shape != (4, 4):
        with pytest.raises(UnsupportedInputError, match="Row 0: `attention_mask` has shape"):
            encode_rows([row])


def test_a_gap_in_the_attention_mask_is_scored(noisy, safety, make_args):
    rows = [{"input_ids": list(range(5, 14)), "labels": [-100, *range(6, 14)],
             "attention_mask": [1, 1, 0, 0, 1, 1, 1, 0, 1]}]  # fmt: skip
    for make_model in (tiny_llama, gpt2):
        tracker = first_record(make_model(), rows, safety, lambda name, m=make_model, **more: make_args(m.__name__, **more),
                               "named")  # fmt: skip
        np.testing.assert_allclose(tracker.trace.losses()[0], evaluate_each(make_model(), rows, make_args), rtol=1e-5)


def test_positions_of_rows_padded_on_the_left(make_args):
    """As `generate` counts them, or as the model does."""
    tokens = torch.tensor([[1, 1, 5, 6, 7]])
    labels = torch.where(tokens > 1, tokens, -100)
    for positions in ([[1, 1, 0, 1, 2]], [[0, 0, 0, 1, 2]], [[0, 1, 2, 3, 4]]):
        inputs = {"input_ids": tokens, "labels": labels, "attention_mask": (tokens > 1).long(),
                  "position_ids": torch.tensor(positions)}  # fmt: skip
        rows = encode_collated([0], lambda rows, inputs=inputs: inputs, tiny_llama(), disable_tqdm=True)
        assert rows.tokens.tolist() == [5, 6, 7] and rows.loss_mask.tolist() == [False, True, True]
        assert rows.left_padded == (positions[0][2] == 2)


def test_soft_labels_are_refused():
    soft = batch(labels=torch.tensor([[5.0, 6.0, 7.0, 8.0]]))
    with pytest.raises(EncodingError, match="Row 0: the labels differ from the row's own tokens"):
        encode_collated([0], lambda rows: soft, tiny_llama(), disable_tqdm=True)


def test_files_of_padded_rows(files, tmp_path, caplog):
    """`forgetfilter score` scores and reports their padding as the tracker does."""
    model = gpt2()
    model.save_pretrained(tmp_path / "model")
    right = {"input_ids": [5, 6, 7, 1, 1], "labels": [-100, 6, 7, 1, 1], "attention_mask": [1, 1, 1, 0, 0]}
    left = {"input_ids": [1, 5, 6, 7], "labels": [-100, -100, 6, 7], "attention_mask": [0, 1, 1, 1]}
    Dataset.from_list([right, left]).to_json(tmp_path / "rows.jsonl")
    result = call("score", "--noisy", tmp_path / "rows.jsonl", "--before", tmp_path / "model", "--tokenizer",
                  files["model"], "--output", tmp_path / "trace")  # fmt: skip
    assert result.exit_code == 0, result.output
    with torch.no_grad():
        expected = float(model(**{name: torch.tensor([values]) for name, values in right.items()}).loss)
    np.testing.assert_allclose(Trace.open(tmp_path / "trace").losses()[0, 0], expected, rtol=1e-5)
    assert "2 of 6 loss tokens are padding" in caplog.text
    assert "1 of 2 rows is padded on the left" in caplog.text
