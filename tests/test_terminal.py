"""Text from files reaches the terminal without control sequences."""

import json
import re
import unicodedata
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from autorefiner.refiner.cli import main
from autorefiner.refiner.terminal import LONGEST, printable, say

HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\r\u202e\u2066\u2028\x00\x7fzz"
STEERS = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def test_ordinary_text_stays_as_it_is() -> None:
    for text in ("a red star, 3×2 µm – Ω", "冬の 狐 🦊", "日本\u3000語", "C:\\models\\x.pt", ""):
        assert printable(text) == text
    assert printable("a\tb") == "a b"


def test_every_character_that_steers_is_escaped() -> None:
    for code in (
        *range(0x3000),
        *range(0xD7F0, 0xE010),
        *range(0xFE00, 0x10100),
        0x1F98A,
        0xE0001,
        0x10FFFF,
    ):
        shown = printable(chr(code))
        assert not STEERS.search(shown)
        if unicodedata.category(chr(code))[0] in "LMNPS":
            assert shown == chr(code)
    assert printable("\x1b[2J\n\ud800") == "\\x1b[2J\\n\\ud800"


def test_a_line_that_is_too_long_is_cut() -> None:
    assert len(printable("a" * LONGEST)) == LONGEST
    assert printable("a" * 10 * LONGEST) == "a" * LONGEST + "…"


def test_a_line_stays_one_line(capsys: pytest.CaptureFixture) -> None:
    say("one\nautorefiner: error: two", "three")
    assert capsys.readouterr().out == "one\\nautorefiner: error: two\nthree\n"


def test_nothing_in_a_file_steers_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    tensors = {f"blocks.0.{HOSTILE}": torch.zeros(1)}
    save_file(
        tensors, tmp_path / "a.safetensors", metadata={HOSTILE: HOSTILE, "autorefiner": HOSTILE}
    )
    torch.save({f"{HOSTILE}generator": tensors, HOSTILE: 1}, tmp_path / "a.pt")
    torch.save({HOSTILE: HOSTILE}, tmp_path / "b.pt")
    lora = {f"blocks.0.{HOSTILE}.lora_A.weight": torch.zeros(4, 4)}
    save_file(lora, tmp_path / "l.safetensors")
    (tmp_path / "t.toml").write_text(f'out = "a"\n"{json.dumps(HOSTILE)[1:-1]}" = 1\n')
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": HOSTILE}})
    )
    for name in ("a.safetensors", "a.pt", "b.pt", "l.safetensors", "."):
        main(["inspect", str(tmp_path / name)])
    main(["train", str(tmp_path / "t.toml")])
    main(["inspect", str(tmp_path / HOSTILE.replace("\0", ""))])
    with pytest.raises(SystemExit):
        main([HOSTILE])
    written = "".join(capsys.readouterr())
    assert "zz" in written and not STEERS.search(written.replace("\n", ""))
