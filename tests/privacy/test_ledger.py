import os
from pathlib import Path

import pytest

from dpdm.errors import RunError
from dpdm.privacy.accounting import Mechanism, Repeats, Selection, parts
from dpdm.privacy.ledger import Ledger

STEP = Mechanism("DP-SGD", 0.25, 1.9, 1)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger.create(tmp_path / "ledger.jsonl", {"dataset_size": 100})


def test_purchases_are_on_disk_when_reserve_returns(ledger: Ledger) -> None:
    assert ledger.reserve(STEP, "a")
    again = Ledger(ledger.path)
    assert again.mechanisms() == [STEP]
    assert again.header == {"dataset_size": 100}
    assert again.was_charged("a")


def test_a_purchase_is_synced_before_reserve_returns(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[bytes] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(ledger.path.read_bytes()))
    ledger.reserve(STEP, "a")
    assert synced
    assert synced[-1] == ledger.path.read_bytes()  # the line was whole when it was synced


def test_only_an_identical_step_is_free(ledger: Ledger) -> None:
    assert ledger.reserve(STEP, "a")
    assert not Ledger(ledger.path).reserve(STEP, "a")
    assert ledger.reserve(STEP, "b")
    assert ledger.spent("DP-SGD") == 2
    assert ledger.spent("central images") == 0


def test_mechanisms_with_different_parameters_are_kept_apart(ledger: Ledger) -> None:
    ledger.reserve(STEP, "a")
    ledger.reserve(Mechanism("DP-SGD", 0.25, 1.5, 1), "b")
    ledger.reserve(Mechanism("central images", 1.0, 5.0, 1), "c")
    assert {(m.name, m.noise_multiplier, m.num_steps) for m in parts(Ledger(ledger.path).mechanisms())} == {
        ("DP-SGD", 1.9, 1),
        ("DP-SGD", 1.5, 1),
        ("central images", 5.0, 1),
    }


def test_a_selection_is_bought_as_a_whole_and_each_one_counts(ledger: Ledger) -> None:
    base = (Mechanism("central images", 1.0, 5.0, 1), Mechanism("DP-SGD", 0.25, 1.9, 40))
    selection = Selection("private selection", base, Repeats(3.0, "geometric"))
    assert ledger.reserve(selection, "a")
    assert not Ledger(ledger.path).reserve(selection, "a")
    assert Ledger(ledger.path).mechanisms() == [selection]
    assert Ledger(ledger.path).spent("DP-SGD") == 40
    ledger.reserve(selection, "b")
    ledger.reserve(STEP, "c")
    assert Ledger(ledger.path).mechanisms() == [selection, selection, STEP]


def test_a_reservation_that_was_being_written_is_dropped(ledger: Ledger) -> None:
    ledger.reserve(STEP, "a")
    whole = ledger.path.read_bytes()
    ledger.reserve(STEP, "b")
    full = ledger.path.read_bytes()
    for cut in range(len(whole), len(full)):
        ledger.path.write_bytes(full[:cut])
        assert Ledger(ledger.path).spent("DP-SGD") == 1
        assert ledger.path.read_bytes() == full[:cut]  # whoever only looks changes nothing
        if cut > len(whole):
            with pytest.raises(RunError, match="repair"):
                Ledger(ledger.path).reserve(STEP, "c")
        assert Ledger(ledger.path, repair=True).spent("DP-SGD") == 1
        assert ledger.path.read_bytes() == whole
    ledger.path.write_bytes(full)
    assert Ledger(ledger.path).spent("DP-SGD") == 2


def test_a_changed_removed_or_reordered_line_is_noticed(ledger: Ledger) -> None:
    for name in "abc":
        ledger.reserve(STEP, name)
    lines = ledger.path.read_bytes().splitlines(keepends=True)
    damaged = [
        lines[0] + lines[2] + lines[3],
        lines[0] + lines[2] + lines[1] + lines[3],
        lines[0] + lines[1].replace(b"1.9", b"9.9") + lines[2],
        lines[1] + lines[2],
        b"",
        b"not json\n",
    ]
    for content in damaged:
        ledger.path.write_bytes(content)
        with pytest.raises(RunError, match="ledger"):
            Ledger(ledger.path)


def test_a_missing_ledger_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="unknown"):
        Ledger(tmp_path / "ledger.jsonl")


def test_a_ledger_is_never_started_over(ledger: Ledger) -> None:
    with pytest.raises(FileExistsError):
        Ledger.create(ledger.path, {})


def test_no_bit_of_the_last_line_can_change_unnoticed(ledger: Ledger) -> None:
    """No later line holds its hash, and no checkpoint names it yet: it alone says what was bought last."""
    ledger.reserve(STEP, "a")
    ledger.reserve(STEP, "b")
    content = ledger.path.read_bytes()
    start = content.rindex(b"\n", 0, -1) + 1
    for bit in range(8 * start, 8 * (len(content) - 1), 5):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        ledger.path.write_bytes(damaged)
        with pytest.raises(RunError, match="ledger"):
            Ledger(ledger.path)


def test_a_ledger_appears_with_its_header_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    fsync = os.fsync

    def look(descriptor: int) -> None:
        seen.append((tmp_path / "ledger.jsonl").exists())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", look)
    Ledger.create(tmp_path / "ledger.jsonl", {"dataset_size": 100})
    assert seen == [False, True]  # its content, then its name


@pytest.mark.parametrize("room", [0, 100])
def test_a_full_disk_is_named_and_the_step_not_sold(ledger: Ledger, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    write = os.write

    def write_some(descriptor: int, content: bytes) -> int:
        if not room:
            raise OSError(28, "No space left on device")
        return write(descriptor, content[:room])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write_some)
        with pytest.raises(RunError, match=r"ledger\.jsonl: No space left"):
            ledger.reserve(STEP, "a")
    assert not ledger.was_charged("a")
    with pytest.raises(RunError, match="repair"):  # a line behind half a one would be lost
        ledger.reserve(STEP, "a")
    again = Ledger(ledger.path, repair=True)
    assert again.spent("DP-SGD") == 0
    assert again.reserve(STEP, "a")
