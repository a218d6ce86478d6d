"""Models and options for estimates that take a fraction of a second."""

from argparse import Namespace

from c2r.data.buckets import Bucket
from c2r.estimation.configs import ModelConfigs
from c2r.options import PHASE1, PHASE2

TRANSFORMER = {
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 512,
    "num_layers": 4,
    "patch_size": [1, 2, 2],
    "rope_max_seq_len": 64,
}
DINOV3 = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_register_tokens": 4,
    "patch_size": 16,
}
VAE = {
    "base_dim": 8,
    "z_dim": 4,
    "dim_mult": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
    "latents_mean": [0.0] * 4,
    "latents_std": [1.0] * 4,
}
TEXT_ENCODER = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
CONFIGS = ModelConfigs(TRANSFORMER, VAE, TEXT_ENCODER, DINOV3)
BUCKET = Bucket(17, 192, 192)


def training_options(phase: int, **given) -> Namespace:
    """Return the options of a training script, with its defaults where none is given."""
    args = Namespace(**{option.name: option.default for option in (PHASE1, PHASE2)[phase - 1].options.values()})
    small = {"train_batch_size": 1, "gradient_accumulation_steps": 1}
    if phase == 2:
        small["control_layers"] = 2
    vars(args).update(small | given)
    return args
