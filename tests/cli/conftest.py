import pytest

TITLES = ("Value error", "Invalid choice", "Mutually exclusive arguments")  # of tyro's boxes


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """The folder of a tiny saved text-to-video pipeline, into which no test writes."""
    from examples import tiny  # only tests that have diffusers ask for a model

    folder = tmp_path_factory.mktemp("model")
    tiny.text_to_video().save_pretrained(folder)
    return folder


@pytest.fixture
def wide_terminal(monkeypatch):
    """Keeps a command's messages on one line each."""
    monkeypatch.setenv("COLUMNS", "300")


@pytest.fixture
def read_error(wide_terminal, capsys):
    """Reads why a command ended: its last line, or what stands first in the one box of tyro's."""

    def read():
        lines = [line.strip(" │─-╭╮╰╯") for line in capsys.readouterr().err.splitlines()]
        lines = [line for line in lines if line]  # without the box's frame and rules
        if ": error: " in lines[-1]:
            return lines[-1]
        assert lines[-1].startswith("For full helptext, ")
        (title,) = (index for index, line in enumerate(lines) if line in TITLES)
        return lines[title + 1]

    return read
