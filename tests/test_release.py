"""What tools/check_release.py says of a release that is none."""

import shutil

import pytest

from tests.helpers import ROOT
from vstar_kernels import __version__

tool = pytest.importorskip("tools.check_release", reason="not a source checkout")
NAMES = [
    "vstar_kernels-1.2.0.tar.gz",
    "vstar_kernels-1.2.0-py3-none-any.whl",
    "vstar_kernels-1.2.0-py3-none-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl",
    "vstar_kernels-1.2.0-py3-none-manylinux_2_27_aarch64.manylinux_2_28_aarch64.whl",
]


def test_the_package_and_the_node_pack_have_one_version():
    """The changelog has the heading of what is not released yet, but on the day of a release."""
    assert {x.split()[0] for x in tool.wrong_versions(f"v{__version__}", ROOT)} <= {"CHANGELOG.md"}


def test_every_place_has_the_tags_version(tmp_path):
    for place, _ in tool.PLACES:
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / place, tmp_path / place)
    (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n## [{__version__}] - 2026-12-01\n")
    assert tool.wrong_versions(f"v{__version__}", tmp_path) == []
    assert len(tool.wrong_versions("v9.8.7", tmp_path)) == len(tool.PLACES)
    assert "the tag 9.8.7 is no version" in tool.wrong_versions("9.8.7", tmp_path)
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## [Unreleased]\n")
    (wrong,) = tool.wrong_versions(f"v{__version__}", tmp_path)
    assert wrong == f"CHANGELOG.md has Unreleased, the tag is v{__version__}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: None, None),
        (lambda folder: (folder / NAMES[1]).unlink(), "must hold a wheel for every platform, once"),
        (lambda folder: (folder / NAMES[3]).unlink(), "must hold a wheel for Arm, once, and has 0"),
        (
            lambda folder: (folder / NAMES[2].replace("1.2.0", "1.1.0")).touch(),
            "manylinux_2_28_x86_64.whl, which is of no release v1.2.0",
        ),
        (
            lambda folder: (folder / NAMES[2].replace("2_27", "2_17")).touch(),
            "must hold a wheel for x86-64, once, and has 2",
        ),
    ],
)
def test_archives(tmp_path, change, message):
    for name in NAMES:
        (tmp_path / name).touch()
    change(tmp_path)
    wrong = tool.wrong_archives("v1.2.0", tmp_path)
    assert len(wrong) == (message is not None)
    assert message is None or message in wrong[0]


def test_no_folder_is_told(tmp_path):
    (wrong,) = tool.wrong_archives("v1.2.0", tmp_path / "none")
    assert wrong.endswith("must be the folder of the archives, and is none")


def test_an_archive_of_another_processor_is_of_no_release(tmp_path):
    for name in NAMES:
        (tmp_path / name.replace("aarch64", "ppc64le")).touch()
    missing, besides = tool.wrong_archives("v1.2.0", tmp_path)
    assert "must hold a wheel for Arm, once, and has 0" in missing
    assert "ppc64le.whl, which is of no release" in besides
