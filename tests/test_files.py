import os
import signal
import stat
import threading
from pathlib import Path

import pytest

from vstar_kernels.files import IncompleteError, results_folder, write_atomically

NAMES = ("video.mp4", "maps.png", "record.json")


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def save(folder, **texts):
    for name, text in texts.items():
        (folder / name.replace("_", ".")).write_text(text)


@pytest.fixture
def umask():
    """A umask that is not the usual one."""
    before = os.umask(0o027)
    yield
    os.umask(before)


@pytest.fixture
def earlier(tmp_path):
    """A folder with the results of an earlier run and a file of the user's."""
    folder = tmp_path / "output"
    folder.mkdir()
    save(folder, video_mp4="old video", maps_png="old maps", notes_txt="mine")
    return folder


@pytest.mark.parametrize("data", ["σ\r\n", b"\x00\xff"])
def test_a_file_holds_what_was_written(tmp_path, data):
    path = tmp_path / "file"
    for _ in range(2):
        write_atomically(path, data)
        assert path.read_bytes() == (data if isinstance(data, bytes) else data.encode())
        assert os.listdir(tmp_path) == ["file"]


def test_an_error_names_the_path_that_was_given(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "none" / "file.json", tmp_path / "file" / "file.json"):
        with pytest.raises(OSError) as caught:
            write_atomically(path, "")
        assert caught.value.filename == str(path)
        assert str(caught.value).endswith(f": {str(path)!r}")


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
def test_a_file_has_the_permissions_that_open_gives(tmp_path, umask):
    ordinary, ours = tmp_path / "ordinary", tmp_path / "ours"
    ordinary.write_text("")
    write_atomically(ours, "")
    assert mode(ours) == mode(ordinary) == 0o640
    ours.chmod(0o604)
    write_atomically(ours, "again")
    assert mode(ours) == 0o604


def test_a_link_to_a_file_stays_one(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "target", tmp_path / "link"
    link.symlink_to(target)
    for text in ("new", "newer"):  # the first time, the link leads nowhere
        write_atomically(link, text)
        assert link.is_symlink()
        assert target.read_text() == text
    assert os.listdir(target.parent) == ["target"]


def test_a_write_that_fails_changes_nothing(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("old")

    def refuse(*_):
        raise OSError("no")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="no"):
        write_atomically(path, "new")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "\ud800")
    assert contents(tmp_path) == {"file": "old"}


@pytest.mark.skipif(os.name != "posix", reason="pipes with names are POSIX's")
@pytest.mark.parametrize("make", ["mkdir", "mkfifo"])
def test_what_is_no_file_is_neither_replaced_nor_waited_for(tmp_path, make):
    getattr(os, make)(tmp_path / "place")
    with pytest.raises(OSError, match="is not a regular file"):
        write_atomically(tmp_path / "place", "text")
    assert os.listdir(tmp_path) == ["place"]


def test_a_reader_never_finds_half_a_file(tmp_path):
    path, done = tmp_path / "file", threading.Event()
    texts = {letter * 100_000 for letter in "ab"}
    path.write_text("a" * 100_000)

    def write():
        while not done.is_set():
            for text in texts:
                write_atomically(path, text)

    writers = [threading.Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    try:
        assert all(path.read_text() in texts for _ in range(200))
    finally:
        done.set()
        for writer in writers:
            writer.join()
    assert os.listdir(tmp_path) == ["file"]


def test_a_new_folder_appears_at_once(tmp_path, umask):
    output = tmp_path / "new" / "output"
    with results_folder(output, NAMES) as folder:
        save(folder, video_mp4="video")
        assert not output.exists()
        assert folder.parent == output.parent
    assert contents(output) == {"video.mp4": "video"}
    assert os.listdir(output.parent) == ["output"]
    assert mode(output) == 0o750


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_empty_folder_is_filled(tmp_path, monkeypatch, overwrite):
    monkeypatch.chdir(tmp_path)
    with results_folder(".", NAMES, overwrite=overwrite) as folder:
        save(folder, video_mp4="video")
    assert contents(tmp_path) == {"video.mp4": "video"}


def test_an_earlier_run_is_exchanged_and_other_files_stay(earlier):
    earlier.chmod(0o700)
    with results_folder(earlier, NAMES, overwrite=True) as folder:
        save(folder, video_mp4="new video", record_json="new record")
        assert (earlier / "video.mp4").read_text() == "old video"
    assert contents(earlier) == {
        "video.mp4": "new video",
        "record.json": "new record",
        "notes.txt": "mine",
    }
    assert mode(earlier) == 0o700
    assert os.listdir(earlier.parent) == ["output"]


def test_a_link_to_a_folder_stays_one(earlier, tmp_path):
    (tmp_path / "link").symlink_to(earlier)
    with results_folder(tmp_path / "link", NAMES, overwrite=True) as folder:
        save(folder, video_mp4="new video")
    assert (tmp_path / "link").is_symlink()
    assert contents(earlier) == {"video.mp4": "new video", "notes.txt": "mine"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_body_that_raises_changes_nothing(tmp_path, earlier, error, overwrite):
    output = earlier if overwrite else tmp_path / "new"
    before = contents(earlier)
    with pytest.raises(error), results_folder(output, NAMES, overwrite=overwrite) as folder:  # noqa: PT012
        save(folder, video_mp4="half")
        raise error
    assert contents(earlier) == before
    assert os.listdir(tmp_path) == ["output"]


@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("at", range(4))
def test_an_exchange_that_is_interrupted_is_undone(earlier, monkeypatch, kind, at):
    before, rename, moves = contents(earlier), os.rename, []

    def interrupted(source, target):
        if len(moves) == at:
            moves.append(None)
            raise kind("full")
        moves.append(source)
        rename(source, target)

    monkeypatch.setattr(os, "rename", interrupted)
    with (
        pytest.raises(kind) as caught,
        results_folder(earlier, NAMES, overwrite=True) as folder,
    ):
        save(folder, video_mp4="new video", maps_png="new maps")
    (kept,) = (path for path in earlier.iterdir() if path.is_dir())
    assert f"the results are in {kept}" in str(caught.value)
    assert contents(kept) == {"video.mp4": "new video", "maps.png": "new maps"}
    assert {path.name: path.read_text() for path in earlier.iterdir() if path != kept} == before


@pytest.mark.skipif(os.name != "posix", reason="signals to oneself are POSIX's")
@pytest.mark.parametrize("at", range(4))
def test_a_signal_waits_until_an_exchange_is_done(earlier, monkeypatch, at):
    rename, moves = os.rename, []

    def interrupted(source, target):
        if len(moves) == at:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        moves.append(source)
        rename(source, target)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        monkeypatch.setattr(os, "rename", interrupted)
        with (
            pytest.raises(KeyboardInterrupt),
            results_folder(earlier, NAMES, overwrite=True) as folder,
        ):
            save(folder, video_mp4="new video", maps_png="new maps")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(moves) == 4
    assert contents(earlier) == {
        "video.mp4": "new video",
        "maps.png": "new maps",
        "notes.txt": "mine",
    }


def test_in_a_thread_there_are_no_signals_to_wait_for(earlier):
    def run():
        with results_folder(earlier, NAMES, overwrite=True) as folder:
            save(folder, video_mp4="new video")

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert contents(earlier) == {"video.mp4": "new video", "notes.txt": "mine"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_incomplete_results_are_kept(tmp_path, earlier, overwrite):
    output = earlier if overwrite else tmp_path / "new"
    before = contents(earlier)
    with (  # noqa: PT012
        pytest.raises(OSError, match=r"no maps; the results are in .*") as caught,
        results_folder(output, NAMES, overwrite=overwrite) as folder,
    ):
        save(folder, video_mp4="new video")
        raise IncompleteError("no maps")
    kept = Path(str(caught.value).rpartition(" ")[2])
    assert contents(kept) == {"video.mp4": "new video"}
    assert {path.name: path.read_text() for path in earlier.iterdir() if path.is_file()} == before


def test_a_folder_in_a_files_place_is_found_before(earlier):
    (earlier / "record.json").mkdir()
    with (
        pytest.raises(OSError, match=r"record\.json is a folder"),
        results_folder(earlier, NAMES, overwrite=True),
    ):
        raise AssertionError  # nothing is computed in vain
    (earlier / "record.json").rmdir()
    assert contents(earlier) == {
        "video.mp4": "old video",
        "maps.png": "old maps",
        "notes.txt": "mine",
    }


def test_a_folder_in_a_files_place_is_not_deleted(earlier):
    with (  # noqa: PT012
        pytest.raises(OSError, match=r"record\.json is a folder.*the results are in"),
        results_folder(earlier, NAMES, overwrite=True) as folder,
    ):
        save(folder, video_mp4="new video")
        (earlier / "record.json").mkdir()
    assert (earlier / "video.mp4").read_text() == "old video"
    assert (earlier / "maps.png").read_text() == "old maps"


def test_a_folder_that_is_not_empty_is_found_before(earlier):
    with pytest.raises(OSError, match="output is not empty"), results_folder(earlier, NAMES):
        raise AssertionError  # nothing is computed in vain


@pytest.mark.parametrize("existed", [False, True])
def test_a_folder_that_is_filled_meanwhile(tmp_path, existed):
    output = tmp_path / "output"
    if existed:
        output.mkdir()
    with (  # noqa: PT012
        pytest.raises(OSError, match="the results are in ") as caught,
        results_folder(output, NAMES) as folder,
    ):
        save(folder, video_mp4="ours")
        output.mkdir(exist_ok=True)
        save(output, video_mp4="theirs")
    assert (output / "video.mp4").read_text() == "theirs"
    (kept,) = (path.parent for path in tmp_path.rglob("video.mp4") if path.parent != output)
    assert str(caught.value).endswith(str(kept))
    assert existed or "output has been filled meanwhile, by another run" in str(caught.value)
    assert not kept.name.startswith(".")
    assert contents(kept) == {"video.mp4": "ours"}


def test_a_file_that_vanishes_meanwhile_keeps_no_other_from_going_back(earlier, monkeypatch):
    rename = os.rename

    def lose_the_maps(source, target):
        if os.path.basename(source) == "maps.png" and os.path.dirname(source) == str(earlier):
            os.unlink(source)
        rename(source, target)

    monkeypatch.setattr(os, "rename", lose_the_maps)
    with (
        pytest.raises(OSError, match=r"the results are in .*results-"),
        results_folder(earlier, NAMES, overwrite=True) as folder,
    ):
        save(folder, video_mp4="new video", maps_png="new maps")
    left = {path.name: path for path in earlier.iterdir()}
    (results,) = (path for name, path in left.items() if name.startswith("results-"))
    assert contents(results) == {"video.mp4": "new video", "maps.png": "new maps"}
    assert set(left) == {"video.mp4", "notes.txt", results.name}
    assert left["video.mp4"].read_text() == "old video"


def test_a_body_that_raises_leaves_no_folders_above(tmp_path):
    with pytest.raises(ZeroDivisionError), results_folder(tmp_path / "a" / "b", NAMES):
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []


def test_links_in_a_circle_are_an_error_of_the_system(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(OSError):
        write_atomically(tmp_path / "a", "")


def test_nothing_is_left_of_results_of_which_none_could_be_written(tmp_path):
    with (
        pytest.raises(IncompleteError, match=r"^all is elsewhere$"),
        results_folder(tmp_path / "new", NAMES),
    ):
        raise IncompleteError("all is elsewhere")
    assert list(tmp_path.iterdir()) == []
