"""Write the toy: its base models, a dataset of real clips, one of CG pairs, test scenes, and a config for each phase.

python -m c2r.toy --output_dir toy

toy/model/            a Diffusers pipeline folder: VAE, UMT5, tokenizer, scheduler and a base Wan DiT
toy/dinov3/           a DINOv3ViT
toy/data/real/        train/*.mp4 and validation/*.mp4, each with a metadata.csv; to validation belong coarse versions
toy/data/cg/          the same of pairs, each a coarse and a fine video
toy/test/             scenes that are in neither: coarse video and its truth, listed in toy.json
toy/phase1.yaml       options for train_phase1.py --config; phase2.yaml for train_phase2.py
toy/toy.json          height, width, num_frames, fps and the test scenes; written last
"""

import argparse
import csv
import json
import multiprocessing
import shutil
from importlib import resources
from pathlib import Path

import yaml
from tqdm import tqdm

from c2r.cli import run
from c2r.data.video import write_video
from c2r.toy import city

HEIGHT, WIDTH, NUM_FRAMES, FPS = 96, 160, 9, 8
VIDEO_FRAMES = 2 * NUM_FRAMES  # two windows a video
NUM_VALIDATION, NUM_TEST = 6, 8

SHARED_OPTIONS = {
    "height": HEIGHT,
    "width": WIDTH,
    "num_frames": NUM_FRAMES,
    "fps": FPS,
    "train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False,
    "mixed_precision": "no",
    "dataloader_num_workers": 0,
    "lr_warmup_steps": 10,
    "lr_scheduler": "cosine",
    "checkpointing_steps": 50,
    "checkpoints_total_limit": 2,
    "validation_steps": 100,
    "num_validation_clips": 12,
}
PHASE1_OPTIONS = SHARED_OPTIONS | {"learning_rate": 5e-4, "max_train_steps": 100}
PHASE2_OPTIONS = SHARED_OPTIONS | {
    "learning_rate": 1e-3,
    "max_train_steps": 300,
    "num_validation_clips": 4,
    "control_layers": 4,
    "control_stride": 1,
    "cg_ratio": 0.2,
    "num_samples": 4,
    "sample_steps": 150,
    # Of the scales tried, these make the people plainest; see the quickstart's people correlation.
    "guidance": "cfg",
    "guidance_scale": 2.0,
    "control_guidance_scale": 3.0,
}


def _render_files(job):
    seed, num_frames, files = job
    clips = city.render(city.make_scene(seed), tuple(files), num_frames, FPS, HEIGHT, WIDTH)
    for look, path in files.items():
        write_video(path, clips[look], FPS)


def _render_all(jobs, folder):
    with multiprocessing.Pool() as pool:
        for _ in tqdm(pool.imap_unordered(_render_files, jobs), total=len(jobs), desc=str(folder)):
            pass
        pool.close()  # or leaving would stop the workers by a signal, of which each would speak
        pool.join()


def _write_metadata(folder, columns, rows):
    with open(folder / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


def _write_real(folder, seeds, with_coarse=False):
    """Real clips, and beside each its coarse version, as validation may have it."""
    files = {seed: {"real": folder / f"{seed}.mp4"} for seed in seeds}
    if with_coarse:
        files = {seed: looks | {"coarse": folder / f"{seed}_coarse.mp4"} for seed, looks in files.items()}
    _render_all([(seed, VIDEO_FRAMES, files[seed]) for seed in seeds], folder)
    names = {seed: [path.name for path in looks.values()] for seed, looks in files.items()}
    rows = [(*names[seed], city.caption(city.make_scene(seed))) for seed in seeds]
    _write_metadata(folder, ("file_name", *["control_name"] * with_coarse, "text"), rows)


def _write_cg(folder, seeds):
    files = {seed: {"cg": folder / f"{seed}_fine.mp4", "coarse": folder / f"{seed}_coarse.mp4"} for seed in seeds}
    _render_all([(seed, VIDEO_FRAMES, files[seed]) for seed in seeds], folder)
    rows = [(f"{s}_fine.mp4", f"{s}_coarse.mp4", city.caption(city.make_scene(s), "cg")) for s in seeds]
    _write_metadata(folder, ("file_name", "control_name", "text"), rows)


def _write_test(folder, seeds):
    """A folder like a CG dataset, its truths in the real look. Returns the scenes as toy.json lists them."""
    files = {seed: {"real": folder / f"{seed}_truth.mp4", "coarse": folder / f"{seed}_coarse.mp4"} for seed in seeds}
    _render_all([(seed, NUM_FRAMES, files[seed]) for seed in seeds], folder)
    rows = [(f"{s}_truth.mp4", f"{s}_coarse.mp4", city.caption(city.make_scene(s))) for s in seeds]
    _write_metadata(folder, ("file_name", "control_name", "text"), rows)
    return [
        {
            "seed": seed,
            "prompt": city.caption(city.make_scene(seed)),
            "control_video": str(files[seed]["coarse"]),
            "truth": str(files[seed]["real"]),
        }
        for seed in seeds
    ]


def write_toy(folder, num_real=96, num_cg=32):
    """Write everything that the module's docstring lists; a folder that is complete already is left alone."""
    folder = Path(folder)
    if (folder / "toy.json").exists():
        print(f"{folder} is complete already")
        return
    with resources.as_file(resources.files("c2r.toy") / "weights") as weights:
        for part in ("model", "dinov3"):
            shutil.copytree(weights / part, folder / part, dirs_exist_ok=True)
    real, cg, test = folder / "data/real", folder / "data/cg", folder / "test"
    _write_real(real / "train", range(1_000_000, 1_000_000 + num_real))
    _write_real(real / "validation", range(1_500_000, 1_500_000 + NUM_VALIDATION), with_coarse=True)
    _write_cg(cg / "train", range(2_000_000, 2_000_000 + num_cg))
    _write_cg(cg / "validation", range(2_500_000, 2_500_000 + NUM_VALIDATION))
    scenes = _write_test(test, range(3_000_000, 3_000_000 + NUM_TEST))

    for phase, options in (("phase1", PHASE1_OPTIONS), ("phase2", PHASE2_OPTIONS)):
        paths = {"pretrained_model_name_or_path": str(folder / "model"), "real_dataset": str(real)}
        if phase == "phase2":
            paths |= {"cg_dataset": str(cg), "sample_dataset": str(test), "dinov3": str(folder / "dinov3")}
        (folder / f"{phase}.yaml").write_text(yaml.safe_dump(paths | options, sort_keys=False))
    toy = {"height": HEIGHT, "width": WIDTH, "num_frames": NUM_FRAMES, "fps": FPS, "test": scenes}
    (folder / "toy.json").write_text(json.dumps(toy, indent=2) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="toy")
    parser.add_argument("--num_real", type=int, default=96, help="real videos, two clips each")
    parser.add_argument("--num_cg", type=int, default=32, help="CG pairs, two clips each")
    parser.add_argument(
        "--train",
        action="store_true",
        help="train the base models from nothing (hours) into output_dir/weights, instead of writing the shipped ones",
    )
    args = parser.parse_args()
    if args.train:
        from c2r.toy import pretrain

        pretrain.train(Path(args.output_dir) / "weights", Path(args.output_dir) / "work")
    else:
        write_toy(args.output_dir, args.num_real, args.num_cg)


if __name__ == "__main__":
    run(main)
