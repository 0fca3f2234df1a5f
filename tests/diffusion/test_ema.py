import pytest
import torch

from dpdm.diffusion.ema import ema_decay, update_ema
from dpdm.errors import InputError


def test_average_of_constant_weights_closes_in_geometrically() -> None:
    ema, weights = {"w": torch.tensor([0.0, 8.0])}, {"w": torch.tensor([4.0, 4.0])}
    average = ema["w"]
    for _ in range(20):
        update_ema(ema, weights, 0.9)
    torch.testing.assert_close(average, 4 + torch.tensor([-4.0, 4.0]) * 0.9**20)  # in place
    assert weights["w"].tolist() == [4.0, 4.0]


def test_average_is_the_weighted_sum_of_history() -> None:
    generator = torch.Generator().manual_seed(0)
    history = torch.randn(6, 3, generator=generator)
    ema = {"w": history[0].clone()}
    for n in range(1, 6):
        update_ema(ema, {"w": history[n].requires_grad_(n == 5)}, ema_decay(0.4, n))
    decays = torch.tensor([min(0.4, (1 + n) / (10 + n)) for n in range(1, 6)])
    weights = [decays.prod()] + [(1 - decays[n - 1]) * decays[n:].prod() for n in range(1, 6)]
    assert sum(w.item() for w in weights) == pytest.approx(1.0)
    torch.testing.assert_close(ema["w"], (torch.stack(weights)[:, None] * history.detach()).sum(dim=0))
    assert not ema["w"].requires_grad


def test_decay_rises_to_its_rate() -> None:
    assert ema_decay(0.999, 0) == 0.1
    assert ema_decay(0.999, 8) == 0.5
    assert ema_decay(0.999, 10**6) == 0.999


def test_bad_inputs_are_refused() -> None:
    with pytest.raises(InputError, match="ema_rate"):
        ema_decay(1.0, 3)
    with pytest.raises(InputError, match="num_updates"):
        ema_decay(0.9, -1)
    with pytest.raises(InputError, match="'b'"):
        update_ema({"a": torch.zeros(1)}, {"a": torch.zeros(1), "b": torch.zeros(1)}, 0.9)
