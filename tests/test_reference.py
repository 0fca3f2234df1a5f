"""The original's files and command lines mean here what they mean there, or are refused in one line."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dpdm import config as configs
from dpdm import reference
from dpdm.cli import run_command
from dpdm.config import KNOWN_KEYS, Config, SetupConfig
from dpdm.errors import InputError
from dpdm.evaluation.fid import EvaluationConfig

CONFIGS = Path(__file__).parents[1] / "configs"

# Whole files of the original's shape, made from the paper's facts, the keys and the faults that are known of it.
SETUP = """
setup: {runner: some_runner, n_gpus_per_node: 8, n_nodes: 1, node_rank: 0,
        master_address: '127.0.0.1', master_port: 6000, omp_n_threads: 3}
"""
SAMPLER = """
  type: ddim
  stochastic: False
  num_steps: 50
  tmin: .002
  tmax: 80.
  rho: 7.
"""
WATCHING = """
  seed: 0
  log_freq: 100
  snapshot_freq: 1000
  snapshot_threshold: 1
  save_freq: 100000
  save_threshold: 1
  fid_freq: 10000
  fid_samples: 5000
  fid_threshold: 1
"""
MNIST_TRAIN = f"""
{SETUP}
data: {{path: , name: mnist, num_channels: 1, resolution: 28, n_classes: 10, fid_stats: [stats/mnist_train.npz],
       one_hot: False, dataloader_params: {{num_workers: 1}}, dataset_params: {{}}}}
model:
  denoiser_name: v
  denoiser_network: song
  ema_rate: .999
  network: {{image_size: 28, attn_resolutions: [7]}}
loss: {{version: v, n_noise_samples: 32, n_classes: 10, label_unconditioning_prob: .1}}
optim: {{optimizer: Adam, params: {{lr: 3e-4, weight_decay: 0.}}}}
dp: {{max_grad_norm: 1., delta: 1e-5, epsilon: 10., max_physical_batch_size: 8192, n_splits: 4}}
train:
  batch_size: 4096
  n_epochs: 300{WATCHING}
sampler:
  guid_scale: 0.
  snapshot_batch_size: 64
  fid_batch_size: 64{SAMPLER}
"""
CIFAR_TRAIN = f"""
{SETUP}
data: {{path: data/processed/cifar10.zip, name: cifar10, num_channels: 3, resolution: 32, n_classes: 10,
       fid_stats: [stats/cifar10.npz], dataloader_params: {{num_workers: 1, pin_memory: True}}}}
model:
  denoiser_name: edm
  denoiser_network: song
  ema_rate: .999
  network: {{image_size: 32, num_in_channels: 3, num_out_channels: 3, nf: 32, ch_mult: [1, 2, 2], label_dim: 10,
            num_res_blocks: 2, dropout: 0., use_cfg: True, attn_resolutions: [16]}}
loss: {{version: edm, p_mean: -1.2, p_std: 1.2, n_noise_samples: 8, n_classes: 1000}}
optim: {{name: adam, params: {{lr: 3e-4, weight_decay: 0.}}}}
dp: {{max_grad_norm: 1., delta: 1e-5, epsilon: 10., max_physical_batch_size: 8192, n_splits: 4}}
train:
  batch_size: 2048
  n_epochs: 500{WATCHING}
sampler:
  guid_scale: 0.{SAMPLER}
"""
CELEBA_NETWORK = """
  network:
    ch_mult: [1, 1, 2, 2]
    image_size: 64
    num_in_channels: 3
    num_out_channels: 3
    label_dim: 0
    use_cfg: False
    attn_resolutions: [8, 16]
"""
CELEBA_TRAIN = f"""
{SETUP}
data: {{path: , name: celeba, num_channels: 3, resolution: 64, n_classes: null, fid_stats: [stats/celeba.npz]}}
model:
  denoiser_name: edm
  denoiser_network: song
  ema_rate: .999{CELEBA_NETWORK}
loss: {{version: edm, p_mean: -1.2, p_std: 1.2, n_noise_samples: 8}}
optim: {{optimizer: Adam, params: {{lr: 3e-4, weight_decay: 0.}}}}
dp: {{max_grad_norm: 1., delta: 1e-6, epsilon: 10., max_physical_batch_size: 8192, n_splits: 4}}
train:
  batch_size: 2048
  n_epochs: 300{WATCHING}
sampler:
  guid_scale: null
  labels: null{SAMPLER}
"""
CELEBA_SAMPLE = f"""
{SETUP}
data: {{num_channels: 3, resolution: 64, n_classes: null}}
model:
  denoiser_name: edm
  denoiser_network: song
  ema_rate: .999
  use_ema: True{CELEBA_NETWORK}
sampler:
  batch_size: 16
  guid_scale: null
  labels: null{SAMPLER}
test: {{n_samples: 16, seed: 0}}
"""


@pytest.fixture
def original(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    path = tmp_path / "original.yaml"
    path.write_text(request.param, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("original", "ours", "epsilon", "kind"),
    [
        (MNIST_TRAIN, "mnist_28/train_eps_0.2.yaml", 10.0, "v"),  # the known fault of both 0.2 files
        (CIFAR_TRAIN, "cifar10_32/train_eps_10.0.yaml", 10.0, "edm"),
        (CELEBA_TRAIN, "celeba_64/train_eps_10.0.yaml", 10.0, "edm"),
    ],
    indirect=["original"],
)
def test_a_training_file_of_the_original_is_ours(original: Path, ours: str, epsilon: float, kind: str) -> None:
    expected, loaded = configs.load([CONFIGS / ours]), configs.load([original])
    # What our files leave to the program.
    assert (loaded.setup.n_gpus_per_node, loaded.setup.num_threads) == (8, 3)
    train, evaluation = loaded.train, loaded.evaluation
    assert (train.physical_batch_size, train.n_splits) == (8192, 4)
    assert (train.log_every, train.snapshot_every, train.checkpoint_every) == (100, 1000, 100_000)
    assert (train.snapshot_threshold, train.checkpoint_threshold) == (1, 1)
    assert (evaluation.fid_every, evaluation.fid_samples, evaluation.fid_threshold) == (10_000, 5000, 1)
    assert [name.endswith(".npz") for name in evaluation.fid_stats] == [True]
    assert loaded.loss.type == kind
    # All else is the same.
    assert loaded.dp.epsilon == epsilon
    same = replace(
        loaded,
        data=replace(loaded.data, path=None),
        loss=replace(loaded.loss, type=None),
        dp=replace(loaded.dp, epsilon=expected.dp.epsilon, selection=expected.dp.selection),
        train=replace(
            expected.train, expected_batch_size=train.expected_batch_size, num_epochs=train.num_epochs, seed=train.seed
        ),
        evaluation=EvaluationConfig(),
        setup=SetupConfig(),
    )
    assert same == expected


@pytest.mark.parametrize("original", [CELEBA_SAMPLE], indirect=True)
def test_a_sampling_file_of_the_original_is_ours(original: Path) -> None:
    expected, loaded = configs.load([CONFIGS / "celeba_64/sample_eps_10.0.yaml"]), configs.load([original])
    assert loaded.sampler == replace(expected.sampler, batch_size=16)
    assert loaded.model == expected.model
    assert loaded.data == replace(expected.data, name=None)


@pytest.mark.parametrize("original", [CIFAR_TRAIN], indirect=True)
def test_what_means_nothing_is_named_once(original: Path, capfd: pytest.CaptureFixture[str]) -> None:
    configs.load([original, original], ["setup.runner=x", "train.n_splits=2"])
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    for key in (
        *("setup.runner", "setup.n_nodes", "setup.node_rank", "setup.master_address", "setup.master_port"),
        *("data.dataloader_params", "loss.n_classes"),
    ):
        assert lines[0].count(key) == 1
    assert "train" not in lines[0]
    configs.load([original], quiet=True)
    configs.load([CONFIGS / "cifar10_32/train_eps_10.0.yaml"])
    assert capfd.readouterr().err == ""


def value_of(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


@pytest.mark.parametrize(
    ("overrides", "key", "value"),
    [
        ("model.ckpt=some/model.pth", "model.ckpt", "some/model.pth"),
        ("model.use_ema=False", "model.use_ema", False),
        ("model.denoiser_name=vpsde", "model.denoiser", "vp"),
        ("model.denoiser_name=vesde", "model.denoiser", "ve"),
        ("model.denoiser_name=v", "model.denoiser", "v"),
        ("model.network.nf=64", "model.network.width", 64),
        ("model.network.ch_mult=[1,3]", "model.network.channel_multipliers", (1, 3)),
        ("model.network.attn_resolutions=[4]", "model.network.attention_resolutions", (4,)),
        ("model.network.image_size=8", "data.resolution", 8),
        ("model.network.num_in_channels=3", "data.num_channels", 3),
        ("model.network.num_out_channels=3", "data.num_channels", 3),
        ("model.network.label_dim=7", "data.num_classes", 7),
        ("model.network.label_dim=0 model.network.use_cfg=false", "data.num_classes", 0),
        ("data.n_classes=10 model.network.label_dim=0", "data.num_classes", 0),
        ("data.n_classes=7", "data.num_classes", 7),
        ("data.n_classes=null", "data.num_classes", None),
        ("data.fid_stats=a.npz", "evaluation.fid_stats", "a.npz"),
        ("loss.version=vesde", "loss.type", "ve"),
        ("loss.n_noise_samples=8", "loss.noise_multiplicity", 8),
        ("loss.label_unconditioning_prob=0.2", "loss.label_dropout", 0.2),
        ("loss.beta_max=20", "loss.beta_d", 19.9),
        ("loss.beta_min=1 loss.beta_max=20", "loss.beta_d", 19.0),
        ("model.beta_min=1 model.beta_max=20", "loss.beta_d", 19.0),
        ("model.beta_min=1", "loss.beta_min", 1.0),
        ("optim.params.lr=1e-3", "optim.learning_rate", 1e-3),
        ("optim.params.weight_decay=1e-2", "optim.weight_decay", 0.01),
        ("dp.max_grad_norm=0.5", "dp.clipping_norm", 0.5),
        ("dp.max_physical_batch_size=64", "train.physical_batch_size", 64),
        ("dp.n_splits=4", "train.n_splits", 4),
        ("dp.n_splits=-1", "train.n_splits", 1),
        ("data.dataset_params.xflip=false data.dataset_params.max_size=null", "loss.flip", False),
        ("train.n_splits=4", "train.n_splits", 4),
        ("train.n_splits=4 dp.n_splits=4", "train.n_splits", 4),
        ("train.batch_size=8", "train.expected_batch_size", 8),
        ("train.n_epochs=2", "train.num_epochs", 2.0),
        ("train.log_freq=9", "train.log_every", 9),
        ("train.log_threshold=9", "train.log_threshold", 9),
        ("train.snapshot_freq=9", "train.snapshot_every", 9),
        ("train.save_freq=9", "train.checkpoint_every", 9),
        ("train.save_threshold=9", "train.checkpoint_threshold", 9),
        ("train.checkpoint_freq=9", "train.checkpoint_every", 9),
        ("train.checkpoint_threshold=9", "train.checkpoint_threshold", 9),
        ("train.fid_freq=9", "evaluation.fid_every", 9),
        ("train.fid_threshold=9", "evaluation.fid_threshold", 9),
        ("train.fid_samples=9", "evaluation.fid_samples", 9),
        ("sampler.num_steps=20", "sampler.num_steps", 20),
        ("sampler.labels=3", "sampler.labels", 3),
        ("sampler.guid_scale=2", "sampler.guidance_scale", 2.0),
        ("sampler.guid_scale=null", "sampler.guidance_scale", 0.0),
        ("sampler.tmin=.01", "sampler.sigma_min", 0.01),
        ("sampler.tmax=10.", "sampler.sigma_max", 10.0),
        ("sampler.type=edm sampler.s_churn=100. sampler.s_min=0.05 sampler.s_max=50.", "sampler.s_churn", 100.0),
        ("test.n_samples=4", "sampler.num_images", 4),
        ("test.seed=4", "sampler.seed", 4),
        ("test.batch_size=4", "sampler.batch_size", 4),
        ("setup.n_gpus_per_node=2", "setup.n_gpus_per_node", 2),
        ("setup.omp_n_threads=2", "setup.num_threads", 2),
    ],
)
def test_a_key_of_the_original_sets_ours_in_files_and_on_the_command_line(
    overrides: str, key: str, value: Any, tmp_path: Path
) -> None:
    words = overrides.split()
    by_command = configs.load([], words)
    assert value_of(by_command, key) == value
    (tmp_path / "a.yaml").write_text(configs.OmegaConf.to_yaml(configs.OmegaConf.from_dotlist(words)))
    assert configs.load([tmp_path / "a.yaml"]) == by_command


def test_beta_max_is_counted_from_the_beta_min_of_an_earlier_file(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("loss: {beta_min: 2}")
    assert configs.load([tmp_path / "a.yaml"], ["loss.beta_max=20"]).loss.beta_d == 18.0


def test_the_command_line_wins_over_a_file_under_either_name(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("dp: {n_splits: 4}\nmodel: {network: {image_size: 32}}")
    config = configs.load([tmp_path / "a.yaml"], ["train.n_splits=2", "data.resolution=28"])
    assert (config.train.n_splits, config.data.resolution) == (2, 28)


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        ("train.n_splits=2 dp.n_splits=4", ["train.n_splits and dp.n_splits", "got 2 and 4", "give one"]),
        ("data.resolution=28 model.network.image_size=32", ["data.resolution and model.network.image_size", "28"]),
        (
            "model.network.num_in_channels=1 model.network.num_out_channels=3",
            ["model.network.num_in_channels and model.network.num_out_channels", "got 1 and 3"],
        ),
        ("data.n_classes=10 model.network.label_dim=1000", ["data.n_classes and model.network.label_dim"]),
        ("sampler.tmin=1 sampler.sigma_min=2", ["sampler.sigma_min and sampler.tmin"]),
        ("model.network.attn_resolutions=[7] model.network.attention_resolutions=[7,14]", ["[7, 14] and [7]"]),
        ("model.denoiser_network=ddpm", ["model.denoiser_network=song", "'ddpm'"]),
        ("optim.optimizer=SGD", ["optim.optimizer=Adam", "'SGD'"]),
        ("optim.name=adamw", ["optim.name=Adam", "'adamw'"]),
        ("model.network.use_cfg=false", ["model.network.use_cfg=true", "label_dim=0"]),
        ("model.network.use_cfg=false data.num_classes=3", ["model.network.use_cfg=true"]),
        ("model.network.use_cfg=true model.network.label_dim=0", ["model.network.use_cfg=false"]),
        ("model.network.use_cfg=3", ["true or false", "got 3"]),
        ("loss.beta_max=0.05", ["loss.beta_max > beta_min = 0.1", "0.05"]),
        ("model.beta_min=1 model.beta_max=0.5", ["model.beta_max > beta_min = 1", "0.5"]),
        ("data.dataset_params.max_size=1000", ["data.dataset_params.max_size", "1000", "N and epsilon"]),
        ("data.dataset_params.xflip=true", ["data.dataset_params.xflip", "loss.flip=true"]),
        ("loss.beta_max=many", ["loss.beta_max", "'many'"]),
        ("model.denoiser_name=subvpsde", ["model.denoiser", "subvpsde"]),
        ("model.denoiser_name=[v]", ["model.denoiser"]),
        ("optim.params.betas=1", ["optim.params.betas"]),
        ("train.n_epoch=1", ["train.n_epoch", "did you mean"]),
        ("test.samples=1", ["test.samples", "did you mean"]),
        ("optim.params=1", ["optim.params"]),
        ("sampler=3 sampler.tmin=1 train=3", ["train", "section"]),
        ("train.batch_size=many", ["train.expected_batch_size", "'many'"]),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(overrides: str, names: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        configs.load([], overrides.split())
    message = str(caught.value)
    assert "\n" not in message
    assert [name for name in names if name not in message] == []


def test_a_clash_names_the_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("train: {batch_size: 3, expected_batch_size: 4, n_epochs: 1}")
    assert run_command(["train", "--config", str(path), "--workdir", str(tmp_path / "w")]) == 2
    error = capfd.readouterr().err
    assert f"train.expected_batch_size and train.batch_size in {path} to agree, got 4 and 3" in error
    assert not (tmp_path / "w").exists()


def test_two_names_for_one_value_may_both_be_given(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("dp: {n_splits: 4}\ntrain: {n_splits: 4}\noptim: {learning_rate: 0.0003, params: {lr: 3e-4}}\n")
    config = configs.load([path])
    assert (config.train.n_splits, config.optim.learning_rate) == (4, 3e-4)


def test_the_table_leads_to_keys_that_exist_from_keys_that_do_not() -> None:
    assert set(reference.ALIASES.values()) <= set(KNOWN_KEYS)
    others = {*reference.ALIASES, *reference.MEANINGLESS, *reference.ONLY_CHOICE}
    assert not others & set(KNOWN_KEYS)


def test_translating_leaves_its_input_alone() -> None:
    content = {"dp": {"n_splits": 4}, "setup": {"runner": "x"}, 1: 2}
    before = repr(content)
    assert reference.translate(content, "here", beta_min=0.1) == ({"train": {"n_splits": 4}, 1: 2}, ["setup.runner"])  # type: ignore[arg-type]
    assert repr(content) == before
