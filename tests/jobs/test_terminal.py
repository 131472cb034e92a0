from pathlib import Path

from jobs.terminal import completions, printable


def test_completions_are_what_lies_there(tmp_path: Path) -> None:
    (tmp_path / "wide.png").touch()
    (tmp_path / "wild").mkdir()
    assert completions(f"{tmp_path}/wi") == [f"{tmp_path}/wide.png", f"{tmp_path}/wild/"]
    assert completions(f"{tmp_path}/wild/") == []
    assert completions(f"{tmp_path}/none/x") == []


def test_control_characters_never_reach_the_terminal() -> None:
    assert printable("a\x1b[31mb\x07\x9bc\r\x00\x7f\td\né ✓") == "a[31mbc\td\né ✓"
