"""Fixtures of the text encoder's tests."""

from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from autorefiner.refiner.wan.umt5 import Umt5File


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: config.json, model.safetensors, tokenizer.json."""
    from tiny_umt5 import write_umt5

    path = tmp_path_factory.mktemp("umt5")
    write_umt5(path)
    return path


@pytest.fixture(scope="session")
def state(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="session")
def spiece() -> bytes:
    from tiny_umt5 import spiece_model

    return spiece_model()


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The encoders whose weights were loaded, in order."""
    loaded = []
    load = Umt5File.load

    def counted(self, *args):
        loaded.append(self.file.path)
        return load(self, *args)

    monkeypatch.setattr(Umt5File, "load", counted)
    return loaded
