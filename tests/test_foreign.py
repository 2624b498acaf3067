"""What may lie in a folder that somebody else wrote, and what is made of it."""

import os

import pytest

from moejax.foreign import has_link, no_links, open_file, printable, read_file, require_path


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "zero").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


def test_a_file_is_read_up_to_a_size(folder):
    assert read_file(folder / "file", 7) == b"content"
    with pytest.raises(OSError, match="it is larger than"):
        read_file(folder / "file", 6)
    os.truncate(folder / "file", 1 << 42)  # which reading whole would not survive
    with pytest.raises(OSError, match="it is larger than 1 MiB"):
        read_file(folder / "file", 1 << 20)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("link", "it is a link"),
        ("loop", "it is a link"),
        ("zero", "it is a link"),
        ("folder", "it is no file"),
        ("pipe", "it is no file"),  # `open` would wait for a writer
        ("missing", "No such file"),
    ],
)
def test_what_is_no_file_is_neither_followed_nor_waited_for(folder, name, reason):
    with pytest.raises(OSError, match=reason):
        open_file(folder / name)


def test_where_links_are_allowed_they_lead_to_a_file(folder):
    assert read_file(folder / "link", 7, links=True) == b"content"
    with pytest.raises(OSError, match="it is no file"):
        open_file(folder / "zero", links=True)


def test_what_is_written_goes_to_a_file_and_nobody_waits_for_a_reader(folder):
    for name, reason in (("link", "symbolic links"), ("pipe", "No such device or address")):
        with (
            pytest.raises(OSError, match=reason),
            open(folder / name, "wb", opener=no_links),
        ):
            pass
    with open(folder / "file", "wb", opener=no_links) as stream:
        stream.write(b"x" * 100_000)
    assert (folder / "file").stat().st_size == 100_000


def test_a_path_is_one_that_the_system_takes(folder):
    require_path(str(folder / "not" / "yet"))
    require_path(str(folder / "file" / "below"))
    for path in (str(folder / "loop"), "x" * 5000):
        with pytest.raises(OSError, match=r"Too many levels|too long"):
            require_path(path)


def test_which_name_is_a_link_or_of_another_kind(folder):
    assert has_link(folder, ("file", "missing")) is None
    assert has_link(folder, ("file", "link")) == "link"
    assert has_link(folder, ("pipe",)) == "pipe"
    assert has_link(folder, ("folder",), folders=True) is None
    assert has_link(folder, ("file",), folders=True) == "file"


def test_what_steers_a_terminal_or_turns_text_around_is_spelled_out():
    assert printable("\x1b[2Ja\u202eb\udcff\r\n") == "\\x1b[2Ja\\u202eb\\udcff\\r\n"
