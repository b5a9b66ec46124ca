import os
import sys
from dataclasses import dataclass
from functools import partial

import pytest

import vstar_kernels as vk
from tests.helpers import run_python
from vstar_kernels.attention import triton
from vstar_kernels.cli import info
from vstar_kernels.cli.main import main
from vstar_kernels.cli.options import read_options
from vstar_kernels.cli.output import say


@dataclass
class Options:
    """What a program without commands is told."""

    fast: bool = False


read = partial(read_options, Options, prog="program")
PRINT = [(main, ["info"]), (main, ["--version"]), (main, ["demo", "--help"]), (read, ["--help"])]
EXTRAS = ("tyro", "jinja2", "psutil", "cpuinfo")


def test_info(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    for name in ("torch", "native library", "cpu instruction set", "backend cpu"):
        assert name in printed
    assert vk.info()["vstar_kernels"] == vk.__version__


def test_info_names_the_machine():
    pytest.importorskip("psutil")
    pytest.importorskip("cpuinfo")
    facts = vk.info()
    assert facts["memory"].endswith(" GiB")
    assert not facts["processor"].startswith("unknown")


@pytest.mark.parametrize(("program", "arguments"), PRINT)
def test_a_reader_that_has_gone_is_no_error(program, arguments, monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as output, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", output)
        with pytest.raises(SystemExit) as stopped:
            program(arguments)
    assert stopped.value.code == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no such device")
@pytest.mark.parametrize(("program", "arguments"), PRINT)
def test_a_full_disk_is_an_error(program, arguments, monkeypatch, capsys):
    with open("/dev/full", "w") as output, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", output)
        with pytest.raises(SystemExit) as stopped:
            program(arguments)
    assert stopped.value.code == 1
    error = capsys.readouterr().err
    assert error == "error: [Errno 28] No space left on device\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no such device")
def test_a_log_on_a_full_disk_is_no_error(monkeypatch):
    with open("/dev/full", "w") as output, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", output)
        say("done")


def test_a_closed_output_is_no_error(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)
        assert main(["info"]) == main(["--version"]) == 0
        say("done")
        for program, arguments in [(main, ["study", "--help"]), (read, ["--help"])]:
            with pytest.raises(SystemExit) as stopped:
                program(arguments)
            assert stopped.value.code == 0


def test_a_flag_has_no_opposite(capsys):
    assert read(["--fast"]).fast
    with pytest.raises(SystemExit):
        read(["--no-fast"])
    assert "--no-fast" in capsys.readouterr().err


def test_info_needs_none_of_the_extras(capsys, monkeypatch):
    info._processor.cache_clear()
    for name in EXTRAS:
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert "py-cpuinfo is not installed" in printed
    assert "psutil is not installed" in printed
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{vk.__version__}\n"
    info._processor.cache_clear()


def test_other_commands_name_the_extra_that_they_need(capsys, monkeypatch):
    for name in list(sys.modules):
        if name.startswith(("tyro", "vstar_kernels.cli.")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert main(["demo"]) == 2
    assert "need tyro" in (error := capsys.readouterr().err)
    assert "pip install 'vstar_kernels[generate]'" in error


def test_an_interrupt_while_packages_are_imported_is_a_line(capsys, monkeypatch):
    class Interrupts:
        def find_spec(self, name, path=None, target=None):
            if name == "tyro":
                raise KeyboardInterrupt

    for name in list(sys.modules):
        if name.split(".")[0] == "tyro" or name.startswith("vstar_kernels.cli."):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Interrupts(), *sys.meta_path])
    assert main(["demo"]) == 130
    assert capsys.readouterr().err == "vstar-kernels: interrupted\n"


def test_nothing_slow_is_imported_to_show_help():
    slow = ("diffusers", "transformers", "matplotlib", "jinja2", "openai", "triton")
    code = f"""
import sys
from vstar_kernels.cli.main import main
try:
    main(["generate", "--help"])
except SystemExit as stopped:
    assert stopped.code == 0
assert not [name for name in {slow} if name in sys.modules]
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", ["info", "demo", "generate", "study"])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    printed = capsys.readouterr().out
    assert f"usage: vstar-kernels {command}" in printed
    assert "None" not in printed


@pytest.mark.parametrize("arguments", [[], ["inof"]])
def test_unknown_command(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert "info" in capsys.readouterr().err


def test_neither_info_nor_available_raises(monkeypatch):
    """Whatever is damaged: both are there to say it."""

    def broken(*arguments):
        raise RuntimeError("damaged")

    monkeypatch.setattr(info.importlib.metadata, "version", broken)
    monkeypatch.setattr(info.torch.cuda, "is_available", broken)
    monkeypatch.setattr(info, "_processor", broken)
    monkeypatch.setattr(triton, "unavailable", broken)
    assert vk.backends.available()["triton"] == ["RuntimeError: damaged"]
    facts = vk.info()
    assert facts["gpu"] == facts["processor"] == facts["triton"] == "unknown: RuntimeError: damaged"
    assert facts["backend triton"] == "RuntimeError: damaged"
