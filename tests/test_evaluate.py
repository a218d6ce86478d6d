"""python -m c2r.evaluate: the whole command, the run's own numbers, resumption, and one line for bad input."""

import csv
import json
import shutil

import numpy as np
import pytest
from accelerate import Accelerator
from PIL import Image
from transformers import CLIPModel

from benchmarks.evaluate_toy import markdown
from c2r import InputError, cli
from c2r.data.video_writer import write_video
from c2r.encoding.cache import encoder_fingerprint
from c2r.evaluate import main, plan_videos, read_run_datasets
from c2r.models.contract import read_contract, save_phase
from c2r.models.controlnet import C2RControlNet
from c2r.options import EVALUATE
from c2r.pipeline import C2RPipeline
from c2r.scoring.losses_file import losses_file
from c2r.scoring.models import agree_on_guidance, find_model_to_evaluate
from c2r.scoring.scenes import ClipFormat, common_format, read_scenes
from c2r.scoring.videos import followed_scenes
from tests.helpers.browser import needs_chromium, started_browser
from tests.helpers.commands import SIZE, succeed
from tests.helpers.datasets import flat_video, noise_video, write_dataset
from tests.helpers.forks import fork
from tests.helpers.metric_networks import save_clip
from tests.helpers.trained import save_trained_models

#: Measures that need no network and no package of an extra.
NO_NETWORK = ["edge_f1", "edge_f1_control", "warp_error"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Tiny trained models: phase1/best and phase2/best."""
    return save_trained_models(tmp_path_factory.mktemp("models"))


def write_scenes(folder, count=2):
    """Write scenes with a truth, a coarse control and a prompt each."""
    names = [f"f{i}.mp4" for i in range(count)]
    return write_dataset(folder, names, ["the street", "rain"] * count, [f"c{i}.mp4" for i in range(count)])


@pytest.fixture
def scenes(tmp_path):
    return write_scenes(tmp_path / "scenes")


def command(out, dataset, **changed):
    """Arguments of the command; None leaves an option out, a list gives several values."""
    given = {"dataset": dataset, "output_dir": out, "metrics": ["warp_error"], "num_inference_steps": 1} | changed
    words = []
    for name, value in given.items():
        values = value if isinstance(value, list) else [value]
        words += [] if value is None else [f"--{name}", *map(str, values)]
    return words


def results(out):
    return json.loads((out / "results.json").read_text())


def files(out):
    """Return {name: time of change} of the generated videos."""
    return {f"{path.parent.name}/{path.name}": path.stat().st_mtime_ns for path in (out / "videos").rglob("*.mp4")}


@pytest.fixture(scope="module")
def evaluated(first, second, small_datasets, tmp_path_factory):
    """Evaluate the finished runs of both phases; return the folder and the finished process."""
    out = tmp_path_factory.mktemp("evaluation")
    words = command(
        out,
        small_datasets / "cg",
        model=[second[0] / "final", first[0] / "final"],
        control=["own", "shuffled", "none"],
        metrics=NO_NETWORK,
        num_seeds=2,
        real_dataset=small_datasets / "real",
        cg_dataset=small_datasets / "cg",
        num_validation_clips=2,
        # Of videos alone: the validation is that of the training.
        flow_shift=1.5,
        conditioning_scale=0.5,
        networks=["clip=openai/clip-vit-base-patch32"],
    )
    return out, succeed("-m", "c2r.evaluate", *words, by=fork)


def test_the_command_writes_numbers_clips_picture_page_and_videos(evaluated):
    out, done = evaluated
    found = results(out)
    assert found["settings"]["networks"] == ["clip=openai/clip-vit-base-patch32"]
    assert found["settings"]["guidance"] == "apg"  # of the sample videos of phase 2, which no option names
    own, shuffled, none = (f"phase2/final, {kind} control" for kind in ("own", "another scene's", "no"))
    sources = [own, shuffled, none, "phase1/final, no control"]
    for name in ("edge_f1", "warp_error"):
        assert [*found["measures"][name]["sources"]] == sources
    # The backbone alone is phase 1: the same seeds give the same videos.
    values = found["measures"]["warp_error"]["sources"]
    assert values[none] == values["phase1/final, no control"]
    assert len(found["differences"]) == 2 * 3
    rows = [*csv.DictReader((out / "clips.csv").read_text().splitlines())]
    assert len(rows) == 4 * 3 * 2
    assert {row["seed"] for row in rows} == {"0", "1"}
    mean = np.mean([float(row["warp_error"]) for row in rows if row["source"] == own])
    assert found["measures"]["warp_error"]["sources"][own]["mean"] == pytest.approx(mean, rel=1e-4)
    with Image.open(out / "plot.png") as picture:
        assert picture.size[0] == 1200
    page = (out / "report.html").read_text()
    assert page.count("<video") == 3
    assert 'src="http' not in page
    assert len([*(out / "videos").rglob("*.mp4")]) == 4 * 3 * 2
    assert "3 clips are too few for intervals" in done.stdout
    assert "no difference can be beyond chance: with 6 of them it takes 8 clips, and there are 3" in done.stdout


@needs_chromium
def test_the_page_fits_wide_and_narrow_screens(evaluated):
    out, _ = evaluated
    with started_browser() as browser:
        for width in (1280, 390):
            page, faults = browser.new_page(viewport={"width": width, "height": 900}), []
            page.on("pageerror", lambda error, faults=faults: faults.append(str(error)))
            page.on("request", lambda request, faults=faults: faults.append(request.url))
            page.goto(f"file://{out / 'report.html'}")
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert [fault for fault in faults if not fault.startswith(("file:", "data:"))] == []
            assert page.locator("video").count() == 3


def test_measures_against_the_control_are_left_out_without_the_cg_look(evaluated):
    out, done = evaluated
    assert "edge_f1_control" not in results(out)["measures"]
    assert "edge_f1_control: left out, as measures against a coarse control also rise with the CG look" in done.stdout
    assert "CG look: it needs clips of at least" in done.stdout


@pytest.mark.parametrize("phase", ["first", "second"])
def test_a_model_has_the_validation_numbers_of_its_run(evaluated, phase, request):
    out, _ = request.getfixturevalue(phase)
    number = {"first": 1, "second": 2}[phase]
    numbers = results(evaluated[0])["validation"][f"phase{number}/final"]["numbers"]
    logged = read_contract(out / "final").metrics
    compared = [name for name in numbers if name in logged]
    assert {"loss", "prompt_gain"} <= {*compared}
    assert phase == "first" or {"control_gain", "leak_augmented", "loss_cg"} <= {*compared}
    for name in compared:
        assert numbers[name] == pytest.approx(logged[name], rel=1e-4, abs=1e-5), name


def test_a_model_that_is_not_validated_as_in_its_training_is_named(models, small_datasets, tmp_path):
    both = [models / "phase2/best", models / "phase1/best"]
    words = {"num_validation_clips": 1, "max_clips": 1, "cg_dataset": small_datasets / "cg"}
    main(command(tmp_path / "out", small_datasets / "cg", model=both, **words))
    found = results(tmp_path / "out")
    remarks = found["remarks"]
    assert "validation of phase2/best: on cg clips alone, as there is no --real_dataset: not the numbers of the " in (
        " ".join(remarks)
    )
    assert any(line.startswith("validation of phase1/best: left out, since phase 1") for line in remarks)
    assert [*found["validation"]] == ["phase2/best"]
    main(command(tmp_path / "out", small_datasets / "cg", model=both[0], **words, fps=4))
    found = results(tmp_path / "out")
    line = next(line for line in found["remarks"] if line.startswith("validation of phase2/best: left out"))
    assert line.endswith("5 frames of 32x48 at 4 fps, but it was trained on 5 frames of 32x48 at 8 fps")
    assert found["validation"] == {}


def validation_key(models, out, **options):
    """Return the key of the validation of phase 2's model."""
    args = cli.parse(EVALUATE, command(out, options["cg_dataset"], model=models / "phase2/best", **options))
    model = find_model_to_evaluate(args, args.model[0], "best", "cpu")
    return losses_file(model, read_run_datasets(args, [model], model.form, Accelerator(cpu=True))).key


def test_a_finished_validation_is_kept_until_what_it_depends_on_has_changed(models, tmp_path, capsys, monkeypatch):
    cg, out, copy = write_scenes(tmp_path / "cg", 3), tmp_path / "out", shutil.copytree(models, tmp_path / "models")
    options = {"cg_dataset": cg, "num_validation_clips": 1, "max_clips": 1}
    main(command(out, cg, model=copy / "phase2/best", **options))
    before = results(out)["validation"]
    assert "its validation is there" not in capsys.readouterr().out
    monkeypatch.setattr(C2RPipeline, "from_pretrained", None)  # a second command loads no model
    main(command(out, cg, model=copy / "phase2/best", **options, metrics="edge_f1"))
    assert "best: its validation is there" in capsys.readouterr().out
    assert results(out)["validation"] == before

    keys = [validation_key(copy, out, **options)]
    assert keys == [validation_key(copy, out, **options, conditioning_scale=0.5, flow_shift=3.5)]  # of videos alone
    keys += [validation_key(copy, out, **options | changed) for changed in ({"dtype": "bf16"}, {"real_dataset": cg})]
    keys.append(
        validation_key(copy, out, **options | {"real_dataset": cg, "cg_dataset": write_scenes(tmp_path / "b")})
    )
    metadata = cg / "metadata.csv"
    metadata.write_text(metadata.read_text().replace("rain", "red brick"))
    keys.append(validation_key(copy, out, **options))
    for changed, name, value in (
        ("dinov3/config.json", "layer_norm_eps", 1e-3),
        ("phase2/best/c2r.json", "conditioning_scale", 0.7),
    ):
        path = copy / changed
        path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
        encoder_fingerprint.cache_clear()  # a command of its own has not read it before
        keys.append(validation_key(copy, out, **options))
    assert len({*keys}) == 7


def test_videos_are_made_again_only_if_what_they_depend_on_has_changed(models, scenes, tmp_path, capsys):
    out = tmp_path / "out"

    def changed(**options):
        before = files(out)
        main(command(out, scenes, model=models / "phase2/best", **options))
        return {name for name, time in files(out).items() if before.get(name) != time}

    assert changed() == {"own/f0-seed0.mp4", "own/f1-seed0.mp4"}
    assert changed() == set()
    assert "2 of 2 videos are there" in capsys.readouterr().out
    metadata = scenes / "metadata.csv"
    metadata.write_text(metadata.read_text().replace("rain", "a red brick street"))
    assert changed() == {"own/f1-seed0.mp4"}
    assert "or settings, or incomplete: 1" in capsys.readouterr().out
    write_video(scenes / "c0.mp4", noise_video(7), SIZE["fps"])
    assert changed() == {"own/f0-seed0.mp4"}
    (path,) = (out / "videos").rglob("f1-seed0.mp4")
    path.write_bytes(path.read_bytes()[:-100])  # as a copy that was interrupted
    assert changed() == {"own/f1-seed0.mp4"}
    (note,) = (out / "videos").rglob(".f0-seed0.json")
    note.write_text("{")
    assert changed() == {"own/f0-seed0.mp4"}


def test_other_models_controls_and_seeds_make_no_video_again(models, scenes, tmp_path):
    """They change the names of the sources in the tables."""
    out, model = tmp_path / "out", models / "phase2/best"
    main(command(out, scenes, model=model))
    before = files(out)
    main(command(out, scenes, model=[model, models / "phase1/best"], control=["own", "shuffled"], num_seeds=2))
    after = files(out)
    assert {name: after[name] for name in before} == before
    assert len([*(out / "videos").rglob("*.mp4")]) == 3 * 2 * 2
    main(command(out, scenes, model=model, seed=1))
    assert files(out) == after


def keys(models, scenes, out, **options):
    """Return the keys of the videos that a command would make."""
    args = cli.parse(EVALUATE, command(out, scenes, model=models / "phase2/best", **options))
    model = find_model_to_evaluate(args, args.model[0], "best", "cpu")
    read = read_scenes(args.dataset, out, None, None)
    tasks = plan_videos(model, read, model.form, out)
    return [task.key for of_control in tasks.values() for task in of_control]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", 1),
        ("control", "shuffled"),
        ("negative_prompt", "rain"),
        ("dtype", "bf16"),
        ("height", 48),
        ("num_frames", 9),
        ("fps", 4),
        ("window_frames", 9),
        ("num_inference_steps", 2),
        ("guidance", "cfg"),
        ("guidance_scale", 2.0),
        ("control_guidance_scale", 2.0),
        ("control_guidance_start", 0.5),
        ("control_guidance_end", 0.5),
        ("conditioning_scale", 0.5),
        ("flow_shift", 5.0),
        ("vae_tiling", []),
    ],
)
def test_each_option_that_decides_a_video_is_in_its_key(models, scenes, tmp_path, name, value):
    before, after = keys(models, scenes, tmp_path), keys(models, scenes, tmp_path, **{name: value})
    assert before == keys(models, scenes, tmp_path)
    assert len({*before, *after}) == 4


def test_the_cg_look_of_a_video_leaves_out_the_clip_whose_layout_it_has(models, scenes, tmp_path):
    words = command(tmp_path, scenes, model=models / "phase2/best", control=["own", "shuffled", "none"])
    args = cli.parse(EVALUATE, words)
    model = find_model_to_evaluate(args, args.model[0], "best", "cpu")
    tasks = plan_videos(model, read_scenes(args.dataset, tmp_path, None, None), model.form, tmp_path)
    followed = followed_scenes(tasks)
    assert {name: scene.name for name, scene in followed["shuffled"].items()} == {"f0": "f1", "f1": "f0"}
    for control in ("own", "none"):
        assert {name: scene.name for name, scene in followed[control].items()} == {"f0": "f0", "f1": "f1"}


def test_the_scheduler_and_another_backbone_are_in_the_key(models, scenes, tmp_path):
    copy = shutil.copytree(models, tmp_path / "models")
    moved = {"pretrained_model_name_or_path": models / "base", "dinov3": models / "dinov3"}
    before = keys(copy, scenes, tmp_path)
    shutil.move(copy / "phase1/best", tmp_path / "moved")
    assert keys(copy, scenes, tmp_path, backbone=tmp_path / "moved", **moved) == before
    weights = tmp_path / "moved/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    assert not {*keys(copy, scenes, tmp_path, backbone=tmp_path / "moved", **moved)} & {*before}
    shutil.copytree(models / "phase1/best", copy / "phase1/best")
    config = copy / "base/scheduler/scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"solver_order": 1}))
    encoder_fingerprint.cache_clear()  # a command of its own has not read it before
    assert not {*keys(copy, scenes, tmp_path)} & {*before}


def test_a_model_whose_backbone_has_moved_is_evaluated(models, scenes, tmp_path):
    copy = shutil.copytree(models, tmp_path / "models")
    shutil.move(copy / "phase1", copy / "moved")
    words = {"model": [copy / "phase2/best", copy / "moved/best"], "max_clips": 1}
    with pytest.raises(InputError, match=r"phase1/best: not there, but .* with --backbone"):
        main(command(tmp_path / "out", scenes, **words))
    main(command(tmp_path / "out", scenes, **words, backbone=copy / "moved/best"))
    assert len(files(tmp_path / "out")) == 2
    with pytest.raises(InputError, match="the models were trained on no other backbones"):
        main(command(tmp_path / "out", scenes, model=copy / "moved/best", backbone=copy / "moved/best"))


def test_another_model_in_the_same_folder_is_noticed(models, scenes, tmp_path):
    copy = shutil.copytree(models, tmp_path / "models")
    main(command(tmp_path / "out", scenes, model=copy / "phase2/best"))
    before = files(tmp_path / "out")
    contract = read_contract(copy / "phase2/best")
    other = C2RControlNet.from_pretrained(copy / "phase2/best")
    next(other.parameters()).data.mul_(2)
    save_phase(copy / "phase2/best", other, contract)
    encoder_fingerprint.cache_clear()  # a command of its own has not read it before
    main(command(tmp_path / "out", scenes, model=copy / "phase2/best"))
    after = files(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(before[name] != after[name] for name in before)


def test_models_are_compared_with_one_guidance(models, scenes, tmp_path):
    """That of the samples of training, unless options name one."""
    other = tmp_path / "models/phase2/best"
    shutil.copytree(models, tmp_path / "models")

    def change(folder, **entries):
        path = folder / "c2r.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))

    def found(*folders, **options):
        args = cli.parse(EVALUATE, command(tmp_path, scenes, model=[*folders], **options))
        found = [find_model_to_evaluate(args, path, path, "cpu") for path in args.model]
        agree_on_guidance(found)
        return [[*model.guidance.values()] for model in found]

    first, second = shutil.copytree(other, other.with_name("first")), shutil.copytree(other, other.with_name("second"))
    change(first, guidance="cfg", guidance_scale=2.0, control_guidance_scale=1.5)
    change(second, guidance="cfg", guidance_scale=3.0)
    assert found(other) == [["apg", 10.0, 1.0]]
    assert found(other, first, tmp_path / "models/phase1/best") == [["cfg", 2.0, 1.5]] * 3
    with pytest.raises(
        InputError, match=r"samples in training differs: .*first has guidance cfg, .*; .*second has .*; give --"
    ):
        found(first, second)
    change(first, guidance="apg", guidance_scale=None, control_guidance_scale=None)
    change(second, guidance="apg", guidance_scale=10.0)  # the default of apg, as the first has
    assert found(first, second) == [["apg", 10.0, 1.0]] * 2
    change(first, guidance="cfg", guidance_scale=2.0)
    change(second, guidance="cfg", guidance_scale=3.0)
    given = {"guidance_scale": 2.5, "control_guidance_scale": 1.0}
    assert found(first, other, second, **given) == [["cfg", 2.5, 1.0]] * 3


def test_videos_from_elsewhere_are_found_by_name_and_measured(scenes, tmp_path):
    """The truth as its own copy: edges agree, and a copy of another scene does worse."""
    for folder, numbers in (("copies", (0, 1)), ("swapped", (1, 0))):
        (tmp_path / folder).mkdir()
        for i, number in enumerate(numbers):
            name = f"f{i}.mp4" if i else "c0.mp4"  # named as the truth or as the control
            shutil.copy(scenes / f"f{number}.mp4", tmp_path / folder / name)
    given = [tmp_path / "copies", tmp_path / "swapped"]
    main(command(tmp_path / "out", scenes, videos=given, metrics=["edge_f1"]))
    values = results(tmp_path / "out")["measures"]["edge_f1"]["sources"]
    assert values["copies"]["mean"] == 1
    assert values["swapped"]["mean"] < 0.9
    rows = [*csv.DictReader((tmp_path / "out/clips.csv").read_text().splitlines())]
    assert [(row["source"], row["clip"], row["seed"]) for row in rows[:2]] == [
        ("copies", "f0", ""),
        ("copies", "f1", ""),
    ]
    assert results(tmp_path / "out")["format"] == {**SIZE, "num_frames": 10}


def test_another_evaluation_in_the_folder_leaves_no_clips_of_the_first(scenes, tmp_path):
    """Nor does it remove or replace files of others."""
    out, words = tmp_path / "out", {"videos": scenes}
    main(command(out, scenes, **words))
    (out / "clips/mine.mp4").write_bytes(b"video")
    main(command(out, scenes, **words, max_clips=1))
    assert {path.name for path in (out / "clips").iterdir()} == {"f0.mp4", "mine.mp4"}
    (out / "clips/f1.mp4").write_bytes(b"video")
    with pytest.raises(InputError, match=r"out: clips/f1\.mp4 is there, but no results\.json names it"):
        main(command(out, scenes, **words))


def test_a_network_is_loaded_once(scenes, tmp_path, monkeypatch):
    loaded, load = [], CLIPModel.from_pretrained
    monkeypatch.setattr(
        CLIPModel, "from_pretrained", lambda *args, **options: loaded.append(1) or load(*args, **options)
    )
    words = {"videos": scenes, "networks": f"clip={save_clip(tmp_path / 'clip')}", "metrics": "clip_similarity"}
    main(command(tmp_path / "out", scenes, **words))
    assert "clip_similarity" in results(tmp_path / "out")["measures"]
    assert loaded == [1]


def test_the_cg_look_stands_beside_measures_against_the_control(models, scenes, tmp_path, capsys):
    """Videos with the look of the CG clips are at 1, those of the real clips at 0."""
    names = [f"v{i}.mp4" for i in range(12)]
    real = write_dataset(tmp_path / "real", names, ["rain"] * 12)
    cg = write_dataset(tmp_path / "cg", names, ["rain"] * 12, [f"c{i}.mp4" for i in range(12)], flat_video)
    for folder, video in (("like_real", noise_video), ("like_cg", flat_video)):
        for i in range(2):
            write_video(tmp_path / folder / f"f{i}.mp4", video(30 + i), SIZE["fps"])
    main(
        command(
            tmp_path / "out",
            scenes,
            videos=[tmp_path / "like_real", tmp_path / "like_cg"],
            metrics=["edge_f1_control"],
            real_dataset=real,
            cg_dataset=cg,
            pretrained_model_name_or_path=models / "base",
            dinov3=models / "dinov3",
            num_frames=5,
        )
    )
    found = results(tmp_path / "out")
    looks = found["measures"]["cg_look"]["sources"]
    assert looks["like_real"]["mean"] < 0.5 < looks["like_cg"]["mean"]
    assert "edge_f1_control" in found["measures"]
    assert found["cg_looks"]["like_cg"].startswith("CG look")
    assert "like_cg: CG look" in capsys.readouterr().out


def test_given_videos_are_cut_to_what_clips_of_datasets_can_have(scenes, tmp_path, caplog):
    def form(size=(32, 48), **asked):
        folder = tmp_path / f"{size}"
        write_video(folder / "f0.mp4", np.zeros((10, *size, 3), np.uint8), 8)
        asked = dict.fromkeys(("num_frames", "height", "width", "fps")) | asked
        return common_format({}, [folder / "f0.mp4"], asked, encoded=True)

    with caplog.at_level("WARNING"):
        assert form() == ClipFormat(9, 32, 48, 8.0)
    assert "--num_frames: 9 of 10 frames are measured" in caplog.text
    caplog.clear()
    assert form(num_frames=5) == ClipFormat(5, 32, 48, 8.0)
    assert caplog.text == ""
    with pytest.raises(InputError, match=r"f0\.mp4: width 50 is not divisible by 16, as clips of --real_dataset"):
        form((32, 50))


def test_the_table_of_the_toy_says_which_source_is_larger():
    own, none = "m, own control", "m, no control"
    number = {"mean": 0.5, "low": 0.4, "high": 0.6}
    measures = {name: {"sources": {own: number, none: number}} for name in ("a", "b", "c")}
    differences = [
        {"measure": name, "first": own, "second": none, "mean": mean, "beyond_chance": beyond}
        for name, mean, beyond in (("a", -0.1, True), ("b", 0.1, True), ("c", 0.1, False))
    ]
    assert [*markdown({"measures": measures, "differences": differences})] == [
        "| | own control | none | beyond chance |",
        "|---|---|---|---|",
        "| `a` | 0.50 [0.40, 0.60] | 0.50 [0.40, 0.60] | own > none |",
        "| `b` | 0.50 [0.40, 0.60] | 0.50 [0.40, 0.60] | none > own |",
        "| `c` | 0.50 [0.40, 0.60] | 0.50 [0.40, 0.60] | none |",
    ]


def test_passes_are_read_and_their_faults_are_one_line(models, scenes, tmp_path):
    """Ids named by the metadata are read; a measure that needs a network that is not named is skipped by name."""
    (scenes / "ids").mkdir()
    for number in range(10):
        Image.fromarray(np.full((32, 48), number, np.uint16)).save(scenes / f"ids/i_{number:03d}.png")
    rows = [["file_name", "control_name", "text", "id_name", "fps"]]
    rows += [[f"f{i}.mp4", f"c{i}.mp4", "rain", "ids", "8"] for i in range(2)]
    with open(scenes / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    words = {"model": models / "phase2/best", "metrics": ["warp_error", "mask_miou_passes"]}
    main(command(tmp_path / "out", scenes, **words))
    remarks = results(tmp_path / "out")["remarks"]
    assert any(line.startswith("mask_miou_passes: needs") for line in remarks)
    for path in (scenes / "ids").iterdir():
        Image.fromarray(np.zeros((64, 48), np.uint16)).save(path)
    with pytest.raises(
        InputError, match=r"has the shape 0\.75:1, but the video of its row 1\.5:1; render the id_name"
    ):
        main(command(tmp_path / "out", scenes, **words))
    for path in (scenes / "ids").iterdir():
        path.write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"ids/i_000\.png: cannot be decoded"):
        main(command(tmp_path / "out", scenes, **words))


@pytest.fixture(scope="module")
def hostile(models, tmp_path_factory):
    """Scenes, and videos and models that do not fit; the text encoder is damaged, which shows if it is read."""
    folder = tmp_path_factory.mktemp("hostile")
    write_scenes(folder / "scenes")
    shutil.copytree(models, folder / "models")
    (folder / "models/base/text_encoder/model.safetensors").write_bytes(b"damaged")
    contract = json.loads((folder / "models/phase2/best/c2r.json").read_text())
    larger = shutil.copytree(folder / "models/phase2/best", folder / "models/phase2/larger")
    (larger / "c2r.json").write_text(json.dumps(contract | {"height": 64}))
    sizes = {"small": (16, 48, 10, 8), "short": (32, 48, 3, 8), "fast": (32, 48, 30, 24)}
    for name, (height, width, count, fps) in sizes.items():
        for i in range(2):
            write_video(folder / name / f"f{i}.mp4", np.zeros((count, height, width, 3), np.uint8), fps)
    (folder / "missing").mkdir()
    for name, row in {
        "absent": "f0.mp4,gone.mp4,rain",
        "outside": "../scenes/f0.mp4,c0.mp4,rain",
        "twice": "f0.mp4,c0.mp4,rain\nf0.mp4,c1.mp4,rain",
        "silent": "f0.mp4,c0.mp4,",
        "uncontrolled": "f0.mp4,,rain",
        "alone": "f0.mp4,c0.mp4,rain",
        "pictures": "f0.mp4,one.png,rain",
    }.items():
        shutil.copytree(folder / "scenes", folder / name)
        (folder / name / "metadata.csv").write_text(f"file_name,control_name,text\n{row}\n")
        Image.new("RGB", (48, 32)).save(folder / name / "one.png")
    return folder


MODEL = "{}/models/phase2/best"
BAD_INPUT = [
    ({"model": None}, "--model: missing; give a trained model, or --videos that were made elsewhere"),
    ({"model": "{}/scenes"}, "{}/scenes: has no c2r.json"),
    ({"model": [MODEL, MODEL]}, "/models/phase2/best: named twice; name it once"),
    ({"videos": ["{}/scenes", "{}/small/../scenes/"]}, "--videos {}/small/../scenes/: named twice; name it once"),
    ({"videos": MODEL + "/"}, "--videos {}/models/phase2/best/: named twice; name it once"),
    (
        {"model": [MODEL, "{}/models/phase2/larger"]},
        "makes 5 frames of 64x48 at 8 fps, but {}/models/phase2/best makes",
    ),
    ({}, "{}/models/base/text_encoder/model.safetensors: cannot be read as safetensors"),
    ({"dataset": "{}/nowhere"}, "--dataset {}/nowhere: no such folder"),
    ({"dataset": "{}/scenes/f0.mp4"}, "--dataset {}/scenes/f0.mp4: is a file; give its folder"),
    ({"dataset": "{}/absent"}, "row 1 of its metadata: missing file (gone.mp4); correct or remove the row"),
    ({"dataset": "{}/outside"}, "row 1 of its metadata: path outside the folder"),
    ({"dataset": "{}/twice"}, "row 2 of its metadata: f0 is the name of an earlier row too"),
    ({"dataset": "{}/silent"}, "f0 has no text to generate from; add its prompt"),
    ({"dataset": "{}/uncontrolled"}, "f0 has no control_name; name its coarse video, or give --control none"),
    ({"dataset": "{}/alone", "control": ["own", "shuffled"]}, "--control shuffled: all scenes have the same control"),
    ({"dataset": "{}/pictures"}, "one.png: one picture; give a video, or the folder of an image sequence"),
    ({"dataset": "hf://datasets/a/b"}, "--dataset hf://datasets/a/b: is not on this machine"),
    ({"num_frames": 13}, "gives 10 frames at 8 fps, but clips have 13; give a longer video, or lower --num_frames"),
    ({"videos": "{}/nowhere"}, "--videos {}/nowhere: no such folder"),
    ({"videos": "{}/missing"}, "--videos {}/missing: has no f0.mp4; add the scene's video under this name"),
    ({"videos": "{}/small"}, "{}/small/f0.mp4: is 16x48, but the clips are 32x48; resize it, or give --height"),
    ({"videos": "{}/short"}, "{}/short/f0.mp4: has 3 frames, but clips have 5; lower --num_frames"),
    ({"videos": "{}/fast"}, "{}/fast/f0.mp4: has 24 fps, but the clips 8; convert it, or give --fps"),
    ({"model": None, "videos": "{}/scenes", "control": "none"}, "--control none: no video is generated"),
    ({"metrics": "beauty"}, "--metrics beauty: not one of the choices"),
    ({"metrics": "edge_f1_control"}, "nothing can be measured: edge_f1_control: the CG look must be known too"),
    ({"metrics": "lpips"}, "--metrics lpips: nothing can be measured: lpips: needs a VGG16 of timm"),
    ({"networks": "clip"}, "--networks clip: not ROLE=NETWORK; give one of lpips=…"),
    (
        {"model": None, "videos": "{}/scenes", "networks": "clip={}/nowhere", "metrics": "clip_similarity"},
        "{}/nowhere",
    ),
    ({"output_dir": "{}/scenes/f0.mp4"}, "--output_dir {}/scenes/f0.mp4: is a file; give a folder"),
    ({"model": None, "videos": "{}/scenes", "real_dataset": "{}/scenes"}, "--pretrained_model_name_or_path: missing"),
]


@pytest.mark.parametrize(("changed", "message"), BAD_INPUT)
def test_bad_input_is_one_line_before_any_weight_is_read(hostile, tmp_path, changed, message):
    def here(value):
        return [here(one) for one in value] if isinstance(value, list) else str(value).replace("{}", str(hostile))

    changed = {name: value if value is None else here(value) for name, value in changed.items()}
    words = command(tmp_path / "out", **{"dataset": here("{}/scenes"), "model": here(MODEL)} | changed)
    with pytest.raises(InputError) as error:
        main(words)
    assert here(message) in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out/videos").exists()
