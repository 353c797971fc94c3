"""Files below a folder."""

from modules.folders import files_below


def test_links_are_followed_and_every_folder_counts_once(tmp_path):
    there, folder = tmp_path / "there", tmp_path / "folder"
    for place in (there / "deep", folder / "b"):
        place.mkdir(parents=True)
        (place / "x.flac").touch()
    (folder / "a").symlink_to(there)
    (folder / "also").symlink_to(there)
    (folder / "b" / "up").symlink_to(folder)
    (folder / "a.flac").symlink_to(tmp_path / "gone")
    assert files_below(folder) == [folder / "a/deep/x.flac", folder / "b/x.flac"]
    assert files_below(tmp_path / "none") == []
