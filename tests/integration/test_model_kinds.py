"""Models that are not causal language models are refused by name: by the tracker, the trainers and the commands."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import VOCABULARY, call, random_rows, reference_means, refused, run_options, tiny_llama
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    XLNetConfig,
    XLNetLMHeadModel,
    default_data_collator,
)

from forgetfilter_callback import FilterConfig, FilteredSFTTrainer, FilteredTrainer, ForgetTracker, Trace, encode_rows
from forgetfilter_callback.errors import ScoringError
from forgetfilter_callback.measures.common import mean_losses
from forgetfilter_callback.scoring import token_losses as token_losses_module
from forgetfilter_callback.scoring.model_capabilities import _NOT_NEXT_TOKEN, check_is_causal, takes_use_cache
from forgetfilter_callback.scoring.token_losses import token_losses


def bart() -> BartForConditionalGeneration:
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=VOCABULARY, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64,
    )  # fmt: skip
    return BartForConditionalGeneration(config).eval()


def t5() -> T5ForConditionalGeneration:
    config = T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return T5ForConditionalGeneration(config).eval()


def bart_with_adapter() -> torch.nn.Module:
    return get_peft_model(bart(), LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_2_SEQ_LM"))


def bert() -> BertForMaskedLM:
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    return BertForMaskedLM(config).eval()


def xlnet() -> XLNetLMHeadModel:
    return XLNetLMHeadModel(XLNetConfig(vocab_size=VOCABULARY, d_model=32, n_layer=1, n_head=2, d_inner=32)).eval()


KINDS = {
    bart: "BartForConditionalGeneration is an encoder-decoder model",
    bart_with_adapter: "BartForConditionalGeneration is an encoder-decoder model",
    t5: "T5ForConditionalGeneration is an encoder-decoder model",
    bert: "BertForMaskedLM is a masked language model",
    xlnet: "XLNetLMHeadModel is a model that does not predict the next token at each position",
}


@pytest.mark.parametrize("make_model", KINDS, ids=lambda f: f.__name__)
def test_models_that_are_not_causal_are_refused(make_model, noisy, make_args, collator, tokenizer):
    model, message = make_model(), KINDS[make_model]
    given = {"train_dataset": noisy, "data_collator": collator, "processing_class": tokenizer}
    for tracker in (ForgetTracker(), ForgetTracker(noisy), ForgetTracker([{"prompt": "the", "completion": " cat"}])):
        args = make_args()
        with pytest.raises(ScoringError, match=message):
            Trainer(model, args, **given, callbacks=[tracker]).train()
        assert not Trace.exists(f"{args.output_dir}/_forgetfilter")
    with pytest.raises(ScoringError, match=message):
        FilteredTrainer(
            model, make_args(), **given, forgetting=np.zeros(24), filter_config=FilterConfig("loss", fraction=0.5)
        )
    with pytest.raises(ScoringError, match=message):
        token_losses(model, encode_rows(noisy), disable_tqdm=True)


@pytest.mark.parametrize(
    "model_type",
    ["bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus", "plbart", "trocr",
     "whisper"],
)  # fmt: skip
def test_the_labels_of_refused_decoders_are_not_shifted(model_type):
    """Their own loss is the one of predicting each token from itself."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type, vocab_size=VOCABULARY, d_model=32, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=32,
        encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=32, is_decoder=True, is_encoder_decoder=False,
        max_position_embeddings=64, pad_token_id=1, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    tokens = torch.randint(5, VOCABULARY, (1, 12))
    output = model(input_ids=tokens, labels=tokens)
    unshifted = torch.nn.functional.cross_entropy(output.logits[0].float(), tokens[0])
    shifted = torch.nn.functional.cross_entropy(output.logits[0, :-1].float(), tokens[0, 1:])
    assert output.loss.item() == pytest.approx(unshifted.item(), rel=1e-4)
    assert output.loss.item() != pytest.approx(shifted.item(), rel=1e-4)
    assert model_type in _NOT_NEXT_TOKEN


@pytest.mark.parametrize("model_type", sorted(_NOT_NEXT_TOKEN))
def test_causal_models_with_unshifted_labels_are_refused(model_type):
    """They compare each position with its own token, so another loss than theirs would be recorded."""
    config = AutoConfig.for_model(model_type)
    config.is_decoder = True
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ScoringError, match=f"{type(model).__name__} is "):
        check_is_causal(model)


@pytest.mark.parametrize("make_model", [bart, t5], ids=lambda f: f.__name__)
def test_filtered_sft_trainer_refuses_them_too(make_model, noisy, sft_config, tokenizer):
    with pytest.raises(ScoringError, match=KINDS[make_model]):
        FilteredSFTTrainer(
            make_model(), sft_config(), train_dataset=noisy, processing_class=tokenizer, forgetting=np.arange(24.0),
            filter_config=FilterConfig("loss", fraction=0.5),
        )  # fmt: skip


@pytest.mark.parametrize("make_model", [bart, bert], ids=lambda f: f.__name__)
def test_their_loss_is_another_one(make_model, make_args, monkeypatch):
    """Why they are refused: the losses that would be recorded are not those that are trained."""
    rows = [{**row, "labels": row["input_ids"]} for row in random_rows(6)]
    trainer = Trainer(make_model(), make_args(), data_collator=default_data_collator)
    expected = [trainer.evaluate(Dataset.from_list([row]))["eval_loss"] for row in rows]
    monkeypatch.setattr(token_losses_module, "check_is_causal", lambda model: None)
    encoded = encode_rows(rows)
    losses = mean_losses(token_losses(make_model(), encoded, disable_tqdm=True), encoded.loss_offsets)
    assert (np.abs(losses - expected) > 0.005).any()


@pytest.mark.parametrize("make_model", [bart, t5], ids=lambda f: f.__name__)
def test_checkpoints_with_an_encoder_are_refused(make_model, files, byte_tokenizer, tmp_path):
    """`AutoModelForCausalLM` would load the decoder of BART alone."""
    make_model().save_pretrained(tmp_path / "model")
    byte_tokenizer.save_pretrained(tmp_path / "model")
    paths = {**files, "model": tmp_path / "model"}
    refused(call("run", *run_options(paths, tmp_path / "run")), "is an encoder-decoder model")
    refused(
        call("score", "--noisy", files["noisy"], "--before", paths["model"], "--output", tmp_path / "score"),
        "is an encoder-decoder model",
    )
    assert not (tmp_path / "run").exists() and not Trace.exists(tmp_path / "score")


class CustomConfig(LlamaConfig):
    model_type = "custom"


class CustomModel(PreTrainedModel):
    """A model as in remote code: its `forward` knows no `use_cache`, and returns a dict or a tuple."""

    config_class = CustomConfig
    _supports_sdpa = True

    def __init__(self, config: CustomConfig, output_type: type = dict):
        super().__init__(config)
        self.output_type = output_type
        self.model = LlamaForCausalLM(config)
        self.post_init()

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.model.lm_head

    def forward(self, input_ids, attention_mask=None, labels=None):
        outputs = self.model(input_ids, attention_mask=attention_mask, labels=labels)
        named = {"loss": outputs.loss, "logits": outputs.logits} if labels is not None else {"logits": outputs.logits}
        if self.output_type is SimpleNamespace:
            return SimpleNamespace(**named)
        return named if self.output_type is dict else tuple(named.values())


@pytest.mark.parametrize("output_type", [dict, tuple, SimpleNamespace])
def test_a_custom_model_is_scored(output_type, noisy):
    model = tiny_llama().eval()
    config = CustomConfig(**{**model.config.to_diff_dict(), "model_type": "custom"})
    custom = CustomModel(config, output_type).eval()
    custom.model.load_state_dict(model.state_dict())
    rows = encode_rows(noisy, disable_tqdm=True)
    losses = mean_losses(token_losses(custom, rows, disable_tqdm=True), rows.loss_offsets)
    np.testing.assert_allclose(losses, reference_means(model, noisy), rtol=1e-5)


@pytest.mark.parametrize(
    ("classifier", "shape"),
    [(LlamaForSequenceClassification, r"\(\d+, 2\)"), (LlamaForTokenClassification, r"\(\d+, \d+, 2\)")],
)
def test_a_classifier_is_refused_by_name(classifier, shape, noisy):
    config = tiny_llama().config
    config.pad_token_id = 0
    message = rf"{classifier.__name__} returns logits of the shape {shape}.*AutoModelForCausalLM"
    with pytest.raises(ScoringError, match=message):
        token_losses(classifier(config).eval(), encode_rows(noisy, disable_tqdm=True), disable_tqdm=True)


@pytest.mark.parametrize("arguments", ["input_ids", "input_ids, use_cache=None", "input_ids, **kwargs"])
def test_use_cache_is_passed_to_models_that_take_it(arguments):
    model = tiny_llama()
    namespace: dict[str, object] = {}
    exec(f"def forward({arguments}): pass", namespace)
    model.forward = namespace["forward"]
    assert takes_use_cache(model) == (arguments != "input_ids")
