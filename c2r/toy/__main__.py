"""Write the toy: its base models, a dataset of real clips, one of CG pairs, test scenes, and a config for each phase.

python -m c2r.toy --output_dir toy

toy/model/            a Diffusers pipeline folder: VAE, UMT5, tokenizer, scheduler and a base Wan DiT
toy/dinov3/           a DINOv3ViT
toy/data/real/        train/ and validation/ with videos and a metadata.csv; validation/ also has coarse versions
toy/data/cg/          train/ and validation/ with pairs of a coarse and a fine video and a metadata.csv
toy/test/             scenes of neither dataset: coarse video and true video, listed in toy.json
toy/phase1.yaml       options for train_phase1.py --config; phase2.yaml for train_phase2.py
toy/toy.json          height, width, num_frames, fps and the test scenes; written last
"""

from pathlib import Path

from c2r import cli
from c2r.options import TOY


def main(argv: list[str] | None = None):
    args = cli.parse(TOY, argv)
    if args.train:
        from c2r.toy.pretrain import train

        train(Path(args.output_dir) / "weights", Path(args.output_dir) / "work")
    else:
        from c2r.toy.folder import write_toy

        write_toy(args.output_dir, args.num_real, args.num_cg)


if __name__ == "__main__":
    cli.run(main)
