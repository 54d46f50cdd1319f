from __future__ import annotations

import pytest

from bids_dgmseg.errors import InputError
from bids_dgmseg.io.files import read_json


def test_text_in_another_encoding_is_refused_with_its_place(tmp_path):
    (tmp_path / "a.json").write_bytes('{"Name": "Jürg"}'.encode("latin-1"))
    with pytest.raises(InputError, match=r"^a.json: not UTF-8 text \(byte 11\); save it as UTF-8$"):
        read_json(tmp_path / "a.json")


def test_what_is_no_file_is_refused_without_its_folders(tmp_path):
    with pytest.raises(InputError, match=rf"^{tmp_path.name}: cannot be read \(Is a directory\); check the file$"):
        read_json(tmp_path)


def test_a_file_that_was_not_fetched_is_no_missing_file(tmp_path):
    link = tmp_path / "sub-01_Chimap.json"
    link.symlink_to(tmp_path / ".git" / "annex" / "objects" / "MD5E-s12--0.json")
    with pytest.raises(InputError, match=r"^sub-01_Chimap.json: content not fetched \(broken symlink"):
        read_json(link)
    pointer = tmp_path / "sub-02_Chimap.json"
    pointer.write_text("/annex/objects/MD5E-s12--0.json\n")
    with pytest.raises(InputError, match=r"^sub-02_Chimap.json: content not fetched \(the file is only a pointer\)"):
        read_json(pointer)
