import json

import pytest
import torch

import vstar_kernels as vk
from vstar_kernels.models.layers import Regularization
from vstar_kernels.reading import FormatError

MATRIX = torch.rand(4, 4)


def biases(config):
    return {
        key: (t.bias.sigma, t.bias.strength, t.bias.stat, t.bias.clamp_negative)
        for key, t in config.regularizations.items()
    }


@pytest.mark.parametrize(
    ("config", "key", "expected"),
    [
        (vk.TARConfig(2.0), "level", {0: 2.0}),
        (vk.TARConfig({0: 1.0, 2: 8}), "level", {0: 1.0, 2: 8}),
        (vk.TARConfig(by_width={64: 1.0}), "width", {64: 1.0}),
        (vk.TARConfig.preset("64D1"), "width", {64: 1.0}),
        (vk.TARConfig.preset("64D1_32D8"), "width", {64: 1.0, 32: 8.0}),
        (vk.TARConfig.preset("64D4_32D12"), "width", {64: 4.0, 32: 12.0}),
        (vk.TARConfig.preset("128D0.5_16D2"), "width", {128: 0.5, 16: 2.0}),
    ],
)
def test_sigmas(config, key, expected):
    assert config.key == key
    assert config.steps == 13
    assert biases(config) == {k: (sigma, 1.0, "row_max", False) for k, sigma in expected.items()}


def test_weights():
    config = vk.TARConfig(
        {0: 1.0, 1: 2.0}, strength={0: 0.5, 1: 2.0}, stat="map_max", clamp_negative=True
    )
    assert biases(config) == {0: (1.0, 0.5, "map_max", True), 1: (2.0, 2.0, "map_max", True)}
    assert biases(vk.TARConfig({0: 1.0, 1: 2.0}, strength=3.0))[1] == (2.0, 3.0, "row_max", False)


def test_other_biases():
    dense, toeplitz = vk.DenseBias(MATRIX), vk.ToeplitzBias(torch.ones(2, 7), signed=True)
    config = vk.TARConfig(bias=dense, strength=0.5)
    assert set(config.regularizations) == {0}
    assert config.regularizations[0].bias.delta is MATRIX
    assert config.regularizations[0].bias.strength == 0.5
    config = vk.TARConfig({0: 1.0}, bias={1: toeplitz, 2: dense})
    assert [type(t.bias).__name__ for t in config.regularizations.values()] == [
        "GaussianBias",
        "ToeplitzBias",
        "DenseBias",
    ]
    assert config.regularizations[1].bias.signed


def test_overrides():
    config = vk.TARConfig({0: 1.0, 1: 2.0}, override={1: "identity", 2: "uniform"})
    assert list(config.regularizations) == [0, 1, 2]
    assert config.regularizations[1] == Regularization(override="identity")
    assert config.regularizations[2] == Regularization(override="uniform")
    assert config.regularizations[0].bias.sigma == 1.0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "regularizes nothing: give sigma, by_width, bias or override"),
        ({"sigma": {}}, ValueError, "regularizes nothing"),
        ({"sigma": 1.0, "by_width": {64: 1.0}}, ValueError, "not both"),
        ({"sigma": -1.0}, ValueError, "sigma must be at least 0 .* got -1"),
        ({"sigma": "64D1"}, TypeError, "sigma must be a number, got str"),
        ({"by_width": 64}, TypeError, "by_width must map widths to sigma, got int"),
        ({"sigma": {"0": 1.0}}, ValueError, "sigma must be keyed by .* got '0'"),
        ({"sigma": {-1: 1.0}}, ValueError, "sigma must be keyed by .* got -1"),
        ({"sigma": 1.0, "strength": "1"}, TypeError, "strength must be a number, got str"),
        ({"sigma": {0: 1.0, 1: 1.0}, "strength": {0: 1.0}}, ValueError, "by 0, 1, got 0"),
        ({"sigma": 1.0, "strength": {0: 1.0, 3: 1.0}}, ValueError, "by 0, got 0, 3"),
        ({"sigma": 1.0, "stat": "mean"}, ValueError, "stat must be one of .* got 'mean'"),
        ({"sigma": 1.0, "stat": torch.ones(1)}, ValueError, "stat must be one of"),
        ({"sigma": 1.0, "steps": -1}, ValueError, "steps as an index .* got -1"),
        ({"sigma": 1.0, "steps": 0.0}, ValueError, r"share .* in \(0, 1\], got 0"),
        ({"sigma": 1.0, "steps": 1.5}, ValueError, r"share .* in \(0, 1\], got 1.5"),
        ({"sigma": 1.0, "steps": float("nan")}, ValueError, "got nan"),
        ({"sigma": 1.0, "steps": True}, TypeError, "steps must be .* got bool"),
        ({"sigma": 1.0, "steps": "13"}, TypeError, "steps must be .* got str"),
        ({"override": {0: "ones"}}, ValueError, "'identity' or 'uniform', got 'ones' for 0"),
        ({"override": {0: ["identity"]}}, ValueError, r"got \['identity'\] for 0"),
        ({"override": "identity"}, TypeError, "override must map levels or widths, got str"),
        ({"bias": MATRIX}, TypeError, "bias must be a ToeplitzBias or a DenseBias, got Tensor"),
        ({"bias": vk.GaussianBias(1.0)}, TypeError, "got GaussianBias: give its sigma instead"),
        ({"bias": vk.DenseBias(MATRIX, strength=2.0)}, ValueError, "give strength to TARConfig"),
        ({"bias": vk.DenseBias(MATRIX, stat="none")}, ValueError, "give stat to TARConfig"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        vk.TARConfig(**arguments)


@pytest.mark.parametrize(
    "name", ["", "64", "D1", "64D", "64D1_", "64D1 32D8", "64D1_64D2", "64D-1"]
)
def test_bad_presets(name):
    with pytest.raises(ValueError, match="a preset must be <width>D<sigma>"):
        vk.TARConfig.preset(name)


def test_a_preset_is_a_text():
    with pytest.raises(TypeError, match="a preset must be a text, got int"):
        vk.TARConfig.preset(64)


@pytest.mark.parametrize(
    "config",
    [
        vk.TARConfig(2.0),
        vk.TARConfig({0: 1.0, 2: 8.0}, strength={0: 0.5, 2: 1.5}, steps=None),
        vk.TARConfig(1.0, steps=0.5, stat="none", clamp_negative=True, include_init=True),
        vk.TARConfig(1.0, steps=1),
        vk.TARConfig(1.0, steps=1.0),
        vk.TARConfig.preset("64D1_32D8"),
        vk.TARConfig(by_width={64: 1.0}, override={32: "identity"}),
    ],
)
def test_json_round_trip(config, tmp_path):
    assert vk.TARConfig.from_json(config.to_json()) == config
    config.save(tmp_path / "tar.json")
    loaded = vk.TARConfig.load(tmp_path / "tar.json")
    assert loaded == config
    assert type(loaded.steps) is type(config.steps)


@pytest.mark.parametrize(
    "bias",
    [
        vk.DenseBias(torch.rand(2, 4, 4)),
        vk.DenseBias(torch.rand(4, 4, dtype=torch.float64)),
        vk.ToeplitzBias(torch.rand(4).bfloat16()),
        vk.ToeplitzBias(torch.rand(2, 7), signed=True),
    ],
)
def test_tables_come_back_exactly(bias):
    for given in (bias, {0: bias, 1: bias}):
        loaded = vk.TARConfig.from_json(vk.TARConfig(bias=given).to_json())
        found = loaded.bias if given is bias else loaded.bias[1]
        assert type(found) is type(bias)
        assert found.entries.dtype == bias.entries.dtype
        assert torch.equal(found.entries, bias.entries)
        assert getattr(found, "signed", None) == getattr(bias, "signed", None)


def test_left_out_fields_have_their_defaults():
    assert vk.TARConfig.from_json('{"sigma": 1.0}') == vk.TARConfig(1.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"sigma": 1.0, "sgima": 2.0}', "^sgima: there is no such field"),
        ("[1]", "must be a JSON object, got list"),
        ("{", "it is not JSON: Expecting property name"),
        ('{"sigma": {"fine": 1.0}}', r"^sigma\.fine: it must be keyed by levels or widths"),
        (
            '{"bias": {"form": "band", "table": [1.0]}}',
            "^bias: Input tag 'band' .* expected tags: 'toeplitz', 'dense'",
        ),
        (
            '{"bias": {"form": "dense", "value": [1.0]}}',
            r"bias\.dense\.value: there is no such field",
        ),
        (
            '{"bias": {"form": "dense", "signed": true}}',
            r"bias\.dense\.signed: there is no such field",
        ),
        ('{"bias": {"form": "toeplitz"}}', r"^bias\.toeplitz\.table: it is missing"),
        (
            '{"bias": {"form": "dense", "delta": [[1.0]], "dtype": "f4"}}',
            r"^bias\.dense\.dtype: Input should be 'float32'",
        ),
    ],
)
def test_bad_json(text, message):
    with pytest.raises(ValueError, match=message):
        vk.TARConfig.from_json(text)


HUGE = "9" * 400


def dense(delta):
    return f'{{"bias": {{"form": "dense", "delta": {delta}}}}}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 10**5, "nested too deeply"),
        ('{"sigma": ' + "[" * 10**5, "nested too deeply"),
        ('{"sigma": [[1.0]]}', "^sigma: .*valid number, got list"),
        (f'{{"sigma": {HUGE}}}', "^sigma: 9999.* too many digits"),
        (f'{{"sigma": {"9" * 5000}}}', "^sigma: 9999.* too many digits"),
        ('{"sigma": 1e400}', "^sigma: 1e400 is too large"),
        ('{"sigma": {"0": Infinity}}', r"^sigma\.0: Infinity is not a number in JSON"),
        ('{"sigma": 1.0, "steps": NaN}', "^steps: NaN is not a number in JSON"),
        ('{"sigma": 1.0, "steps": 1.5}', r"^steps as a share of the schedule .* got 1.5"),
        ('{"sigma": 1.0, "steps": true}', "^steps: .*valid integer, got bool"),
        ('{"sigma": true}', "^sigma: .*valid number, got bool"),
        ('{"sigma": "1"}', "^sigma: .*valid number, got str"),
        ('{"sigma": {"1": "1"}}', r"^sigma\.1: .*valid number, got str"),
        ('{"sigma": {"1": 1.0, "01": 2.0}}', r"^sigma\.01: it must be keyed by"),
        ('{"sigma": {"1": 1.0, "\u0661": 2.0}}', "^sigma.\u0661: it must be keyed by"),
        ('{"sigma": {"\\ud800": 1.0}}', r"^sigma\.: it must be keyed by"),
        ('{"sigma": {"1": 1.0, "1": 2.0}}', r"^sigma\.1: it is there twice"),
        (f'{{"sigma": {{"{HUGE}": 1.0}}}}', r"^sigma\.9999.*: it must be keyed by"),
        ('{"sigma": 1.0, "sigma": 2.0}', "^sigma: it is there twice"),
        ('{"by_width": 64}', "^by_width: .*valid dictionary, got int"),
        ('{"sigma": 1.0, "strength": null}', "^strength: .*valid number, got NoneType"),
        ('{"sigma": 1.0, "clamp_negative": "no"}', "^clamp_negative: .*valid boolean, got str"),
        ('{"sigma": 1.0, "include_init": 1}', "^include_init: .*valid boolean, got int"),
        ('{"sigma": 1.0, "stat": ["row_max"]}', "^stat: Input should be 'row_max', .*got list"),
        ('{"sigma": 1.0, "stat": "mean"}', "^stat: Input should be 'row_max', .*got str"),
        (
            '{"override": {"0": 1}}',
            r"^override\.0: Input should be 'identity' or 'uniform', got int",
        ),
        (
            '{"override": {"0": "ones"}}',
            r"^override\.0: Input should be 'identity' or 'uniform', got str",
        ),
        ('{"bias": 1.0}', "^bias: .*got float"),
        ('{"bias": {"1": {"delta": [[1.0]]}}}', r"^bias\.1: .*'form'"),
        (
            dense("[[1, null], [0, 1]]"),
            r"^bias\.dense\.delta\[0\]\[1\]: .*valid number, got NoneType",
        ),
        (
            '{"bias": {"2": {"form": "dense", "delta": [[1, 1e400]]}}}',
            r"^bias\.2\.delta\[0\]\[1\]: 1e400 is too large",
        ),
        (dense("[[1, 0], [1]]"), "^bias: lists must be of equal lengths"),
        (dense("[[1, 0], 1]"), r"^bias\.dense\.delta\[1\]: .*valid list, got int"),
        (dense("[[[[1]]]]"), r"^bias\.dense\.delta\[0\]\[0\]\[0\]: .*valid number, got list"),
        (dense("[[1, 0]]"), r"^bias: .* must be square"),
        (
            '{"bias": {"form": "dense", "delta": [[1e30]], "dtype": "float16"}}',
            "^bias: there are numbers that are too large for float16",
        ),
        (
            '{"bias": {"form": "toeplitz", "table": [1.0], "dtype": "int32"}}',
            r"^bias\.toeplitz\.dtype: Input should be 'float32'",
        ),
        (
            '{"bias": {"form": "toeplitz", "table": [1.0], "signed": "yes"}}',
            r"^bias\.toeplitz\.signed: .*valid boolean, got str",
        ),
        (
            '{"bias": {"form": "dense", "form": "dense", "delta": [[1]]}}',
            r"^bias\.form: it is there twice",
        ),
    ],
)
def test_hostile_json_is_one_kind_of_error_that_names_the_field(text, message):
    with pytest.raises(FormatError, match=message) as caught:
        vk.TARConfig.from_json(text)
    assert len(str(caught.value)) < 400
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("flag", ["clamp_negative", "include_init"])
def test_flags_are_flags(flag):
    with pytest.raises(TypeError, match=f"{flag} must be True or False, got str"):
        vk.TARConfig(1.0, **{flag: "no"})


def test_what_cannot_be_saved(tmp_path):
    path = tmp_path / "tar.json"
    with pytest.raises(ValueError, match="steps is a callable cannot be saved"):
        vk.TARConfig(1.0, steps=lambda step, timestep: True).save(path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        vk.TARConfig(bias=vk.ToeplitzBias(torch.tensor([1.0, float("inf")]))).save(path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        vk.TARConfig(float("inf")).save(path)
    with pytest.raises(ValueError, match="sigma must fit a float, got an integer of 1329 bits"):
        vk.TARConfig(10**400).save(path)
    assert not path.exists()


def test_the_file_is_readable():
    data = json.loads(vk.TARConfig.preset("64D1").to_json())
    assert data["by_width"] == {"64": 1.0}
    assert data["steps"] == 13
