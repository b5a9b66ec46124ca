import pytest
import torch

import vstar_kernels as vk

pytest.importorskip("transformers")

from examples import tiny
from vstar_kernels.methods.starvid.words import plan_targets, plan_words

LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)


@pytest.fixture(scope="module")
def tokenizer():
    made = tiny._tokenizer()
    made.model_max_length = 10**6
    return made


def plan(prompt, *subjects):
    return vk.Trajectory(prompt, [vk.Subject(n, v, boxes=boxes) for n, v, boxes in subjects])


def test_each_word_is_one_column(tokenizer):
    prompt = "a cat runs, a dog runs"
    found = plan_words(tokenizer, plan(prompt, ("cat", "runs", [LEFT]), ("dog", "runs", [RIGHT])))
    assert found.texts == ("cat", "dog", "runs", "runs")  # the second dog's has its own
    assert found.tokens[2] != found.tokens[3]
    assert (found.nouns, found.verbs, found.pairs) == ((0, 1), (2, 3), [(0, 2), (1, 3)])


def test_subjects_with_one_word_share_its_column_and_their_boxes(tokenizer):
    two = plan("two cats run", ("cat", "run", [LEFT, None]), ("cats", "run", [None, RIGHT]))
    found = plan_words(tokenizer, two)
    assert found.texts == ("cat", "run")
    assert (found.nouns, found.verbs, found.pairs) == ((0, 0), (1, 1), [(0, 1)])
    target = plan_targets(two, found, 2, 2, 2)
    assert target.masks.shape == (2, 1, 2, 2)
    assert target.masks[:, 0].int().tolist() == [[[1, 0]] * 2, [[0, 1]] * 2]
    assert target.present.tolist() == [[True, True]]


def test_masks_and_presence_by_frame(tokenizer):
    one = plan("a cat and a dog run", ("cat", None, [LEFT, LEFT]), ("dog", "run", [RIGHT, None]))
    found = plan_words(tokenizer, one)
    assert found.verbs == (None, 2)
    target = plan_targets(one, found, 4, 1, 2)
    assert target.masks[:, :, 0].int().tolist() == [
        [[1, 0], [0, 1]],
        [[1, 0], [0, 1]],
        [[1, 0], [0, 0]],
        [[1, 0], [0, 0]],
    ]
    assert target.present.tolist() == [[True, True, False, False]]
    nobody = plan_targets(one, plan_words(tokenizer, plan("a cat", ("cat", None, [LEFT]))), 1, 2, 2)
    assert nobody.present.shape == (0, 1)
    assert nobody.masks.dtype == torch.bool


def test_texts_of_the_frames(tokenizer):
    one = plan("a cat runs", ("cat", "runs", [LEFT]))
    found = plan_words(tokenizer, one, ["a cat runs", "a cat runs home"])
    assert found == plan_words(tokenizer, one)
    with pytest.raises(ValueError, match="'cat' is at different tokens"):
        plan_words(tokenizer, one, ["a cat runs", "the cat runs"])
    with pytest.raises(ValueError, match="'runs' is not in the prompt 'a cat'"):
        plan_words(tokenizer, one, ["a cat runs", "a cat"])
    with pytest.raises(ValueError, match="what the frames are conditioned on, got none"):
        plan_words(tokenizer, one, [])
    with pytest.raises(ValueError, match="'duck' is the noun and the verb of one subject"):
        plan_words(tokenizer, plan("a duck", ("duck", "duck", [LEFT])))
