import json

import pytest

import vstar_kernels as vk

SLOPE = vk.Synopsis("A ski slope thaws.", ["Deep snow.", "Wet snow.", "Grass."], anchors=[0, 5, 11])


def test_json_and_files(tmp_path):
    assert vk.Synopsis.from_json(SLOPE.to_json()) == SLOPE
    assert json.loads(SLOPE.to_json())["stages"] == ["Deep snow.", "Wet snow.", "Grass."]
    SLOPE.save(tmp_path / "slope.json")
    assert vk.Synopsis.load(tmp_path / "slope.json") == SLOPE
    assert "anchors" not in json.loads(vk.Synopsis("A hill.", ["A hill."]).to_json())


def test_a_plain_list():
    text = json.dumps(
        [
            {"prompt": "A ski slope thaws.", "subprompts": list(SLOPE.stages)},
            {"prompt": "Dusk über a lake.", "subprompts": ["Day.", "Night."], "anchors": [0, 7]},
        ]
    )
    first, second = vk.Synopsis.list_from_json(text)
    assert (first.stages, first.anchors) == (SLOPE.stages, None)
    assert (second.prompt, second.anchors) == ("Dusk über a lake.", (0, 7))
    assert vk.Synopsis.list_from_json(vk.Synopsis.list_to_json([first, second])) == [first, second]
    assert json.loads(vk.Synopsis.list_to_json([first])) == json.loads(text)[:1]
    assert vk.Synopsis.list_from_json(SLOPE.to_json()) == [SLOPE]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("", ["a"]), ValueError, "prompt must not be empty"),
        ((3, ["a"]), TypeError, "prompt must be a text, got int"),
        (("p", "a"), TypeError, "stages must be a list of texts, got str"),
        (("p", []), ValueError, "at least one description"),
        (("p", ["a", " \n"]), ValueError, r"stages\[1\] must not be empty"),
        (("p", ["a", None]), TypeError, r"stages\[1\] must be a text, got NoneType"),
        (("p", ["a", "b"], [0]), ValueError, "each of the 2 stages, got 1"),
        (("p", ["a", "b"], [4, 4]), ValueError, "increase strictly"),
        (("p", ["a", "b"], [0, True]), TypeError, "anchors must be integers"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        vk.Synopsis(*arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a synopsis: it is not JSON"),
        ("[]", "must be a JSON object, got list"),
        ('{"prompt": "p"}', "stages: it is missing"),
        ('{"stages": ["a"]}', "prompt: it is missing"),
        ('{"prompt": "p", "stages": ["a"], "subprompts": ["a"]}', "subprompts: there is no such"),
        ('{"prompt": "p", "stages": ["a"], "anchor": [0]}', "anchor: there is no such field"),
        ('{"prompt": "p", "stages": "a"}', "stages: .*valid list, got str"),
    ],
)
def test_wrong_json(text, message):
    with pytest.raises(ValueError, match=message):
        vk.Synopsis.from_json(text)


def test_wrong_lists():
    with pytest.raises(ValueError, match="at least one, got none"):
        vk.Synopsis.list_from_json("[]")
    twice = json.dumps([{"prompt": "p", "stages": ["a"]}] * 2)
    with pytest.raises(ValueError, match="'p' twice"):
        vk.Synopsis.list_from_json(twice)
