import pytest

pytest.importorskip("transformers")

from examples import tiny
from vstar_kernels.methods.starvid.tokens import find_tokens, split_words

LONG = 10**6


@pytest.fixture(scope="module")
def clip():
    tokenizer = tiny._tokenizer()
    tokenizer.model_max_length = LONG
    return tokenizer


@pytest.fixture(scope="module")
def t5():
    return tiny.latte().tokenizer


class Pieces:
    """A tokenizer of given pieces, of which those in angle brackets are special."""

    model_max_length = 77

    def __init__(self, texts):
        self.texts = texts
        self.names = sorted({piece for pieces in texts.values() for piece in pieces})
        self.all_special_ids = [i for i, name in enumerate(self.names) if name.startswith("<|")]

    def __call__(self, text, **_):
        ids = [self.names.index(piece) for piece in self.texts[text]]
        return type("Encoding", (), {"input_ids": ids})

    def convert_ids_to_tokens(self, ids):
        return [self.names[index] for index in ids]


def test_pieces_of_a_word(clip):
    prompt = "a cat and a fire truck"  # BOS a cat and a fire truck, a token for each letter
    assert find_tokens(clip, prompt, "cat") == [2, 3, 4]
    assert find_tokens(clip, prompt, "Fire Truck") == list(range(9, 18))
    assert find_tokens(clip, prompt, "a") == [1]
    assert find_tokens(clip, prompt, "a", occurrence=1) == [8]


def test_only_whole_words(clip, t5):
    for tokenizer in (clip, t5):
        with pytest.raises(ValueError, match="'at' is not in the prompt 'a cat'"):
            find_tokens(tokenizer, "a cat", "at")
        with pytest.raises(ValueError, match="'ca' is not in"):
            find_tokens(tokenizer, "a cat", "ca")
        with pytest.raises(ValueError, match="is not in"):
            find_tokens(tokenizer, "cat", "a cat runs")


def test_punctuation_is_no_part_of_a_word(clip):
    prompt = "cat, dog."
    assert [word.text for word in split_words(clip, prompt)] == ["cat", ",", "dog", "."]
    assert find_tokens(clip, prompt, "dog") == [5, 6, 7]


def test_plurals_where_the_word_itself_is_not_there(clip):
    for prompt, word in (
        ("two cats", "cat"),
        ("one cat", "cats"),
        ("two boxes", "box"),
        ("the flies", "fly"),
        ("it runs", "run"),
    ):
        expected = find_tokens(clip, prompt, prompt.split()[1])
        assert find_tokens(clip, prompt, word) == expected
    prompt = "cats and a cat"
    assert find_tokens(clip, prompt, "cat") == find_tokens(clip, prompt, "a cat")[1:]
    with pytest.raises(ValueError, match="'cat' is 1 times in the prompt, got 1"):
        find_tokens(clip, prompt, "cat", occurrence=1)
    with pytest.raises(ValueError, match="'bus now' is not in"):
        find_tokens(clip, "by bu", "bus now")


def test_sentencepiece(t5):
    # ▁ a ▁ c a t ▁ r u n s </s>; a mark by itself is of no word
    assert find_tokens(t5, "a cat runs", "cat") == [3, 4, 5]
    real = {"a cat, sleeping": ["▁a", "▁cat", ",", "▁sleep", "ing", "<|end|>"]}
    tokenizer = Pieces({**real, "cat": ["▁cat", "<|end|>"], "sleeping": ["▁sleeping"]})
    assert find_tokens(tokenizer, "a cat, sleeping", "cat") == [1]
    assert find_tokens(tokenizer, "a cat, sleeping", "sleeping") == [3, 4]


def test_a_word_cut_in_another_way_by_itself(clip):
    texts = {
        "the snowman melts": ["<|bos|>", "the</w>", "snow", "man</w>", "melts</w>", "<|eos|>"],
        "snowman": ["<|bos|>", "snowman</w>", "<|eos|>"],
        "melts": ["<|bos|>", "mel", "ts</w>", "<|eos|>"],
    }
    tokenizer = Pieces(texts)
    assert find_tokens(tokenizer, "the snowman melts", "snowman") == [2, 3]
    assert find_tokens(tokenizer, "the snowman melts", "melts") == [4]


def test_beyond_what_the_text_encoder_takes():
    tokenizer = tiny._tokenizer()  # 16 tokens
    prompt = "a long walk of a cat"  # cat is tokens 13 to 15, the last of which is the text's end
    with pytest.raises(ValueError, match="token 15 of the prompt, and the text encoder takes 16"):
        find_tokens(tokenizer, prompt, "cat")
    assert find_tokens(tokenizer, "a long walk or cat", "cat") == [12, 13, 14]


def test_wrong_arguments(clip):
    with pytest.raises(TypeError, match="prompt must be a text, got int"):
        find_tokens(clip, 3, "cat")
    with pytest.raises(ValueError, match="word must not be empty"):
        find_tokens(clip, "a cat", " ")
    with pytest.raises(ValueError, match="occurrence must be at least 0, got -1"):
        find_tokens(clip, "a cat", "cat", -1)
