"""``dpdm release --from RELEASE --half``: a release with its weights rounded to float16, at half the size."""

from pathlib import Path

from safetensors.torch import load_file

from dpdm.errors import InputError, RunError
from dpdm.model_cards import model_card, public_card
from dpdm.own_statement import ROUNDING
from dpdm.release import check_unused, load_config, write_release
from dpdm.released_files import redacted, to_half
from dpdm.verify import verify
from dpdm.workdir import Workdir


def halve(release: Path, workdir: Workdir) -> Path:
    """Writes ``release/`` into ``workdir``, as ``release`` is but for rounded weights; returns the folder.

    Guarantee: that of ``release``. Its weights alone are read, and what is computed from them gives away no more than
    they do (post-processing). The statement stays, says that weights were rounded, and has the new files' hashes.

    Raises:
        InputError: if the weights are rounded already, there is no release, or ``workdir`` holds a run or a release.
        RunError: if ``release`` does not agree with its own statement, or a weight is too large for float16.
    """
    check_unused(workdir)
    found = verify(release)
    if "rounding" in found.statement:
        raise InputError(f"Expected a release in float32 at {release}, got one that is rounded: use it as it is.")
    if found.problems:
        raise RunError(f"Expected {release} to agree with its own statement, got: {found.problems[0]}.")
    statement, config = found.statement | {"rounding": ROUNDING}, load_config(release)
    weights = to_half(load_file(release / "model.safetensors"))
    card = (public_card if found.is_public else model_card)(statement, config)
    write_release(workdir, weights, redacted(config), statement, card)
    return workdir.release
