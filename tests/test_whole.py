"""Files and folders are there whole, or not at all."""

import pytest

from modules.whole import whole, whole_folder


def test_a_file_keeps_its_content_until_the_new_one_is_whole(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(OSError), whole(tmp_path / "a") as beside:
        beside.write_text("ne")
        raise OSError("no space")
    assert (tmp_path / "a").read_text() == "old" and len(list(tmp_path.iterdir())) == 1
    with whole(tmp_path / "a") as beside:
        beside.write_text("new")
    assert (tmp_path / "a").read_text() == "new" and len(list(tmp_path.iterdir())) == 1


def test_a_folder_is_not_there_until_it_is_whole(tmp_path):
    (tmp_path / "more/a.partial").mkdir(parents=True)
    (tmp_path / "more/a.partial/left").touch()  # by a run that was killed
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "more/a") as beside:
        (beside / "half").touch()
        raise KeyboardInterrupt
    assert not list((tmp_path / "more").iterdir())
    with whole_folder(tmp_path / "more/a") as beside:
        (beside / "all").touch()
    assert [p.name for p in (tmp_path / "more").rglob("*")] == ["a", "all"]
