"""The pages: they say what they must, load and run nothing, and the shareable one holds nothing private."""

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpdm.errors import InputError
from dpdm.evaluation.guarantee import Guarantee
from dpdm.evaluation.report import (
    Measurement,
    PrivateReport,
    Section,
    SharedReport,
    write_private_report,
    write_shareable_report,
)

STATEMENT: dict[str, Any] = {
    "epsilon": 9.99873,
    "delta": 1e-5,
    "unit": "one image",
    "adjacency": "one image is added or removed",
    "accountant": "privacy loss distributions",
    "dataset_size": 1497,
    "clipping_norm": 1.0,
    "mechanisms": [{"name": "DP-SGD steps", "sampling_rate": 0.25, "noise_multiplier": 1.775, "num_steps": 200}],
    "assumptions": ["assumed thing"],
    "not_covered": ["uncovered thing"],
    "files": {"model.safetensors": "ab" * 32},
}
HOSTILE = '"><script>alert(1)</script>'


def images(seed: int, shape: tuple[int, ...] = (40, 1, 8, 8)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def private(**changes: Any) -> PrivateReport:
    labels = np.arange(40) % 4
    report = PrivateReport(
        title="made-up digits",
        source="/secret/folder",
        guarantee=Guarantee.from_statement(STATEMENT),
        real=images(0),
        synthetic=images(1),
        real_labels=labels,
        synthetic_labels=labels,
        class_names=("zero", "one", "two", "three"),
        loss=np.array([3.0, np.nan, 1.0]),
        clip_fraction=np.array([1.0, 0.5, 0.25]),
        spent_steps=np.arange(4),
        spent_epsilon=np.array([0.0, 4.0, 7.0, 9.99873]),
        sections=(
            Section("Classifier", (Measurement("trained on synthetic", "89.7 %", "logistic regression"),)),
            Section("Settings", (Measurement("steps", "200"),), outside_guarantee=False),
        ),
        config="data:\n  path: /secret/folder\n",
        environment={"host": "secret-host"},
        timing={"training": "123.45 s"},
    )
    return dataclasses.replace(report, **changes)


def shared(**changes: Any) -> SharedReport:
    report = SharedReport(STATEMENT, images(1), '{"resolution": 8}', {"dpdm": "0.1.0"})
    return dataclasses.replace(report, **changes)


def private_page(folder: Path, **changes: Any) -> str:
    write_private_report(folder / "report.html", private(**changes))
    return (folder / "report.html").read_text(encoding="utf-8")


def shareable_page(folder: Path, **changes: Any) -> str:
    write_shareable_report(folder / "shareable.html", shared(**changes))
    return (folder / "shareable.html").read_text(encoding="utf-8")


class Elements(HTMLParser):
    """Collects elements and checks that they are closed in order."""

    VOID = frozenset({"meta", "img", "br", "path", "circle", "polyline"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.all: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.all.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.all.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("write", [private_page, shareable_page])
def test_pages_load_and_run_nothing_and_describe_their_pictures(write: Any, tmp_path: Path) -> None:
    page = write(tmp_path)
    elements = Elements(page).all
    assert not {tag for tag, _ in elements} & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for tag, attributes in elements:
        assert not any(name.startswith("on") for name in attributes)
        if tag == "img":
            assert (attributes["src"] or "").startswith("data:image/png;base64,")
            assert attributes["alt"]
        if tag == "svg":
            assert attributes["aria-label"]
    assert "url(" not in page
    assert "@import" not in page
    assert "http" not in re.sub(r"http-equiv", "", page)
    assert "default-src 'none'" in page
    assert "prefers-color-scheme: dark" in page


@pytest.mark.parametrize("write", [private_page, shareable_page])
def test_the_guarantee_is_stated_in_words_and_symbols(write: Any, tmp_path: Path) -> None:
    page = " ".join(write(tmp_path).split())
    for words in (
        "ε = 9.999",
        "δ = 1e-5",
        "1 in 100,000",
        "one image",
        "1,497",
        "assumed thing",
        "uncovered thing",
    ):
        assert words in page
    assert "power ≤ e<sup>ε</sup> × false-alarm rate + δ" in page
    assert "99.996 %" in page  # the highest power at 1 % false alarms
    assert "Read with care" in page
    for word in ("anonymous", "anonymised", "safe "):
        assert word not in page.lower()


def test_a_strong_guarantee_carries_no_warning(tmp_path: Path) -> None:
    assert "Read with care" not in shareable_page(tmp_path, statement={**STATEMENT, "epsilon": 1.0})


def test_the_private_page_marks_what_is_private(tmp_path: Path) -> None:
    page = private_page(tmp_path)
    body = page[page.index("<body>") :]
    assert body.index("Private: do not share") < body.index("<h1>")
    assert body.index("private, do not share") < body.index("data:image/png")
    assert "Loss and clipping are computed on private data without noise" in body
    # One mark for the curves and one for the first section; the second section needs none.
    assert body.count('<span class="badge">outside the guarantee</span>') == 2
    assert "89.7 %" in body
    assert body.count("<svg") == 3


def test_the_shareable_page_has_no_place_for_anything_private(tmp_path: Path) -> None:
    allowed = {"statement", "synthetic", "config", "versions", "synthetic_labels", "class_names"}
    assert {f.name for f in dataclasses.fields(SharedReport)} == allowed
    page, full = shareable_page(tmp_path), private_page(tmp_path)
    strips = re.findall(r'src="(data:[^"]+)" alt="Real', full)
    assert len(strips) == 4
    for secret in (*strips, "/secret/folder", "secret-host", "123.45 s", "89.7 %", "<svg", "Training loss"):
        assert secret in full
        assert secret not in page


def test_the_shareable_page_shows_the_whole_statement(tmp_path: Path) -> None:
    page = shareable_page(tmp_path, statement={**STATEMENT, "threat_model": "all iterates"})
    shown = re.findall(r"<pre><code>(\{.*?\})</code></pre>", page, re.DOTALL)[0].replace("&#34;", '"')
    assert json.loads(shown)["threat_model"] == "all iterates"
    assert "dpdm verify" in page


def test_hostile_words_stay_words(tmp_path: Path) -> None:
    page = private_page(
        tmp_path,
        title=HOSTILE,
        source=HOSTILE,
        class_names=(HOSTILE,) * 4,
        config=HOSTILE,
        environment={HOSTILE: HOSTILE},
        timing={HOSTILE: HOSTILE},
        sections=(Section(HOSTILE, (Measurement(HOSTILE, HOSTILE, HOSTILE),), HOSTILE),),
    )
    texts = dict.fromkeys(("unit", "adjacency", "accountant"), HOSTILE)
    statement = {**STATEMENT, **texts, "assumptions": [HOSTILE], "not_covered": [HOSTILE]}
    other = shareable_page(
        tmp_path, statement=statement, config=HOSTILE, versions={HOSTILE: HOSTILE}, class_names=(HOSTILE,)
    )
    for text in (page, other):
        assert "<script" not in text
        assert "&lt;script&gt;" in text
        Elements(text)


def test_a_run_without_privacy_says_so(tmp_path: Path) -> None:
    page = private_page(tmp_path, guarantee=None, declared_public=True)
    assert "No guarantee" in page
    assert "ε =" not in page
    assert "declared public" in page
    assert "private" not in page.lower()
    assert "Private: do not share" in private_page(tmp_path, guarantee=None)  # beside images that are others'


@pytest.mark.parametrize("shape", [(200, 3, 64, 64), (130, 3, 32, 32), (20, 3, 128, 96)])
@pytest.mark.parametrize("num_classes", [0, 5, 150])
def test_pages_stay_small_even_for_noise(shape: tuple[int, ...], num_classes: int, tmp_path: Path) -> None:
    noise = images(0, shape)
    labels = np.arange(len(noise)) % num_classes if num_classes else None
    curve = np.random.default_rng(0).normal(size=100_000)
    page = private_page(
        tmp_path,
        real=noise,
        synthetic=noise[::-1],
        real_labels=labels,
        synthetic_labels=labels,
        class_names=(),
        loss=curve,
        clip_fraction=curve,
        spent_steps=np.arange(100_000),
        spent_epsilon=np.linspace(0, 9, 100_000),
    )
    assert len(page.encode()) < 500_000
    assert len(shareable_page(tmp_path, synthetic=noise, synthetic_labels=labels).encode()) < 500_000
    if num_classes == 150:
        assert f"{min(150, len(noise)) - 12} more classes are not shown" in page


def test_a_class_that_one_side_lacks_is_shown_as_lacking(tmp_path: Path) -> None:
    page = private_page(tmp_path, synthetic_labels=np.zeros(40, int))
    assert page.count("none drawn") == 3


def test_refuses_arrays_that_do_not_fit() -> None:
    with pytest.raises(InputError, match="beside its own data"):
        private(synthetic=images(1, (40, 1, 9, 9)))
    with pytest.raises(InputError, match="for neither"):
        private(real_labels=None)
    with pytest.raises(InputError, match="real labels"):
        private(real_labels=np.zeros(3, int))
    with pytest.raises(InputError, match="one epsilon per step"):
        private(spent_steps=np.arange(3))
    with pytest.raises(InputError, match="make the release again"):
        shared(statement={"epsilon": 1.0})
    with pytest.raises(InputError, match="uint8"):
        shared(synthetic=np.zeros((3, 1, 8, 8)))


def test_both_pages_say_that_a_selection_ran_everything_several_times(tmp_path: Path) -> None:
    selection = {"name": "private selection", "mean_runs": 3.0, "distribution": "poisson"}
    statement = {**STATEMENT, "mechanisms": [{**selection, "base": STATEMENT["mechanisms"]}]}
    words = "on average 3 (poisson)"
    assert words in shareable_page(tmp_path, statement=statement)
    assert words in private_page(tmp_path, guarantee=Guarantee.from_statement(statement))
    assert "on average" not in shareable_page(tmp_path)
