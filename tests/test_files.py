"""Files are replaced whole or not at all."""

import pytest

from fastgen._files import replacing, write_text


def test_what_fails_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "a.json"
    write_text(path, "one")
    with pytest.raises(RuntimeError), replacing(path) as partial:
        partial.write_text("t")
        raise RuntimeError
    assert path.read_text() == "one"
    write_text(path, "two")
    assert path.read_text() == "two" and list(tmp_path.iterdir()) == [path]
