import pytest
import torch

from dpdm import device
from dpdm.errors import InputError


def test_on_a_cpu_the_same_circumstances_are_the_same_execution(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    before = device.execution(cpu)
    assert device.execution(cpu) == before
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    assert device.execution(cpu) != before
    torch.set_num_threads(threads)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert device.execution(cpu) != before
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    monkeypatch.setattr(device, "code_hash", lambda: "other code")
    assert device.execution(cpu) != before


def test_elsewhere_no_two_processes_are_the_same() -> None:
    other = torch.device("meta")  # any device that is no CPU
    assert device.execution(other) != device.execution(other)


def test_full_precision_turns_tf32_off() -> None:
    torch.backends.cudnn.allow_tf32 = True
    device.use_full_precision()
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32


def test_a_gpu_without_a_number_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert device.pick_device("cuda") == torch.device("cuda", 0)
    assert chosen == [torch.device("cuda", 0)]  # torch refuses one without a number there


@pytest.mark.parametrize("name", ["tpu", "cuda:99", ""])
def test_a_device_that_cannot_be_used_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"setup\.device"):
        device.pick_device(name)
