import pytest

import vstar_kernels as vk
from vstar_kernels.cli.main import main


def test_info(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    for name in ("torch", "native library", "cpu instruction set", "backend cpu"):
        assert name in printed
    assert vk.info()["vstar_kernels"] == vk.__version__


def test_unknown_command(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["inof"])
    assert exit_.value.code == 2
    assert "info" in capsys.readouterr().err
