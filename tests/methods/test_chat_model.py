"""Synopses from a chat model of transformers, made here, tiny, tokenizer included."""

from itertools import pairwise

import pytest
import torch

import vstar_kernels as vk
from vstar_kernels.methods.vstar.writer import SynopsisError

pytest.importorskip("transformers")
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPT = "A pond freezes over."
STAGES = ("Open water.", "Thin ice.", "A frozen pond.")
# Each piece once, so that a model without a memory can say it.
PIECES = [
    '{"stages": ["',
    "Open",
    " water.",
    '", "',
    "Thin",
    " ice.",
    '","',
    "A",
    " frozen",
    " pond.",
]
PIECES += ['"]}']
SPECIAL = ["<unk>", "<end>", "<assistant>"]
TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_tokenizer(template=TEMPLATE):
    vocabulary = {piece: index for index, piece in enumerate([*SPECIAL, *PIECES])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="<end>",
        additional_special_tokens=["<assistant>"],
        chat_template=template,
        # As by default up to transformers 4; Llama takes no token types.
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def make_model(length=1024):
    """Random weights."""
    torch.manual_seed(0)
    size = len(SPECIAL) + len(PIECES)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=length,
        eos_token_id=1,
        pad_token_id=1,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def teach(model, pieces):
    """Make it say these, one after the other: each token's embedding is the next one's output."""
    ids = make_tokenizer().convert_tokens_to_ids(["<assistant>", *pieces, "<end>"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1)
        model.model.embed_tokens.weight.copy_(torch.eye(*model.model.embed_tokens.weight.shape))
        for token, following in pairwise(ids):
            model.lm_head.weight[following, token] = 1
    return model


def test_a_synopsis_from_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("VSTAR_KERNELS_CACHE", str(tmp_path / "cache"))
    teach(make_model(), PIECES).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    writer = vk.SynopsisWriter.from_transformers(
        str(tmp_path / "model"), device="cpu", max_new_tokens=40
    )
    assert writer.write(PROMPT, num_stages=3) == vk.Synopsis(PROMPT, STAGES)
    writer._source._model = None  # from the cache, without the model
    assert writer.write(PROMPT, num_stages=3) == vk.Synopsis(PROMPT, STAGES)
    longer = vk.SynopsisWriter.from_transformers(str(tmp_path / "model"), max_new_tokens=2)
    with pytest.raises(SynopsisError, match=r"no complete JSON object, in '{\"stages\": \[\"Open'"):
        longer.write(PROMPT, num_stages=3)


def test_a_loaded_model_is_not_cached(tmp_path):
    model = teach(make_model(), PIECES)
    writer = vk.SynopsisWriter.from_transformers(
        model, make_tokenizer(), max_new_tokens=40, cache=tmp_path / "cache"
    )
    assert writer.write(PROMPT).stages == STAGES
    teach(model, [*PIECES[:6], '"]}'])
    assert writer.write(PROMPT).stages == STAGES[:2]
    assert not (tmp_path / "cache").exists()


def test_random_weights_say_nothing_of_use():
    conversations = []
    model, tokenizer = make_model(), make_tokenizer()
    apply = tokenizer.apply_chat_template
    tokenizer.apply_chat_template = lambda m, **kw: conversations.append(m) or apply(m, **kw)
    writer = vk.SynopsisWriter.from_transformers(model, tokenizer, max_new_tokens=8)
    with pytest.raises(SynopsisError, match=r"from LlamaForCausalLM: attempt 1: .*; attempt 3: "):
        writer.write(PROMPT)
    assert [len(messages) for messages in conversations] == [4, 6, 6]
    assert "cannot be used" in conversations[1][-1]["content"]


@pytest.mark.parametrize(
    ("template", "length", "message"),
    [
        (TEMPLATE, 64, "max_new_tokens, 8, are more than the model's 64"),
        ("{{ raise_exception('System role not supported') }}", 1024, "System role not supported"),
    ],
)
def test_conversations_that_a_model_does_not_take(template, length, message):
    model, tokenizer = make_model(length), make_tokenizer(template)
    writer = vk.SynopsisWriter.from_transformers(model, tokenizer, max_new_tokens=8)
    with pytest.raises(SynopsisError, match=message):
        writer.write(PROMPT)


def test_wrong_arguments(tmp_path):
    make = vk.SynopsisWriter.from_transformers
    with pytest.raises(ValueError, match="tokenizer must be given"):
        make(make_model())
    with pytest.raises(ValueError, match="device is for a model that is loaded here"):
        make(make_model(), make_tokenizer(), device="cpu")
    with pytest.raises(ValueError, match="tokenizer must have a chat template"):
        make(make_model(), make_tokenizer(None))
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1"):
        make(make_model(), make_tokenizer(), max_new_tokens=0)
    with pytest.raises(ValueError, match=r"model .*nowhere cannot be loaded"):
        make(str(tmp_path / "nowhere"))
