"""Plans from servers, files and the cache; what is wrong with an answer is sent back."""

import copy
import json
from itertools import pairwise

import pytest

import vstar_kernels as vk
from vstar_kernels.methods.starvid.writer import (
    EXAMPLE_BOXES,
    EXAMPLE_PROMPT,
    EXAMPLE_SUBJECTS,
    PlanError,
    about_boxes,
    boxes_form,
    subjects_form,
)
from vstar_kernels.reading import FormatError, validate

pytest.importorskip("openai")
from tests.methods.chat_server import ChatServer, answers

pytestmark = pytest.mark.usefixtures("nobody")

PROMPT = "A cat runs past two dogs."
LEFT, MIDDLE, RIGHT = [0.0, 0.5, 0.25, 1.0], [0.375, 0.5, 0.625, 1.0], [0.75, 0.5, 1.0, 1.0]
TABLE = {
    "subjects": [
        {"noun": "cat", "count": 1, "verb": "runs", "phrase": "runs by", "motion": "to the right"},
        {"noun": "dogs", "count": 2, "verb": None, "phrase": "sit", "motion": "none"},
    ],
    "background": "a street",
}
BOXES = {
    "subjects": [
        {"id": 1, "boxes": [None, [0.0, 0.0, 0.25, 0.4], [0.75, 0.0, 1.0, 0.4]]},
        {"id": 2, "boxes": [LEFT, LEFT, LEFT]},
        {"id": 3, "boxes": [RIGHT, RIGHT, MIDDLE]},
    ]
}
GOOD = [answers(json.dumps(TABLE)), answers(json.dumps(BOXES))]


def write(server, prompt=PROMPT, key_frames=3, refresh=False, **settings):
    settings = {"timeout": 5.0, "api_key": "sk-test", **settings}
    writer = vk.TrajectoryWriter.from_endpoint("tiny", base_url=server.url, **settings)
    return writer.write(prompt, key_frames=key_frames, refresh=refresh)


def changed(answer, *path_and_value):
    """The answer with a value at a path."""
    *path, last, value = path_and_value
    answer = copy.deepcopy(answer)
    place = answer
    for step in path:
        place = place[step]
    place[last] = value
    return answer


def test_a_plan():
    with ChatServer(*GOOD) as server:
        plan = write(server)
    assert [x.noun for x in plan.subjects] == ["cat", "dogs", "dogs"]
    assert [x.verb for x in plan.subjects] == ["runs", None, None]
    assert plan.subjects[0].boxes == (None, (0.0, 0.0, 0.25, 0.4), (0.75, 0.0, 1.0, 0.4))
    assert plan.subjects[2].boxes[2] == tuple(MIDDLE)
    assert (plan.prompt, plan.background, plan.key_frames) == (PROMPT, "a street", 3)
    first, second = (request["messages"][-1]["content"] for request in server.requests)
    assert first.startswith(f"Sentence: {PROMPT}\n\nAnswer with one JSON object")
    assert "to the right" in second  # the table of the first answer, with an id for each subject
    assert all(f'"id": {number}' in second for number in (1, 2, 3))
    assert "Number of key frames: 3" in second


def test_the_example_keeps_to_the_rules():
    table = validate(subjects_form(EXAMPLE_PROMPT), EXAMPLE_SUBJECTS)
    assert sum(x.count for x in table.subjects) == 3
    validate(boxes_form(3, 6), EXAMPLE_BOXES)
    question = about_boxes(EXAMPLE_PROMPT, EXAMPLE_SUBJECTS, 6)[1]["content"]
    assert question.count('"id"') == 3
    falls = [box[1] for box in EXAMPLE_BOXES["subjects"][0]["boxes"]]
    steps = [b - a for a, b in pairwise(falls)]
    assert steps == sorted(steps)  # faster and faster, as it says


@pytest.mark.parametrize(
    ("path_and_value", "message"),
    [
        (("subjects", []), "expected 1 to 12 subjects in all, found 0"),
        (("subjects", 0, "noun", "horse"), "subjects[0].noun: 'horse' is not a word of the"),
        (("subjects", 0, "noun", "ca"), "'ca' is not a word of the sentence"),
        (("subjects", 0, "verb", "flies"), "subjects[0].verb: 'flies' is not a word"),
        (("subjects", 0, "verb", "Cat"), "subjects[0].verb: 'Cat' is the noun already"),
        (("subjects", 0, "count", 0), "subjects[0].count"),
        (("subjects", 1, "count", 12), "found 13"),
        (("subjects", 0, "phrase", "…"), "subjects[0].phrase: it has no text"),
        (("background", 3), "background"),
        (("more", "x"), "more: there is no such field"),
    ],
)
def test_what_is_wrong_with_subjects_is_sent_back(path_and_value, message):
    wrong = answers(json.dumps(changed(TABLE, *path_and_value)))
    with ChatServer(wrong, *GOOD) as server:
        assert len(write(server, cache=False).subjects) == 3
    assert message in server.requests[1]["messages"][-1]["content"]


@pytest.mark.parametrize(
    ("path_and_value", "message"),
    [
        (("subjects", 1, "id", 1), "expected the ids 1 to 3, each once, found 1, 1, 3"),
        (("subjects", 2, "id", 4), "found 1, 2, 4"),
        (("subjects", BOXES["subjects"][:2]), "found 1, 2"),
        (("subjects", 0, "boxes", [LEFT]), "expected 3 boxes, found 1"),
        (("subjects", 0, "boxes", [None] * 3), "the subject is in no key frame"),
        (("subjects", 0, "boxes", 1, [0, 0, 1]), "key frame 2 must have 4 numbers, found 3"),
        (("subjects", 0, "boxes", 1, [0.5, 0, 0.5, 1]), "is empty, [0.5, 0.0, 0.5, 1.0]"),
        (("subjects", 0, "boxes", 1, [0, 0, 1.03, 0.4]), "leaves the picture, [0.0, 0.0, 1.03"),
        (("subjects", 0, "boxes", 1, [0, 0, 0.05, 0.05]), "too small"),
        (("subjects", 2, "boxes", 1, LEFT), "key frame 2 the boxes of the ids 2 and 3 overlap"),
        (("subjects", 0, "boxes", 1, ["0", 0, 1, 1]), "boxes[1][0]"),
    ],
)
def test_what_is_wrong_with_boxes_is_sent_back(path_and_value, message):
    wrong = answers(json.dumps(changed(BOXES, *path_and_value)))
    with ChatServer(GOOD[0], wrong, GOOD[1]) as server:
        assert write(server).subjects[2].boxes[2] == tuple(MIDDLE)
    assert message in server.requests[2]["messages"][-1]["content"]


def test_a_box_that_leaves_the_picture_a_little_is_cut_off():
    outside = changed(BOXES, "subjects", 0, "boxes", 1, [-0.02, -0.01, 0.25, 0.4])
    with ChatServer(GOOD[0], answers(json.dumps(outside))) as server:
        assert write(server).subjects[0].boxes[1] == (0.0, 0.0, 0.25, 0.4)


@pytest.mark.parametrize(
    "text", ["I cannot help with that.", "The cat is on the left.", '{"subjects": [{"noun":', ""]
)
def test_no_answer_is_an_error(text):
    with ChatServer(answers(text)) as server, pytest.raises(PlanError, match="no plan of 'A cat"):
        write(server, attempts=2)
    assert len(server.requests) == 2


def test_both_answers_are_kept():
    with ChatServer(*GOOD) as server:
        plan = write(server)
        assert write(server) == plan
        assert len(server.requests) == 2
        server.script = list(GOOD)
        assert write(server, refresh=True) == plan
        assert len(server.requests) == 4
        four = [{**x, "boxes": [*x["boxes"], x["boxes"][-1]]} for x in BOXES["subjects"]]
        server.script = [answers(json.dumps({"subjects": four}))]
        assert write(server, key_frames=4).key_frames == 4
        assert len(server.requests) == 5  # the table of subjects is the one that is kept


def test_files(tmp_path):
    cat = vk.Subject("cat", "runs", boxes=[LEFT, RIGHT])
    plan, other = (vk.Trajectory(prompt, [cat]) for prompt in (PROMPT, "a cat"))
    plan.save(tmp_path / "plan.json")
    writer = vk.TrajectoryWriter.from_file(tmp_path / "plan.json")
    assert writer.write(PROMPT) == writer.write(PROMPT, key_frames=2) == plan
    with pytest.raises(PlanError, match=r"plan.json: expected 6 key frames, found 2"):
        writer.write(PROMPT, key_frames=6)
    with pytest.raises(PlanError, match=r"it has none, but plans of 'A cat runs past two dogs.'"):
        writer.write("a dog")
    listed = f"[{plan.to_json()}, {other.to_json()}]"
    (tmp_path / "plan.json").write_text(listed)
    assert writer.write("a cat") == other
    (tmp_path / "plan.json").write_text(f"[{plan.to_json()}, {plan.to_json()}]")
    with pytest.raises(PlanError, match="each prompt once"):
        writer.write("a cat")
    with pytest.raises(PlanError, match="cannot be read"):
        vk.TrajectoryWriter.from_file(tmp_path / "none.json").write("a cat")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prompt": ""}, ValueError, "prompt must not be empty"),
        ({"prompt": None}, TypeError, "prompt must be a text"),
        ({"prompt": "a", "key_frames": 0}, ValueError, "key_frames must be from 1 to 64, got 0"),
        ({"prompt": "a", "key_frames": 2.0}, TypeError, "key_frames must be an integer"),
        ({"prompt": "a", "refresh": 1}, TypeError, "refresh must be True or False"),
    ],
)
def test_what_it_is_called_with(tmp_path, arguments, error, message):
    writer = vk.TrajectoryWriter.from_file(tmp_path / "plan.json")
    with pytest.raises(error, match=message):
        writer.write(**arguments)


def test_a_source_that_is_none():
    with pytest.raises(TypeError, match="source must be a language model or a TrajectoryFile"):
        vk.TrajectoryWriter("plan.json")


def test_the_forms_say_where():
    with pytest.raises(FormatError, match=r"^subjects\[1\]\.id: "):
        validate(boxes_form(3, 3), changed(BOXES, "subjects", 1, "id", "two"))
