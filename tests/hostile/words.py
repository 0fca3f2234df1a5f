"""Strategies: configs and command lines that nobody should write, and some that somebody might."""

import math
from typing import Any

import click
import yaml
from hypothesis import strategies as st
from tests.hostile.given import TINY

from dpdm import reference
from dpdm.cli import app
from dpdm.config import KNOWN_KEYS, SECTIONS

REFERENCES = (
    "${oc.env:HOME}",
    "${train.seed}",
    "${",
    "${oc.decode:1}",
    "${.seed}",
    "${data.path}${data.path}",
    "$${x}",
)
READ = (
    "@given/images",
    "@given/archive.zip",
    "@given/formats",
    "@given/idx",
    "@given/celeba",
    "@given/cifar.tar.gz",
    "@given/model.pth",
    "@given/stats.npz",
    "@given/config.yaml",
    "@given/released/release",
    "@given/released/synthetic.zip",
    "@given/run",
    "@given/run/private/ledger.jsonl",
    "@given/nothing",
    "@given/config.yaml/below",
    "@run/private/train.zip",
    "/dev/null",
    "/dev/zero",
    "/",
    "digits",
    "mnist",
    "~",
    ".",
    "",
    "-",
)
WRITTEN = (
    "@run",
    "@work/new",
    "@work/new/below",
    "@work/new.zip",
    "@work/new.npz",
    "@work/\t\x1b[31m\n.zip",
    "@work/\udcff.zip",
    "@work/é💥.npz",
    f"@work/{'x' * 300}.zip",
    "@given/config.yaml/below.zip",
    "@given/config.yaml",
    "/dev/null",
    "/proc/nothing/x.zip",
)
TEXTS = st.one_of(
    st.sampled_from(
        (*REFERENCES, *READ, "edm", "cpu", "cuda:99", "meta", "linear", "nan", ".inf", "1e5", "0x10", "null")
    ),
    st.sampled_from(
        ("x" * 100_000, "\x1b[2J", "a\nb", "é💥\u202e", "\udcff", "9" * 5000, "[" * 5000, "2024-01-01", "1:30")
    ),
    st.text(st.characters(exclude_characters="\0", exclude_categories=()), max_size=12),
)
NUMBERS = st.one_of(
    st.sampled_from((0, 1, 2, 3, 4, 6, 8, 16, 128, 1000, -1, 10**4, 10**6, 10**9, 2**31, 2**63 - 1, 2**63, 10**30)),
    st.sampled_from(
        (0.0, -0.0, 0.1, 0.5, 0.999, 1.0, 1e-5, 1e-300, 5e-324, 1e308, -1e308, math.nan, math.inf, -math.inf)
    ),
    st.integers(),
    st.floats(),
    st.just(10**400),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
VALUES = st.one_of(
    SCALARS,
    SCALARS,
    st.lists(SCALARS, max_size=4),
    st.sampled_from(([1] * 2000, [[[]]], {"a": {"b": None}}, [1, 2, 2], [8], [2**40], {"": 1})),
    st.recursive(
        SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=2), max_leaves=6
    ),
)
KEYS = st.one_of(
    st.sampled_from(KNOWN_KEYS),
    st.sampled_from(KNOWN_KEYS),
    st.sampled_from((*reference.ALIASES, *reference.MEANINGLESS, *reference.ONLY_CHOICE, "model.network.use_cfg")),
    st.sampled_from(
        (
            *SECTIONS,
            "model.network",
            "train.warmup",
            "trian.seed",
            "a.b.c.d",
            "a..b",
            ".",
            "",
            "__class__",
            "data.path.x",
        )
    ),
)
DOCUMENTS = (
    b"a: &a [x, x, x, x, x, x, x, x, x]\n"
    + b"".join(
        b"%c: &%c [*%c, *%c, *%c, *%c, *%c, *%c, *%c, *%c, *%c]\n" % (n, n, *[n - 1] * 9) for n in b"bcdefghijk"
    ),
    b"data: &a {name: *a}",
    b"data: &a [*a]",
    b"evaluation: {fid_stats: &a [*a]}",
    b"data: {<<: &x {path: 1}, name: 2}\ntrain: {<<: *x}",
    b"data: !!python/object/apply:os.system ['touch @given/marker']",
    b"data: !!python/name:os.system",
    b"data: {path: !!binary aGFsbG8=}",
    b"train: {seed: 2024-01-01}\n",
    b"train: {seed: 1:30:00, num_iterations: 0o7}",
    b"train: !!set {a, b}",
    b"? [a, b]\n: 1",
    b"? {a: b}\n: 1",
    b"1: 2\nnull: 3\ntrue: 4",
    b'data: {path: "a\\0b"}',
    b'data: {name: "\\ud800"}',
    b'data: {name: "\\e[2J\\x07"}',
    b"---\na: 1\n---\nb: 2",
    b"%YAML 9.9\n---\na",
    b"%TAG ! tag:x\n---\n!y {}",
    b"\xff\xfe\x00a",
    b"\xef\xbb\xbftrain: {seed: 1}",
    b"\x00" * 100,
    b"\ttrain: 1",
    b"train: {seed: 1, seed: 2}",
    b"[" * 100_000,
    b"{a: " * 20_000,
    b"- " * 20_000,
    b"&a " * 1000,
    b"train: {seed: " + b"9" * 100_000 + b"}",
    b"train: {num_epochs: 1e" + b"9" * 1000 + b"}",
    b"a" * 2_000_000,
    b"x: 1\n" * 300_000,
    b"",
    b"null",
    b"3",
    b"[1, 2]",
    b"text",
    b'{"data": {"name": "json"}}',
    b"data:\n  class_names: [" + b"'', " * 20_000 + b"]",
    b"train: {n_epochs: 1}\ndata: {path: ${oc.env:HOME}}",
    b"sampler: {num_images: ${train.seed}}",
    b"evaluation: {fid_stats: [${evaluation.fid_stats}]}",
)


@st.composite
def overrides(draw: st.DrawFn) -> list[str]:
    """Words such as follow ``--``: sometimes on top of a config that works."""
    base = [
        *TINY,
        draw(
            st.sampled_from(
                ("data.path=@given/archive.zip", "data.path=@given/images", "model.ckpt=@given/released/release")
            )
        ),
    ]
    words = [f"{draw(KEYS)}={draw(VALUES.map(_flow))}" for _ in range(draw(st.sampled_from((0, 1, 1, 2, 3))))]
    junk = (
        draw(st.lists(st.one_of(TEXTS, st.just("@given/config.yaml")), max_size=1))
        if draw(st.integers(0, 9)) == 0
        else []
    )
    return [word.replace("\0", "") for word in [*(base if draw(st.integers(0, 3)) else []), *words, *junk]]


@st.composite
def documents(draw: st.DrawFn) -> bytes:
    """Content of a config file."""
    if draw(st.integers(0, 3)) == 0:
        return draw(st.sampled_from(DOCUMENTS) | st.binary(max_size=40))
    content: dict[str, Any] = {}
    for key in draw(st.lists(KEYS, max_size=4)):
        *sections, last = key.split(".")
        node = content
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                break
        else:
            node[last] = draw(VALUES)
    return yaml.safe_dump(content, allow_unicode=True).encode(errors="surrogateescape")


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """A command with options of its own and values that fit, or do not fit."""
    commands = {name: command for name, command in app.commands.items() if not isinstance(command, click.Group)}
    groups = {name: command for name, command in app.commands.items() if isinstance(command, click.Group)}
    commands |= {
        f"{name} {inner}": command for name, group in groups.items() for inner, command in group.commands.items()
    }
    name = draw(st.sampled_from(sorted(commands)))
    words, last = name.split(), []
    for parameter in commands[name].params:
        if isinstance(parameter, click.Option):
            if parameter.name == "workdir":
                words += ["--workdir", draw(st.sampled_from(WRITTEN))]
            elif draw(st.integers(0, 9)) < (7 if parameter.required else 3):
                words += [draw(st.sampled_from(parameter.opts))] + (
                    [] if parameter.is_flag else [draw(_value(parameter))]
                )
        elif parameter.name in ("words", "overrides"):
            last = ["--", *draw(overrides())] if draw(st.integers(0, 4)) else []
        elif parameter.name == "dest":
            words.append(draw(st.sampled_from(WRITTEN)))
        else:
            words.append(draw(st.sampled_from(READ)))
    if draw(st.integers(0, 19)) == 0:
        words.insert(draw(st.integers(0, len(words))), draw(TEXTS))
    return [word.replace("\0", "") for word in [*words, *last]]


def _value(option: click.Option) -> st.SearchStrategy[str]:
    if isinstance(option.type, click.Choice):
        return st.one_of(st.sampled_from([*option.type.choices]), TEXTS)
    if option.name in ("compose", "config", "statistics", "samples", "real", "holdout", "images", "against", "source"):
        return st.sampled_from(READ)
    if option.name == "extractor":
        return st.sampled_from((*READ, "inception"))
    if option.name == "resolution":
        return st.sampled_from(("8", "4x4", "64x48", "0", "-1x1", "9" * 30, "4096", "x", "1x99999", "٣")) | TEXTS
    return st.one_of(NUMBERS.map(str), NUMBERS.map(str), TEXTS)


def _flow(value: Any) -> str:
    """Returns a value as it would be written behind an equals sign."""
    if isinstance(value, str):
        return value
    return (
        yaml.safe_dump(value, default_flow_style=True, width=10**9, allow_unicode=True)
        .removesuffix("\n")
        .removesuffix("\n...")
    )
