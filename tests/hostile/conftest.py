"""The files that are attacked with and attacked, made once."""

import shutil
from pathlib import Path

import pytest
import torch
from tests.hostile.given import make_given


@pytest.fixture(scope="session")
def given(tmp_path_factory: pytest.TempPathFactory, tiny_inception_file: Path) -> Path:
    torch.set_num_threads(1)
    folder = make_given(tmp_path_factory.mktemp("hostile") / "given")
    shutil.copy(tiny_inception_file, folder / "extractor.pt")
    return folder
