"""Keys, types, files and overrides: what is wrong is named in one line, what is right survives being written."""

import dataclasses
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpdm import config as configs
from dpdm.config import Config
from dpdm.data.archive import ArchiveWriter, ImageArchive
from dpdm.errors import InputError
from dpdm.plain_yaml import UNWRITABLE, check_plain, parse_yaml
from dpdm.plan import make_plan


def test_defaults_are_those_of_the_dataclasses() -> None:
    assert configs.load() == Config()


def test_later_files_win_over_earlier_and_overrides_over_files(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("train: {num_iterations: 1, n_splits: 2}\nmodel: {network: {width: 8}}\n")
    (tmp_path / "b.yaml").write_text("train: {num_iterations: 3}\n")
    config = configs.load([tmp_path / "a.yaml", str(tmp_path / "b.yaml")], ["model.network.width=16", "dp.epsilon=1"])
    assert (config.train.num_iterations, config.train.n_splits) == (3, 2)
    assert (config.model.network.width, config.dp.epsilon) == (16, 1.0)
    assert dataclasses.replace(config.model.network, width=32) == Config().model.network


def test_a_saved_config_is_read_back_the_same(tmp_path: Path) -> None:
    overrides = ["dp.delta=1e-7", "model.network.channel_multipliers=[1,3]", "sampler.s_max=.inf", "data.name='é: # x'"]
    config = configs.load([], overrides)
    configs.save(config, tmp_path / "config.yaml")
    again = configs.load([tmp_path / "config.yaml"])
    assert again == config
    assert configs.run_hash(again) == configs.run_hash(config)
    assert again.model.network.channel_multipliers == (1, 3)


@pytest.mark.parametrize("file", sorted(Path("configs").rglob("*.yaml")), ids=str)
def test_shipped_configs_load(file: Path) -> None:
    assert configs.load([file]) != Config()


@pytest.mark.parametrize("key", ["train.num_iterations=9", "dp.delta=1e-9", "model.ema_rate=0.5", "train.seed=3"])
def test_what_makes_another_run_changes_its_hash(key: str) -> None:
    assert configs.run_hash(configs.load([], [key])) != configs.run_hash(Config())


@pytest.mark.parametrize(
    "key",
    [
        "data.path=x",
        "train.physical_batch_size=3",
        "setup.num_threads=1",
        "setup.data_on_device=true",
        "setup.overlap_noise=false",
        "sampler.rho=3",
    ],
)
def test_what_makes_no_other_run_keeps_its_hash(key: str) -> None:
    assert configs.run_hash(configs.load([], [key])) == configs.run_hash(Config())


def test_a_key_that_a_later_version_adds_does_not_change_the_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a run could not go on after an upgrade; what is asked for by the new key changes it."""
    config = configs.load([], ["train.num_iterations=9"])
    before = configs.run_hash(config)

    def more(config: Any) -> dict[str, Any]:
        return {**asdict(config), "later": {"key": config.train.num_iterations == 10}}

    monkeypatch.setattr(configs, "asdict", more)
    assert configs.run_hash(config) == before
    assert configs.run_hash(configs.load([], ["train.num_iterations=10"])) != before


def test_a_model_that_never_learned_to_be_guided_is_not_guided() -> None:
    words = ["loss.label_dropout=0", "sampler.guidance_scale=2"]
    with pytest.raises(InputError, match=r"sampler\.guidance_scale=0 with loss\.label_dropout=0, got 2"):
        configs.check_guidance(configs.load([], words))
    for fitting in (words[:1], words[1:]):
        configs.check_guidance(configs.load([], fitting))


def test_settings_that_differ_are_those_of_which_a_choice_tells() -> None:
    recipe = ["optim.learning_rate=2e-3", "dp.selection=by a recipe"]
    free = ["train.checkpoint_every=7", "test.seed=1", "setup.num_threads=1", "data.name=x", "dp.selection=else"]
    same, other = ["optim.learning_rate=0.002"], ["optim={learning_rate: 3e-3}"]
    before = configs.values([], recipe)
    assert configs.changed_settings(before, configs.values([], [*recipe, *free, *same])) == []
    assert configs.changed_settings(before, configs.values([], [*recipe, *other])) == ["optim.learning_rate"]


def test_a_key_that_changes_a_chosen_setting_is_named(tmp_path: Path) -> None:
    """A statement would say else that all settings are a recipe's."""
    (tmp_path / "recipe.yaml").write_text("dp: {selection: by a recipe}\noptim: {learning_rate: 0.002}\n")
    file = tmp_path / "recipe.yaml"
    free = ["data.path=x", "data.name=Mine", "sampler.num_images=3", "train.log_every=5", "optim.learning_rate=2e-3"]
    assert configs.load_to_train([file], free).dp.selection == "by a recipe"
    found = configs.load_to_train([file], [*free, "optim.learning_rate=7e-3", "loss.noise_multiplicity=2"])
    assert found.dp.selection == (
        "by a recipe; the user changed loss.noise_multiplicity, optim.learning_rate, which is not accounted for"
    )
    assert found.optim.learning_rate == 7e-3
    (tmp_path / "mine.yaml").write_text("optim: {learning_rate: 0.007}\nloss: {noise_multiplicity: 2}\n")
    assert configs.load_to_train([file, tmp_path / "mine.yaml"], free[:-1]).dp.selection == found.dp.selection
    assert configs.load_to_train([tmp_path / "mine.yaml", file], ["loss.noise_multiplicity=2"]).dp.selection == (
        "by a recipe"
    )
    begun = configs.load_to_train([file], ["model.init=mnist_eps_1.0"]).dp.selection
    assert begun == "by a recipe; the user changed model.init, which is not accounted for"
    own = configs.load_to_train([file], ["optim.learning_rate=7e-3", "dp.selection=by eye"])
    assert own.dp.selection == "by eye"
    file.write_text("dp: {selection: by a recipe}\nsampler: {type: edm, stochastic: true}\n")  # which alone do not fit
    assert configs.load_to_train([file], ["sampler.type=ddim"]).dp.selection == "by a recipe"
    configs.save(found, tmp_path / "run.yaml")
    assert configs.load_to_train([tmp_path / "run.yaml"], ["train.log_every=9"]).dp.selection == found.dp.selection
    assert configs.load_to_train([], ["dp.epsilon=3"]).dp.selection == Config().dp.selection


@pytest.mark.parametrize(
    ("value", "read"),
    [
        ("no", "no"),
        ("on", "on"),
        ("007", "007"),
        ("1:30", "1:30"),
        ("0x10", "0x10"),
        ("2020-01-01", "2020-01-01"),
        ("/data/my #1", "/data/my #1"),
        ("'quoted # text'", "quoted # text"),
        ("12", "12"),
    ],
)
def test_a_text_is_what_was_written(value: str, read: str) -> None:
    assert configs.load([], [f"data.name={value}"]).data.name == read


def test_numbers_and_switches_are_read_as_they_look() -> None:
    config = configs.load([], ["train.num_iterations=0100", "dp.delta=1e-6", "data.public=true", "loss.p_mean=-1"])
    assert (config.train.num_iterations, config.dp.delta, config.data.public) == (100, 1e-6, True)
    assert config.loss.p_mean == -1
    with pytest.raises(InputError, match=r"train\.num_iterations.*'1:30'"):
        configs.load([], ["train.num_iterations=1:30"])


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("train.nmu_iterations=3", ["train.nmu_iterations", "did you mean train.num_iterations?"]),
        ("num_iterations=3", ["did you mean train.num_iterations?"]),
        ("learning_rate=3", ["did you mean", "learning_rate?"]),
        ("qwertz=3", ["qwertz", "the sections are data, model"]),
        ("train..x=1", ["section.key=value"]),
        ("=3", ["section.key=value"]),
        ("[=3", ["section.key=value"]),
        ("dp.epsilon", ["section.key=value"]),
        ("train=3", ["train", "section", "such as train.expected_batch_size"]),
        ("model.network=null", ["model.network", "section"]),
        ("train.num_iterations=abc", ["train.num_iterations", "'abc'", "Integer"]),
        ("train.num_iterations=1.5", ["train.num_iterations", "1.5"]),
        ("dp.delta=null", ["dp.delta", "None"]),
        ("train.num_iterations=[1", ["train.num_iterations", "'[1'"]),
        ("data.path=${foo}", ["data.path", "foo"]),
        ("data.class_names={}", ["fitting value", "the command line"]),
        ("data.name=[&a [1], *a]", ["data.name", "alias"]),
        ("train.seed=" + "9" * 4000, ["train.seed", "13288 bits"]),
        ("model.network.channel_multipliers=3", ["channel_multipliers", "3"]),
        ("optim.schedule=step", ["optim.schedule", "cosine", "linear"]),
        ("model.denoiser=xyz", ["model.denoiser", "xyz", "edm"]),
        ("train.num_iterations=0", ["train.num_iterations > 0", "got 0"]),
        ("train.num_epochs=nan", ["train.num_epochs", "nan"]),
        ("train.num_epochs=.inf", ["train.num_epochs", "inf"]),
        ("train.expected_batch_size=0", ["train.expected_batch_size"]),
        ("train.seed=99999999999999999999", ["train.seed"]),
        ("optim.learning_rate=nan", ["optim.learning_rate", "nan"]),
        ("optim.weight_decay=.inf", ["optim.weight_decay", "inf"]),
        ("dp.epsilon=0", ["dp.epsilon > 0", "got 0"]),
        ("dp.epsilon=-1", ["dp.epsilon > 0"]),
        ("dp.epsilon=nan", ["dp.epsilon", "nan"]),
        ("dp.noise_multiplier=.inf", ["dp.noise_multiplier", "inf"]),
        ("dp.delta=0", ["dp.delta"]),
        ("dp.clipping_norm=.inf", ["dp.clipping_norm"]),
        ("dp.clipping_norm=1e250", ["dp.clipping_norm", "1e+250"]),
        ("optim.learning_rate=1e300", ["optim.learning_rate", "1e+300"]),
        ("optim.weight_decay=1e300", ["optim.weight_decay", "1e+300"]),
        ("loss.sigma_data=1e300", ["loss.sigma_data", "1e+300"]),
        ("sampler.sigma_max=1e300", ["sampler.sigma_max", "1e+300"]),
        ("sampler.rho=1e9", ["sampler.rho=1000000000.0", "fall"]),
        ("sampler.rho=0.01", ["sampler.rho", "0.01"]),
        ("train.warmup.clipping_norm=1e300", ["train.warmup.clipping_norm", "1e+300"]),
        ("train.warmup.means_per_class=100000000", ["train.warmup.means_per_class", "100000000"]),
        ("train.warmup.blur=10000.0", ["train.warmup.blur", "10000"]),
        ("data.num_classes=-2", ["data.num_classes >= 0", "got -2"]),
        ("data.resolution=0", ["data.resolution >= 1"]),
        ("model.ema_rate=1", ["model.ema_rate"]),
        ("setup.num_threads=0", ["setup.num_threads"]),
        ("setup.data_on_device=maybe", ["setup.data_on_device", "auto, true or false", "'maybe'"]),
        ("setup.overlap_noise=3", ["setup.overlap_noise", "3"]),
    ],
)
def test_bad_overrides_are_named_in_one_line(override: str, names: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        configs.load([], [override])
    message = str(caught.value)
    assert "\n" not in message
    assert [name for name in names if name not in message] == []


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ("model:\n", ["model", "section"]),
        ("- 1\n", ["list"]),
        ("a: [", ["YAML"]),
        ("dp: 3", ["dp", "section", "3"]),
        ("dp: {epsilon: abc}", ["dp.epsilon", "abc"]),
        ("1: 2", ["known key", "got 1"]),
        ("train: {nsplits: 1}", ["did you mean train.n_splits?"]),
        ("dp: {epsilon: 1}\ndata: {}\ndp: {delta: 1e-6}", ["dp stands there twice"]),
        ("dp: {epsilon: 1, epsilon: 2}", ["epsilon stands there twice"]),
    ],
)
def test_bad_files_are_named(tmp_path: Path, content: str, names: list[str]) -> None:
    file = tmp_path / "some.yaml"
    file.write_text(content)
    with pytest.raises(InputError) as caught:
        configs.load([file])
    message = str(caught.value)
    assert "\n" not in message
    assert [name for name in [str(file), *names] if name not in message] == []


def test_a_missing_folder_or_binary_file_is_no_config(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for name in ("missing.yaml", "binary.yaml", ""):
        with pytest.raises(InputError, match=r"config file|YAML file"):
            configs.load([tmp_path / name])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.num_iterations=2"], "got neither"),
        (["dp.epsilon=1", "dp.noise_multiplier=1", "train.num_iterations=2"], "got both"),
        (["dp.epsilon=1"], r"train.num_epochs or train.num_iterations"),
        (["dp.epsilon=1000", "train.num_iterations=2"], "dp.epsilon <= 100"),
        (["dp.epsilon=1e-9", "train.num_iterations=2"], "no noise reaches"),
        (["dp.noise_multiplier=1e-9", "train.num_iterations=2"], "0.1 <= dp.noise_multiplier"),
        (
            [
                "dp.noise_multiplier=1",
                "train.num_iterations=2",
                "train.warmup.enabled=true",
                "train.warmup.noise_multiplier=0.001",
            ],
            "0.1 <= train.warmup.noise_multiplier",
        ),
        (["dp.noise_multiplier=1", "train.num_iterations=2", "dp.delta=0.001"], "delta < 1/N = 0.001 for 1000"),
        (["dp.noise_multiplier=1", "train.num_iterations=2", "train.expected_batch_size=1001"], "<= 1000"),
        (["dp.noise_multiplier=1", "train.num_epochs=1e-9"], "train.num_epochs to be enough for one step"),
        (
            ["dp.noise_multiplier=1", "train.num_iterations=2", "sampler.class_weights=[9, 1]"],
            "no sampler.class_weights in a private training, or equal ones",
        ),
    ],
)
def test_a_run_that_cannot_be_planned_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_plan(configs.load([], overrides), 1000)


def test_iterations_override_epochs_in_the_plan() -> None:
    keys = ["dp.noise_multiplier=2", "train.expected_batch_size=100", "train.num_epochs=3"]
    assert make_plan(configs.load([], keys), 1000).num_iterations == 30
    assert make_plan(configs.load([], [*keys, "train.num_iterations=7"]), 1000).num_iterations == 7


def test_names_of_classes_that_no_config_holds_are_refused(tmp_path: Path) -> None:
    """They would be bought for, and the config could not be read again."""
    with ArchiveWriter(tmp_path / "many.zip", [f"{number:030d}" for number in range(9000)]) as writer:
        writer.add(np.zeros((1, 8, 8), np.uint8), 0)
    with pytest.raises(InputError, match=r"at most 524288 bytes with the names of all classes in .*many\.zip, got 5"):
        configs.resolve(configs.load([]), ImageArchive(tmp_path / "many.zip"))
    few = configs.load([], ["data.num_classes=0"])
    configs.resolve(few, ImageArchive(tmp_path / "many.zip"))
    for quotes in ("'", '"'):  # of which YAML, or JSON, writes two for one
        wordy = dataclasses.replace(few, dp=dataclasses.replace(few.dp, selection=270_000 * quotes))
        with pytest.raises(InputError, match=r"shorten the folders' names or dp\.selection"):
            configs.resolve(wordy, ImageArchive(tmp_path / "many.zip"))


@given(st.text(max_size=20) | st.text("\t\n\r\x1b\x7f\x80\x85\xa0\u2028\u2029\ufeff\ufffe\\'\": -#a肺", max_size=20))
@settings(max_examples=300, deadline=None)
def test_a_text_comes_back_from_the_files_that_hold_it_or_is_refused(text: str) -> None:
    """A run's config is YAML and a release's is JSON that is read as YAML."""
    try:
        check_plain(text, "a file", "data.name")
    except InputError:
        assert "${" in text or set(text) & set(UNWRITABLE.findall(text))
        return
    config = dataclasses.replace(Config(), data=dataclasses.replace(Config().data, name=text))
    assert parse_yaml(configs.to_yaml(config))["data"]["name"] == text
    assert parse_yaml(json.dumps({"name": text}, indent=2, ensure_ascii=False))["name"] == text


def test_texts_of_all_scripts_are_no_problem() -> None:
    check_plain("Röntgen, 肺炎, عين, 👁, tab\t, line\n, \\alpha, <b>, A:肺炎", "a file", "data.name")
