"""What a checkpoint may be made of; tests/hostile/test_attacks.py has what would be read for ever."""

import collections
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from dpdm.foreign_pickles import MAX_TUPLE, StrangePickleError, check_pickles


def a_state() -> dict[str, Any]:
    """All that a training script might put into a checkpoint and torch takes for weights alone."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.GroupNorm(1, 2))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    return {
        "model": model.state_dict(),
        "ema": {"decay": 0.9, "num_updates": 2**70, "shadow_params": [p.detach() for p in model.parameters()]},
        "optimizer": optimizer.state_dict(),
        "parameters": collections.OrderedDict(model.named_parameters()),
        "others": [torch.randn(3).half(), torch.randn(3, 2).t(), torch.Size([1, 2]), torch.half, None, (1, (2,))],
    }


@pytest.mark.parametrize("new", [True, False], ids=["zip", "old"])
def test_checkpoints_as_torch_writes_them_pass(new: bool, tmp_path: Path) -> None:
    torch.save(a_state(), tmp_path / "a.pth", _use_new_zipfile_serialization=new)
    check_pickles(tmp_path / "a.pth")
    torch.load(tmp_path / "a.pth", weights_only=True)


def test_the_largest_tuple_passes_and_a_larger_one_does_not(tmp_path: Path) -> None:
    torch.save([(0,) * (MAX_TUPLE - 1)], tmp_path / "a.pth")
    check_pickles(tmp_path / "a.pth")
    torch.save([((0,) * (MAX_TUPLE // 2), (1,) * (MAX_TUPLE // 2))], tmp_path / "a.pth")
    with pytest.raises(StrangePickleError, match="more than 1000 values"):
        check_pickles(tmp_path / "a.pth")


@pytest.mark.parametrize("content", [b"\x80\x02", b"\x80\x02u.", b"\x80\x02e.", b"\x80\x02h\x00.", b"R"])
def test_damaged_pickles_fail_as_such(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises((pickle.UnpicklingError, StrangePickleError)):
        check_pickles(tmp_path / "a.pth")


def test_other_protocols_are_named(tmp_path: Path) -> None:
    written = io.BytesIO()
    pickle.dump({"a": {1, 2}}, written, protocol=4)
    (tmp_path / "a.pth").write_bytes(written.getvalue())
    with pytest.raises(StrangePickleError, match="a pickle with FRAME"):
        check_pickles(tmp_path / "a.pth")
