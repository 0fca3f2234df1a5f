"""``dpdm release --from RELEASE``: a finished release anew, with rounded weights, or with more said of its choices."""

from pathlib import Path

from safetensors.torch import load_file

from dpdm.errors import InputError, RunError
from dpdm.model_cards import model_card, public_card
from dpdm.own_statement import ROUNDING
from dpdm.plan import check_names
from dpdm.release import check_unused, load_config, with_selection, write_release
from dpdm.released_files import redacted, to_half
from dpdm.verify import verify
from dpdm.workdir import Workdir


def write_anew(release: Path, workdir: Workdir, *, half: bool = False, selection: str | None = None) -> Path:
    """Writes ``release/`` into ``workdir``, as ``release`` is but for what is asked for; returns the folder.

    Guarantee: that of ``release``. Its weights alone are read, and what is computed from them gives away no more than
    they do (post-processing). The statement stays, says if weights were rounded, and has the new files' hashes.
    ``selection``, a public text, is added to what it says of choices, as ``make_release`` does it; nothing that it
    said is taken away.

    Args:
        release: a release that agrees with its own statement.
        workdir: a folder without a run and without a release.
        half: whether to round the weights to float16.
        selection: what was chosen by looking at what, and is not said in ``release``.

    Raises:
        InputError: if the weights are rounded already and are to be rounded, there is no release, ``workdir`` holds a
            run or a release, or the words are none that a private model's statement can hold.
        RunError: if ``release`` does not agree with its own statement, or a weight is too large for float16.
    """
    check_unused(workdir)
    found = verify(release)
    if half and "rounding" in found.statement:
        raise InputError(f"Expected a release in float32 at {release}, got one that is rounded: use it as it is.")
    if found.problems:
        raise RunError(f"Expected {release} to agree with its own statement, got: {found.problems[0]}.")
    statement, config = found.statement, load_config(release)
    if selection is not None:
        config = with_selection(config, selection)
        check_names(config)
        statement = statement | {"hyperparameters": config.dp.selection}
    weights = load_file(release / "model.safetensors")
    if half:
        statement, weights = statement | {"rounding": ROUNDING}, to_half(weights)
    card = (public_card if found.is_public else model_card)(statement, config)
    write_release(workdir, weights, redacted(config), statement, card)
    return workdir.release
