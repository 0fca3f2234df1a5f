"""No room on the disk: named in one line, and the run goes on to the same bits when there is room."""

import subprocess
from pathlib import Path

import pytest
from tests.faults.struck import Chain, Server, assert_same_end, copied, hidden, the_line

from dpdm.workdir import Workdir


def test_a_full_disk_is_named_and_the_run_goes_on_when_there_is_room(
    server: Server, images: Path, tmp_path: Path
) -> None:
    chain = Chain(server, tmp_path, str(images))
    for number in FULL:
        check_full(*chain.go_on(full=number), chain)
    status, said = chain.go_on()
    assert status == 0, said
    chain.check_ended_as_undisturbed()


@pytest.mark.parametrize("room", [0, 100])
def test_a_disk_that_is_full_in_the_middle_of_a_purchase(
    server: Server, stopped: Workdir, finished: Workdir, tmp_path: Path, room: int
) -> None:
    run = copied(stopped, tmp_path)
    largest = run.ledger.stat().st_size + room
    command = ["train", "--resume", "--workdir", run.root, "--", "train.checkpoint_every=100"]
    status, said = server(*command, largest=largest)
    assert status == 1
    assert f"{run.ledger}: {'No space left' if room else 'File too large'}" in the_line(said)
    assert run.ledger.stat().st_size == largest
    assert server(*command)[0] == 0
    assert_same_end(run, finished)


FULL = (2, 5, 9, 14, 20, 26, 33, 36)  # of the calls that need room


def check_full(status: int, said: str, chain: Chain) -> None:
    assert status == 1, said
    line = the_line(said)
    assert "No space left" in line, line
    assert [name for name in hidden(chain.run.root) if "train.zip" not in name] == []  # the archive's is to go on with


@pytest.mark.slow
def test_no_room_from_any_write_on(server: Server, images: Path, tmp_path: Path) -> None:
    chain, number, status = Chain(server, tmp_path, str(images)), 0, 1
    while status:
        number += 1
        status, said = chain.go_on(full=number)
        if status:
            check_full(status, said, chain)
    assert number > 20
    chain.check_ended_as_undisturbed()
    print(f"{number - 1} times no room")


@pytest.mark.slow
def test_a_small_disk(server: Server, images: Path, tmp_path: Path) -> None:
    """A real one, in memory, which grows each time that it was full."""
    disk, size = tmp_path / "disk", 8
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        chain, status, times = Chain(server, disk, str(images)), 1, 0
        chain._draws = tmp_path / "draws"
        while status:
            status, said = chain.go_on()
            if status:
                check_full(status, said, chain)
                times += 1
                size += 4
                subprocess.run(["mount", "-o", f"remount,size={size}k", str(disk)], check=True)
        assert times > 5
        print(f"{times} times full")
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        chain.check_ended_as_undisturbed()
    finally:
        subprocess.run(["umount", str(disk)], check=True)
