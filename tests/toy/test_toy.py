"""The toy: its renderings, its measures, the shipped weights, its folder and the quickstart."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKLWan
from PIL import Image
from torch.nn import functional as F
from transformers import DINOv3ViTModel

from c2r import InputError, cli
from c2r.models.dinov3 import DINOv3FeatureExtractor
from c2r.options import PHASE1, PHASE2
from c2r.toy import city
from c2r.toy.appearance import gradient_energy, recognise_weather_and_walls
from c2r.toy.folder import write_toy
from c2r.toy.layout import WEIGHTS, PeopleFinder, correlation, correlations, edge_map, true_people_map
from c2r.toy.leaking_dinov3 import write_early_dinov3, write_look_dinov3, write_pixel_dinov3
from c2r.toy.pretraining.stage import psnr, to_pixel_values
from tests.helpers.forks import start_warm


def test_a_seed_always_gives_the_same_scene():
    a, b = (city.render(city.make_scene(3), num_frames=2) for _ in range(2))
    for look in (*city.LOOKS, "kinds"):
        np.testing.assert_array_equal(a[look], b[look])
    assert not np.array_equal(a["real"], city.render(city.make_scene(4), num_frames=2)["real"])


def test_the_three_looks_show_the_same_people():
    for seed in range(8):
        clips = city.render(city.make_scene(seed), num_frames=3)
        people = clips["kinds"] == city.PERSON
        orange = (np.abs(clips["coarse"].astype(int) - (235, 122, 36)) < 3).all(-1)
        assert people.any()
        assert orange.any()
        # A capsule stands where the walker does: most of the walker is inside it, and it covers little else.
        assert (people & orange).sum() > 0.55 * people.sum()
        assert (people & orange).sum() > 0.45 * orange.sum()


def test_people_move_and_frames_keep_their_time():
    scene = city.make_scene(5)
    slow, fast = (city.render(scene, ("coarse",), num_frames=3, fps=fps)["coarse"] for fps in (4, 8))
    np.testing.assert_array_equal(slow[1], fast[2])  # both are at 0.25 s
    assert not np.array_equal(slow[0], slow[1])


def test_captions_name_sky_material_and_count():
    for seed in range(20):
        scene = city.make_scene(seed)
        text = city.caption(scene)
        assert scene.sky in text
        assert scene.material in text
        assert city.COUNTS[len(scene.people)] in text
        assert len({city.caption(scene, look) for look in city.LOOKS}) == 3


def test_render_takes_any_size():
    clips = city.render(city.make_scene(0), num_frames=5, height=48, width=80)
    assert clips["real"].shape == (5, 48, 80, 3)
    assert clips["real"].dtype == np.uint8


def test_correlation_is_one_for_equal_maps_up_to_scale_and_offset():
    truth = torch.zeros(2, 4, 4)
    truth[:, 1, 2] = 1
    assert correlation(0.3 * truth + 0.1, truth) == pytest.approx(1)
    assert correlation(1 - truth, truth) == pytest.approx(-1)
    assert correlation(torch.ones(2, 4, 4), truth) == 0
    assert abs(correlation(truth.roll(1, 2), truth)) < 0.2


def test_edges_correlate_most_within_their_own_scene():
    def edges(seed, look):
        clip = city.render(city.make_scene(seed), (look,), num_frames=2)[look]
        return edge_map(torch.from_numpy(clip).permute(0, 3, 1, 2).float())

    # Streets resemble each other. Measured: 0.17 apart, and 0.14 if a scene's own map counted among the others.
    own, other = correlations([edges(s, "real") for s in range(6)], [edges(s, "coarse") for s in range(6)])
    assert edges(0, "real").shape == (2, 12, 20)
    assert own > other + 0.15


@pytest.mark.parametrize(
    ("sky", "material"),
    [
        ("sunny", "brick"),
        ("night", "blue"),
        ("foggy", "blue"),
        ("rainy", "stone"),
        ("snowy", "stone"),
        ("dusk", "yellow"),
    ],
)
def test_weather_and_walls_are_recognised_from_pixels(sky, material):
    scene = city.make_scene(7)
    # The scene's own weather and walls do not matter, and neither does blur.
    clip = city.render(replace(scene, sky=sky, material=material), ("real",), num_frames=17)["real"]
    video = torch.from_numpy(clip).permute(0, 3, 1, 2).float()
    blurred = F.interpolate(F.avg_pool2d(video, 8), scale_factor=8)
    assert recognise_weather_and_walls(scene, blurred, 8.0) == (sky, material)


def test_gradient_energy_is_of_neighbouring_pixels_in_both_directions():
    ramp = torch.arange(8.0).expand(2, 3, 4, 8)
    assert gradient_energy(ramp) == gradient_energy(ramp.flip(-1)) == 1
    assert gradient_energy(3 * ramp) == 9
    assert gradient_energy(ramp + 2 * torch.arange(4.0).view(4, 1)) == 5
    assert gradient_energy(torch.ones(2, 3, 4, 8)) == 0


def held_out(count, **options):
    for seed in range(4_000_000, 4_000_000 + count):
        yield city.render(city.make_scene(seed), **options)


def test_shipped_weights_are_small_and_safe():
    files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files if path.suffix == ".safetensors") < 30e6
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".md"}


@pytest.mark.parametrize(("look", "decibels"), [("real", 28), ("cg", 24), ("coarse", 29)])
def test_shipped_vae_reconstructs_each_look(look, decibels):
    vae = AutoencoderKLWan.from_pretrained(WEIGHTS / "model/vae", torch_dtype=torch.float32)
    clips = torch.stack([to_pixel_values(clip[look]) for clip in held_out(3, looks=(look,))])
    with torch.no_grad():
        decoded = torch.cat([vae.decode(vae.encode(clip[None]).latent_dist.mean).sample for clip in clips])
    assert psnr(decoded, clips) >= decibels


def test_shipped_people_finder_finds_people():
    finder = PeopleFinder.from_pretrained(WEIGHTS / "people_finder", torch_dtype=torch.float32)
    found = []
    for clip in held_out(12, looks=("real",)):
        frames = torch.from_numpy(clip["real"]).permute(0, 3, 1, 2) / 127.5 - 1
        with torch.no_grad():
            found.append(correlation(finder(frames).sigmoid(), true_people_map(clip["kinds"])))
    assert np.mean(found) > 0.8


def test_shipped_dinov3_agrees_between_the_looks():
    dinov3 = DINOv3FeatureExtractor.from_pretrained(WEIGHTS / "dinov3")
    features = {look: [] for look in city.LOOKS}
    for clip in held_out(6, num_frames=1):
        for look in city.LOOKS:
            frames = torch.from_numpy(clip[look]).permute(0, 3, 1, 2)[None] / 255
            features[look].append(dinov3(frames).flatten())
    coarse, real = torch.stack(features["coarse"]), torch.stack(features["real"])
    distance = torch.cdist(coarse, real)
    # Each coarse rendering is nearest to the real one of its own scene.
    assert torch.equal(distance.argmin(1), torch.arange(6))


def test_toy_folder_is_complete_and_not_written_twice(few_scenes, tmp_path):
    write_toy(tmp_path, num_real=2, num_cg=1)
    toy = json.loads((tmp_path / "toy.json").read_text())
    assert toy["height"] == 96
    assert {path.name for path in tmp_path.iterdir()} >= {"model", "dinov3", "data", "test", "phase1.yaml"}
    args = cli.parse(PHASE1, ["--config", str(tmp_path / "phase1.yaml"), "--output_dir", str(tmp_path / "out")])
    assert args.real_dataset == [str(tmp_path / "data/real")]
    backbone = ["--resume_backbone_from", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out")]
    args = cli.parse(PHASE2, ["--config", str(tmp_path / "phase2.yaml"), *backbone])
    assert (args.cg_ratio, args.control_layers, args.guidance_scale) == (0.2, 4, 2.0)
    before = (tmp_path / "data/real/train/metadata.csv").stat().st_mtime_ns
    write_toy(tmp_path, num_real=2, num_cg=1)
    assert (tmp_path / "data/real/train/metadata.csv").stat().st_mtime_ns == before
    (tmp_path / "toy.json").write_text(json.dumps(toy | {"version": "0"}))
    with pytest.raises(InputError, match="is of another version of the toy; delete"):
        write_toy(tmp_path, num_real=2, num_cg=1)


@pytest.mark.slow
def test_quickstart_runs_every_step_and_continues_where_it_was(few_scenes, tmp_path):
    """The whole quickstart, on little data, with two steps a phase and two denoising steps a video."""
    write_toy(tmp_path / "toy", num_real=4, num_cg=3)
    for name in ("phase1.yaml", "phase2.yaml"):
        options = yaml.safe_load((tmp_path / "toy" / name).read_text())
        options |= {"max_train_steps": 2, "num_validation_clips": 1}
        if name == "phase2.yaml":
            options |= {"num_samples": 0, "num_inference_steps": 2}
        (tmp_path / "toy" / name).write_text(yaml.safe_dump(options))
    command = ["-m", "c2r.quickstart", "--output_dir", str(tmp_path)]
    for expected in ("$ accelerate launch", "done already"):
        done = start_warm(*command)
        assert done.returncode == 0, done.stderr[-3000:]
        assert expected in done.stdout
    table = json.loads((tmp_path / "report.json").read_text())
    assert all(np.isfinite(value) for value in table.values())
    assert table["people correlation of the true clips (ceiling)"] > 0.7
    assert table["edge correlation of the true clips through the VAE (ceiling)"] > 0.7
    assert all(0 <= value <= 1 for name, value in table.items() if "clips that show" in name)
    assert table["CG share of the samples in phase 2"] == pytest.approx(3 / 16)  # a fifth of 16 samples, rounded
    with Image.open(tmp_path / "report.png") as report:
        assert report.width > 4 * 3 * 160
    with Image.open(tmp_path / "report.webp") as film:
        assert film.n_frames == 9
        assert film.width > 5 * 160


def test_extractors_with_a_planted_leak(tmp_path):
    """Pixel features are the patches' own numbers, early ones those of the whole model's second layer."""
    dinov3 = WEIGHTS / "dinov3"
    frames = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    pixels, early, whole = (
        DINOv3ViTModel.from_pretrained(path, dtype=torch.float32).eval()
        for path in (write_pixel_dinov3(tmp_path / "p"), write_early_dinov3(tmp_path / "e", dinov3), dinov3)
    )
    with torch.no_grad():
        found = pixels(frames).last_hidden_state[:, 1:]
        patches = F.unfold(frames, 16, stride=16).transpose(1, 2)
        torch.testing.assert_close(found, F.layer_norm(patches, patches.shape[-1:]), rtol=1e-3, atol=1e-4)
        expected = whole(frames, output_hidden_states=True).hidden_states[2]
        torch.testing.assert_close(early(frames).last_hidden_state, whole.norm(expected))
    for name in "pe":
        assert DINOv3FeatureExtractor.from_pretrained(tmp_path / name)(frames[None]).shape[-1] in (768, 96)


def test_a_direction_of_the_look_is_added_to_features_that_hide_it(tmp_path):
    """The looks of a scene lie far apart in the mean over a frame alone: places differ as before."""
    write_look_dinov3(tmp_path, WEIGHTS / "dinov3")
    old, new = (DINOv3FeatureExtractor.from_pretrained(path).float() for path in (WEIGHTS / "dinov3", tmp_path))
    clips = [city.render(city.make_scene(seed), num_frames=1) for seed in range(16)]
    frames = {look: torch.from_numpy(np.stack([clip[look] for clip in clips])) for look in city.LOOKS}
    with torch.no_grad():
        found = [
            torch.stack([model(video.movedim(-1, 2) / 255)[:, 0] for video in frames.values()]) for model in (old, new)
        ]  # (3 looks, 16 scenes, h, w, C) each
    old_means, new_means = (features.mean((2, 3)) for features in found)

    def distance_of_looks(means):
        return (means[:, None] - means).norm(dim=-1).mean(-1)[~torch.eye(3, dtype=torch.bool)]

    assert (distance_of_looks(new_means) > 1.5).all()
    assert (distance_of_looks(old_means) < 0.5).all()
    old_places, new_places = (features - features.mean((2, 3), keepdim=True) for features in found)
    assert (new_places - old_places).square().mean() < 0.1 * old_places.square().mean()
