"""Phase 2 with a fitted projection of the control: fitted, saved, resumed, generated from, refused."""

import json
import shutil

import pytest
import torch

from c2r import InputError, cli
from c2r.generate import main
from c2r.models.control_projection import load_projection
from c2r.options import PHASE2
from c2r.training.batches import Draw
from c2r.training.step import kept_directions
from tests.helpers.commands import ENGINES, phase2, same, scalars, start, succeed, weights
from tests.helpers.forks import fork
from tests.helpers.tiny import FEATURE_DIM

FILE = "control_projection.safetensors"


@pytest.fixture(scope="module")
def run(tiny_models, small_datasets, tmp_path_factory):
    """Run phase 2 with a projection; given a folder's name and options, return the folder and the output."""
    folder = tmp_path_factory.mktemp("projection")

    def run(name, *options, fails=False, by=fork, **launch):
        options = ["--max_train_steps=4", "--control_projection=fit", "--num_samples=0", *options]
        command = phase2(tiny_models, small_datasets, tiny_models / "pipeline", folder / name, *options, **launch)
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
    for line in ("place in the frame", "unprojected", "<- chosen"):
        assert line in output
    config = json.loads((out / "final/config.json").read_text())
    assert config["control_directions"] == projection.num_directions
    saved = weights(out / "final")
    chosen = projection.directions[: projection.num_directions]
    assert torch.equal(saved["control_adapter.projection.directions"], chosen)  # not trained, not averaged
    assert torch.equal(saved["control_adapter.projection.mean"], projection.mean)
    certificate = json.loads((out / "final/c2r.json").read_text())["control_certificate"]
    assert certificate.keys() == {
        f"{figure}_{kind}" for figure in ("cg_or_real", "look", "place") for kind in ("projected", "unprojected")
    }
    assert certificate["place_projected"] == projection.projected["place"]
    assert all(torch.isfinite(torch.tensor(values)).all() for values in scalars(out).values())


def test_it_resumes_bit_for_bit_without_fitting_again(run, whole):
    out, _ = whole
    halves = out.with_name("halves")
    shutil.copytree(out / "checkpoint-2", halves / "checkpoint-2")
    options = ("--control_tail_drop=0.5", "--ema_decay=0.9", "--resume_from_checkpoint=latest")
    _, output = run("halves", *options)
    assert "checkpoint-2 at step 2" in output
    assert "place in the frame" not in output
    assert same(weights(halves / "final"), weights(out / "final"))


def test_fitted_again_it_has_the_same_bits_and_its_file_serves_another_run(run, whole):
    out, _ = whole
    again, _ = run("again", "--max_train_steps=2", "--control_directions=3")
    ours, theirs = (load_projection(folder / FILE, FEATURE_DIM) for folder in (out, again))
    assert torch.equal(ours.directions, theirs.directions)
    assert torch.equal(ours.mean, theirs.mean)
    from_file, output = run(
        "from-file", "--max_train_steps=2", f"--control_projection={out / FILE}", "--control_directions=3"
    )
    assert "place in the frame" not in output
    assert same(weights(again / "final"), weights(from_file / "final"))
    assert json.loads((from_file / "final/config.json").read_text())["control_directions"] == 3


@pytest.mark.slow
def test_fsdp2_shards_it(run, whole):
    options = ("--train_batch_size=1", "--control_tail_drop=0.5", "--ema_decay=0.9")
    out, _ = run("fsdp2", *options, by=start, launcher=ENGINES["fsdp2"])
    assert scalars(out)["train/loss"] == pytest.approx(scalars(whole[0])["train/loss"], rel=1e-4)
    ours, alone = weights(out / "final"), weights(whole[0] / "final")
    assert ours.keys() == alone.keys()
    for name in ("control_adapter.projection.directions", "control_adapter.projection.mean"):
        assert torch.equal(ours[name], alone[name])
    for name, tensor in ours.items():
        # AdamW makes full steps of gradients that are nothing but rounding.
        assert (tensor - alone[name]).abs().mean() < 1e-4, name


def test_it_generates(whole, small_datasets, tmp_path):
    control = small_datasets / "cg/c0.mp4"
    arguments = ["--prompt=a street", f"--control_video={control}", "--num_inference_steps=2"]
    main([f"--model={whole[0] / 'final'}", *arguments, f"--output={tmp_path / 'o.mp4'}"])
    assert (tmp_path / "o.mp4").stat().st_size > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--control_directions=1000"], "--control_directions 1000: the projection has"),
        (["--control_projection=none.safetensors"], "none.safetensors: no such file"),
        (["--resume_controlnet_from=x"], "leave one of them out"),
    ],
)
def test_bad_options_are_refused_in_one_line(run, options, message):
    error = run("refused", *options, fails=True)
    assert message in error.strip().splitlines()[-1]


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
