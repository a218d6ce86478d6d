"""Phase 2 with a fitted projection of the control: fitted, saved, resumed, generated from, refused."""

import json
import shutil
from contextlib import nullcontext

import pytest
import torch
from torch.nn import functional as F

from c2r import InputError, cli
from c2r.data.buckets import Bucket
from c2r.data.mixture import read_mixture
from c2r.evaluation.projection_fit import choose_number, fit_projection, numbers_to_try
from c2r.generate import main
from c2r.models.control_projection import ControlProjection, load_projection
from c2r.options import PHASE2
from c2r.training.batches import Draw
from c2r.training.step import kept_directions
from tests.helpers.commands import ENGINES, SIZE, phase2, same, scalars, succeed, weights
from tests.helpers.datasets import write_monitored_datasets
from tests.helpers.forks import fork, start_warm
from tests.helpers.settings import clip_settings
from tests.helpers.tiny import FEATURE_DIM

FILE = "control_projection.safetensors"


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    return write_monitored_datasets(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(tiny_models, datasets, tmp_path_factory):
    """Run phase 2 with a projection; given a folder's name and options, return the folder and the output."""
    folder = tmp_path_factory.mktemp("projection")

    def run(name, *options, fails=False, by=fork, projected=True, **launch):
        if projected:  # the looks of a random DINOv3 do not agree enough for a number to be chosen
            options = ["--control_projection=fit", "--control_directions=3", *options]
        options = ["--max_train_steps=4", "--num_samples=0", *options]
        command = phase2(tiny_models, datasets, tiny_models / "pipeline", folder / name, *options, **launch)
        command.append(f"--cache_dir={folder / 'cache'}")
        if fails:
            return fork(*command).stderr
        done = succeed(*command, by=by)
        return folder / name, done.stdout + done.stderr

    return run


@pytest.fixture(scope="module")
def whole(run):
    return run("whole", "--control_tail_drop=0.5", "--ema_decay=0.9")


def test_it_is_fitted_printed_and_saved_with_the_controlnet(whole):
    out, output = whole
    projection = load_projection(out / FILE, FEATURE_DIM)
    for line in ("place in the frame", "unprojected", "<- used", "fewer than 8: the figures are uncertain"):
        assert line in output
    config = json.loads((out / "final/config.json").read_text())
    assert config["control_directions"] == projection.num_directions
    saved = weights(out / "final")
    module = ControlProjection(FEATURE_DIM, projection.num_directions)
    module.fill(projection)
    assert torch.equal(saved["control_adapter.projection.directions"], module.directions)  # not trained, not averaged
    assert torch.equal(saved["control_adapter.projection.mean"], projection.mean)
    assert projection.num_directions in projection.projected
    assert config["control_certificate"] == projection.certificate
    assert json.loads((out / "final/c2r.json").read_text())["control_certificate"] == projection.certificate
    assert all(torch.isfinite(torch.tensor(values)).all() for values in scalars(out).values())


def test_it_resumes_bit_for_bit_without_fitting_again(run, whole):
    out, _ = whole
    halves = out.with_name("halves")
    shutil.copytree(out / "checkpoint-2", halves / "checkpoint-2")
    (halves / FILE).write_text("of another run")  # is not read
    options = ("--control_tail_drop=0.5", "--ema_decay=0.9", "--resume_from_checkpoint=latest")
    _, output = run("halves", *options)
    assert "checkpoint-2 at step 2" in output
    assert "place in the frame" not in output
    assert same(weights(halves / "final"), weights(out / "final"))
    contracts = [json.loads((folder / "final/c2r.json").read_text()) for folder in (halves, out)]
    assert contracts[0]["control_certificate"] == contracts[1]["control_certificate"]


def test_fitted_again_it_has_the_same_bits_and_its_file_serves_another_run(run, whole):
    out, _ = whole
    again, _ = run("again", "--max_train_steps=2")
    ours, theirs = (load_projection(folder / FILE, FEATURE_DIM) for folder in (out, again))
    assert torch.equal(ours.directions, theirs.directions)
    assert torch.equal(ours.mean, theirs.mean)
    from_file, output = run("from-file", "--max_train_steps=2", f"--control_projection={again / FILE}")
    assert "place in the frame" not in output
    assert same(weights(again / "final"), weights(from_file / "final"))
    for folder in (again, from_file):
        config = json.loads((folder / "final/config.json").read_text())
        assert config["control_directions"] == 3
        assert config["control_certificate"]["look_projected"] == theirs.projected[3]["look"].mean
    # In another folder, the file gone: the checkpoint has it.
    shutil.move(again / FILE, again / "moved")
    options = [f"--control_projection={again / FILE}", "--resume_from_checkpoint=latest"]
    _, output = run("from-file", "--max_train_steps=3", *options)
    assert "at step 2" in output


def test_a_controlnet_trained_without_one_goes_on_with_one(run, whole, second):
    out, output = run(
        "later",
        f"--control_projection={whole[0] / FILE}",
        f"--resume_controlnet_from={second[0] / 'final'}",
        *("--max_train_steps=2", "--learning_rate=1e-30"),
    )
    before, after = weights(second[0] / "final"), weights(out / "final")
    added = {f"control_adapter.projection.{name}" for name in ("mean", "directions")}
    assert after.keys() == before.keys() | added
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    for name in added:
        assert torch.equal(after[name], weights(whole[0] / "final")[name])
    assert f"the control starts from {second[0] / 'final'}\n" in output
    assert "the control is projected on 3 directions" in output
    # From there another one, which takes its place.
    other, output = run(
        "later-again", "--control_directions=2", f"--resume_controlnet_from={out / 'final'}", "--max_train_steps=1"
    )
    assert f"the control starts from {out / 'final'}, without its projection" in output
    assert "place in the frame" in output
    assert weights(other / "final")["control_adapter.projection.directions"].shape == (2, FEATURE_DIM)
    # Without the option the one of these weights stays, and its tail can be dropped.
    options = ["--control_tail_drop=0.5", "--max_train_steps=1"]
    kept, output = run("kept", *options, f"--resume_controlnet_from={out / 'final'}", projected=False)
    assert "the control is projected on 3 directions" in output
    for name in added:
        assert torch.equal(weights(kept / "final")[name], after[name])
    error = run("none", *options, f"--resume_controlnet_from={second[0] / 'final'}", projected=False, fails=True)
    assert "--control_tail_drop 0.5: the control has no projection; give --control_projection" in error


@pytest.mark.slow
def test_fsdp2_shards_it(run, whole):
    options = ("--train_batch_size=1", "--control_tail_drop=0.5", "--ema_decay=0.9")
    run("fsdp2", *options, "--max_train_steps=2", by=start_warm, launcher=ENGINES["fsdp2"])
    out, output = run(
        *("fsdp2", *options, "--resume_from_checkpoint=latest"), by=start_warm, launcher=ENGINES["fsdp2"]
    )
    assert "at step 2" in output
    assert scalars(out)["train/loss"] == pytest.approx(scalars(whole[0])["train/loss"], rel=1e-4)
    ours, alone = weights(out / "final"), weights(whole[0] / "final")
    assert ours.keys() == alone.keys()
    for name in ("control_adapter.projection.directions", "control_adapter.projection.mean"):
        assert torch.equal(ours[name], alone[name])
    for name, tensor in ours.items():
        # AdamW makes full steps of gradients that are nothing but rounding.
        assert (tensor - alone[name]).abs().mean() < 1e-4, name


def test_it_takes_cached_features_in_bf16_and_an_adversary(run, whole):
    options = ["--cache_control_features", "--adversarial_weight=0.1", "--mixed_precision=bf16"]
    options += ["--control_tail_drop=0.5", f"--control_projection={whole[0] / FILE}", "--max_train_steps=2"]
    out, _ = run("cached", *options)
    assert all(torch.isfinite(torch.tensor(values)).all() for values in scalars(out).values())
    name = "control_adapter.projection.directions"
    assert torch.equal(weights(out / "final")[name], weights(whole[0] / "final")[name])


@pytest.mark.slow
def test_a_fit_that_fails_ends_all_processes_in_one_line(tiny_models, small_datasets, tmp_path):
    options = ["--max_train_steps=2", "--control_projection=fit", "--train_batch_size=1"]
    command = phase2(
        *(tiny_models, small_datasets, tiny_models / "pipeline", tmp_path), *options, launcher=ENGINES["ddp"]
    )
    failed = start_warm(*command)
    assert failed.returncode != 0
    assert failed.stderr.count("cg files to train on") == 1


def test_it_generates(whole, datasets, tmp_path):
    control = datasets / "cg/train/c0.mp4"
    arguments = ["--prompt=a street", f"--control_video={control}", "--num_inference_steps=2"]
    main([f"--model={whole[0] / 'final'}", *arguments, f"--output={tmp_path / 'o.mp4'}"])
    assert (tmp_path / "o.mp4").stat().st_size > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--control_directions=1000"], "--control_directions 1000: features of width 32 have at most 27 directions"),
        (
            ["--control_projection=none.safetensors"],
            "--control_projection none.safetensors: no such file; give fit, or",
        ),
    ],
)
def test_bad_options_are_refused_in_one_line(run, options, message):
    error = run("refused", *options, fails=True)
    assert message in error.strip().splitlines()[-1]


# -------------------------------------------------------------------------------------------------------- choice


def test_the_number_is_the_last_before_the_first_that_fails():
    assert choose_number([0.9, 0.5, 0.49, 0.9]) == 2
    assert choose_number([0.9, 0.8]) == 2
    with pytest.raises(InputError, match=r"have little in common \(the best direction's correlation is 0.400"):
        choose_number([0.4, 0.9])


def test_numbers_that_are_tried():
    assert numbers_to_try(20, 4) == [1, 2, 4, 8, 16, 20]
    assert numbers_to_try(16, 3) == [1, 2, 3, 4, 8, 16]


class Quiet:
    """A watchdog of one process."""

    def __init__(self):
        self.beats = []

    def beat(self, what):
        self.beats.append(what)

    def unjudged(self):
        return nullcontext()

    def wait_for_everyone(self):
        pass


@pytest.fixture
def settings(tiny_models, tmp_path):
    bucket = Bucket(*(SIZE[name] for name in ("num_frames", "height", "width")))
    base_model = str(tiny_models / "pipeline")
    return clip_settings(
        buckets=(bucket,), fps=float(SIZE["fps"]), base_model=base_model, cache_dir=tmp_path / "cache"
    )


def read(folder, settings):
    return [read_mixture([str(folder / name)], name, settings) for name in ("real", "cg")]


def fit(mixtures, settings, features, watchdog=None, num_directions=None):
    return fit_projection(*mixtures, settings, features, 0, "sha", num_directions, watchdog or Quiet())


def patches(frames):
    """(F, 3, H, W) -> (F, places, 48): the pixels of patches of 4."""
    return F.unfold(frames, 4, stride=4).transpose(1, 2)


def test_the_fit_removes_a_planted_look(datasets, settings, caplog):
    """Every look has a mark of its own, whose mean is equal for all: in its spread alone."""
    generator = torch.Generator().manual_seed(0)

    def marked(frames):
        features = patches(frames)
        # Flat videos are bright.
        spread = 1 + 20 * (frames.mean() > 0.75)
        mark = spread * torch.randn(features[..., :1].shape, generator=generator)
        return torch.cat([features, mark], -1)

    watchdog = Quiet()
    projection = fit(read(datasets, settings), settings, marked, watchdog)
    assert len(watchdog.beats) > 20
    assert len(set(watchdog.beats)) == len(watchdog.beats)  # each clip is in one set: fit, choice or held out
    assert projection.directions[: projection.num_directions, -1].abs().max() < 0.05
    products = projection.directions @ projection.directions.T
    torch.testing.assert_close(products, torch.eye(len(products)), rtol=0, atol=1e-5)
    assert 0 < projection.shares.sum() < 1 + 1e-4
    assert projection.datasets == [str(datasets / name) for name in ("real", "cg")]
    assert "place in the frame" in caplog.text


def test_features_whose_looks_do_not_agree_are_refused_in_one_line(datasets, settings):
    generator = torch.Generator().manual_seed(0)
    noise = lambda frames: torch.randn(len(frames), 6, 8, generator=generator)  # noqa: E731
    with pytest.raises(InputError, match="have little in common"):
        fit(read(datasets, settings), settings, noise)
    assert fit(read(datasets, settings), settings, noise, num_directions=2).num_directions == 2


def test_features_that_do_not_vary_are_refused_in_one_line(datasets, settings):
    mixtures = read(datasets, settings)
    with pytest.raises(InputError, match=r"cannot be fitted on the features .* do not vary"):
        fit(mixtures, settings, lambda frames: torch.ones(len(frames), 6, 8))


def test_too_few_files_are_refused(datasets, settings):
    few, cg = read(datasets, settings)
    few.__dict__["train"] = few.train[:3]  # a cached property
    with pytest.raises(InputError, match="has 3 real files to train on"):
        fit((few, cg), settings, patches)


def test_a_clip_that_cannot_be_read_is_skipped_and_named(datasets, settings, tmp_path, caplog):
    shutil.copytree(datasets, tmp_path / "data")
    mixtures = read(tmp_path / "data", settings)
    assert len(mixtures[0].train) == 8
    (tmp_path / "data/real/train/r3.mp4").write_bytes(b"no video")
    fit(mixtures, settings, patches)
    assert "fitted without a clip" in caplog.text
    assert "r3.mp4" in caplog.text


def test_too_few_clips_that_can_be_read_are_refused(datasets, settings, tmp_path):
    shutil.copytree(datasets, tmp_path / "data")
    mixtures = read(tmp_path / "data", settings)
    assert len(mixtures[1].train) == 8
    for video in (tmp_path / "data/cg/train").glob("*.mp4"):
        video.write_bytes(b"no video")
    with pytest.raises(InputError, match="too few clips could be read"):
        fit(mixtures, settings, patches)


def test_looks_that_differ_on_held_out_files_are_warned_of(datasets, settings, caplog):
    """The features of training files agree; those of held-out ones are noise."""
    generator = torch.Generator().manual_seed(0)
    mixtures = read(datasets, settings)
    held_out = {clip.name for mixture in mixtures for clip in mixture.held_out}
    watchdog = Quiet()

    def features(frames):
        found = patches(frames)
        noise = any(name in watchdog.beats[-1] for name in held_out)
        return torch.randn(found.shape, generator=generator) if noise else found

    fit(mixtures, settings, features, watchdog, num_directions=2)
    assert "on held-out files the looks of a place correlate only by 0." in caplog.text
    assert "the look may leak" in caplog.text


# ------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--control_projection=fit"], "--control_projection fit: needs CG pairs"),
        (["--control_tail_drop=0.5"], "--control_tail_drop 0.5: needs --control_projection"),
        (["--control_directions=4"], "--control_directions 4: needs --control_projection"),
    ],
)
def test_options_that_need_another_are_refused(options, message):
    required = ["--resume_backbone_from=b", "--real_dataset=r", "--output_dir=o", "--cg_ratio=0"]
    with pytest.raises(InputError, match=message):
        cli.parse(PHASE2, [*required, *options])


def test_the_tail_is_dropped_by_the_samples_numbers():
    draw = Draw(list(range(200)), 0, 200)
    kept = kept_directions(16, 0.5, 7, draw)
    assert kept_directions(16, 0.0, 7, draw) is None
    assert torch.equal(kept, kept_directions(16, 0.5, 7, draw))
    assert torch.equal(kept[100:], kept_directions(16, 0.5, 7, Draw(list(range(100, 200)), 0, 200)))
    assert kept.min() >= 1
    assert kept.max() == 16
    assert 70 < (kept < 16).sum() < 120
