"""Options of the two training scripts."""

from dataclasses import replace
from functools import partial

from c2r.models.injections import INJECTIONS
from c2r.options.option import MUST_NOT_CHANGE, NEW_BASELINE, Command, Option
from c2r.options.presets import PRESETS, preset_options
from c2r.options.shared import (
    ATTENTION_BACKENDS,
    BASE_MODEL,
    CLIP_OPTIONS,
    CONFIG,
    DINOV3,
    TIMEOUT,
    attention_option,
    sampling_options,
)
from c2r.options.training_checks import TRACKERS, check_phase1_options, check_phase2_options
from c2r.options.types import (
    ANY_NUMBER,
    COUNT,
    COUNT_OR_ZERO,
    DURATION,
    FOLDER,
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    SHARE,
    Choice,
    Flag,
    Number,
    Switch,
    Text,
)

#: Names of `diffusers.optimization.SchedulerType` that need no further argument, and of
#: `c2r.flow_matching.WEIGHTING_SCHEMES`; importing these takes seconds.
LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
WEIGHTING_SCHEMES = ("none", "sigma_sqrt", "logit_normal", "mode", "cosmap")

DATASET_METAVAR = "FOLDER[:WEIGHT]"

OFFLOAD_BACKBONE = Option(
    "offload_backbone",
    "keep the frozen backbone's blocks in the CPU's memory and copy each to the device while it runs",
    Switch(),
    False,
)


def _training_groups(phase, before_data, after_data, **defaults):
    """Return the groups of options that both phases share.

    Args:
        phase: "1" or "2".
        before_data, after_data: the phase's own options in the group "model and data".
        defaults: default values that differ between the phases, by option name.
    """
    groups = {
        "run": [
            CONFIG,
            Option("output_dir", "folder for checkpoints, best/, final/ and logs", FOLDER, required=True, common=True),
            Option(
                "resume_from_checkpoint",
                "checkpoint-N, or latest: the newest complete one, and step 0 where there is none",
                Text("checkpoint-N or latest"),
                metavar="NAME",
                common=True,
            ),
            Option(
                "dry_run",
                "train, validate, save and resume on a few clips, print what the whole run would take, and stop",
                Flag(),
                False,
                common=True,
            ),
            Option(
                "seed",
                "seed of everything that is random in the run",
                SEED,
                0,
                common=True,
                on_resume=MUST_NOT_CHANGE,
            ),
            Option(
                "mixed_precision",
                "bf16: autocast over fp32 trainable weights, frozen weights in bf16; no: everything in fp32",
                Choice(("bf16", "no")),
                "bf16",
            ),
            Option(
                "preset",
                "memory of the GPU: sets options that trade time for memory, for 1.3B and clips of 480x832x81 on one "
                "GPU, see docs/hardware.md; options that are given win",
                Choice(tuple(PRESETS[phase])),
                metavar="|".join(PRESETS[phase]),
                common=True,
            ),
            Option(
                "report_to",
                "one or several trackers that get numbers, pictures and videos; all: those that are installed",
                Choice((*TRACKERS, "all", "none")),
                ["tensorboard"],
                metavar="TRACKER",
                several=True,
            ),
            TIMEOUT,
        ],
        "model and data": [
            BASE_MODEL,
            *before_data,
            Option(
                "real_dataset",
                "one or several folders (or remote addresses) with real videos and a metadata.csv; real samples are "
                "drawn in proportion to the weights, which are 1 where none is given",
                Text("folders or addresses"),
                metavar=DATASET_METAVAR,
                several=True,
                required=True,
                common=True,
            ),
            *after_data,
            *CLIP_OPTIONS,
        ],
        "optimisation": [
            Option(
                "train_batch_size",
                "clips per micro-step of a device, or of a group of --context_parallel_degree devices",
                COUNT,
                common=True,
            ),
            Option("gradient_accumulation_steps", "micro-steps per optimizer step", COUNT, common=True),
            Option("max_train_steps", "optimizer steps of the run", COUNT, common=True),
            Option(
                "learning_rate",
                "learning rate after the warm-up"
                + ("; default: 1e-5, and 1e-4 with --lora_rank" if phase == "1" else ""),
                NOT_NEGATIVE,
                common=True,
            ),
            Option(
                "lr_scheduler",
                "learning rate schedule of diffusers.optimization",
                Choice(LR_SCHEDULERS),
                "constant_with_warmup",
            ),
            Option("lr_warmup_steps", "optimizer steps of learning rate warm-up", COUNT_OR_ZERO, 100),
            Option(
                "optimizer",
                "adamw; or adamw8bit: states in 8 bit, needs bitsandbytes",
                Choice(("adamw", "adamw8bit")),
                "adamw",
                common=True,
                on_resume=MUST_NOT_CHANGE,
            ),
            Option("adam_beta1", "AdamW's decay of the first moment", Number(least=0, below=1), 0.9),
            Option("adam_beta2", "AdamW's decay of the second moment", Number(least=0, below=1), 0.999),
            Option("adam_weight_decay", "AdamW's weight decay", NOT_NEGATIVE, 0.01),
            Option("adam_epsilon", "AdamW's epsilon", POSITIVE, 1e-8),
            Option("max_grad_norm", "norm that gradients are clipped to; 0: no clipping", NOT_NEGATIVE, 1.0),
            Option(
                "gradient_checkpointing",
                "memory saved by computing again in the backward pass. none: nothing is; block: each block, from its "
                "input; selective: each block except self-attention, whose outputs are kept",
                Choice(("none", "block", "selective")),
                "block",
                common=True,
            ),
            Option(
                "offload_activations",
                "keep the inputs of blocks in the CPU's memory until the backward pass",
                Switch(),
                False,
            ),
            Option(
                "ffn_chunks",
                "parts of the sequence, such as 4, in which feed-forward layers and projectors run one after another",
                COUNT,
                1,
            ),
            attention_option(ATTENTION_BACKENDS),
            Option(
                "compile",
                "compile the blocks by torch.compile: the first steps take minutes longer, the others less time; one "
                "GPU, DDP or ZeRO-2",
                Flag(),
                False,
            ),
            Option(
                "context_parallel_degree",
                "neighbouring processes that share the tokens of a clip that does not fit one device; 1: none do",
                COUNT,
                1,
            ),
            Option(
                "weight_storage",
                "precision of trainable weights; bf16 stores weights and gradients in bf16 and the low 16 bits beside "
                "them, so no small update is lost",
                Choice(("fp32", "bf16")),
                "fp32",
            ),
            Option(
                "step_in_backward",
                "update each weight as soon as its gradient is known, and free the gradient; on one device, with "
                "--gradient_accumulation_steps 1 and --max_grad_norm 0",
                Flag(),
                False,
            ),
            Option(
                "ema_decay",
                "validate and save an exponential moving average of the weights with this decay, such as 0.999",
                Number(above=0, below=1),
                on_resume="from the command line; cannot be switched on or off",
            ),
        ],
        "flow matching": [
            Option(
                "flow_shift",
                "shift of the noise levels: 3 for 480p, 5 for 720p",
                POSITIVE,
                3.0,
                on_resume=NEW_BASELINE,
            ),
            Option(
                "weighting_scheme",
                "density of the noise levels and weight of the loss, as in diffusers.training_utils; the weight of "
                "sigma_sqrt is at most 5",
                Choice(WEIGHTING_SCHEMES),
                "none",
            ),
            Option("logit_mean", "mean of the logit_normal density; above 0: more noise", ANY_NUMBER, 0.0),
            Option("logit_std", "standard deviation of the logit_normal density", POSITIVE, 1.0),
            # Beyond 2 / (π − 2) the density is not monotonic, and stratified noise levels would not stay so.
            Option("mode_scale", "scale of the mode density", Number(least=-1, most=1.75), 1.29),
            Option("prompt_dropout", "share of samples trained with the empty prompt", SHARE, 0.1),
        ],
        "checkpoints and validation": [
            Option("checkpointing_steps", "optimizer steps between checkpoints", COUNT, 2000, common=True),
            Option(
                "checkpoints_total_limit",
                "checkpoints to keep, older ones are deleted; default: all",
                COUNT,
                common=True,
            ),
            Option("save_every_minutes", "longest time in minutes between two checkpoints", POSITIVE),
            Option(
                "save_before_timeout",
                "time before the end of a Slurm slot, such as 5m, at which the run saves and stops with status 75",
                DURATION,
                metavar="5m",
            ),
            Option(
                "max_skipped_steps",
                "maximum consecutive steps skipped for a non-finite gradient; one more ends the run",
                COUNT_OR_ZERO,
                5,
            ),
            Option("validation_steps", "optimizer steps between validations", COUNT, 500, common=True),
            Option(
                "num_validation_clips",
                "held-out clips of each domain to validate on",
                COUNT,
                8,
                on_resume=NEW_BASELINE,
            ),
        ],
    }
    return {
        name: [replace(o, default=defaults[o.name]) if o.name in defaults else o for o in options]
        for name, options in groups.items()
    }


def _phase1_defaults(given):
    """Return the values that other options have by --preset or --lora_rank."""
    options = preset_options("1", given)
    if given.get("lora_rank") is not None:
        # B starts at zero, and a weight changes by the product of two small matrices.
        options = {"learning_rate": 1e-4} | options
    return options


PHASE1 = Command(
    "train_phase1.py",
    "Phase 1: adapt the Wan 2.1 DiT to real urban video with a flow-matching loss.",
    _training_groups(
        "1",
        [
            Option(
                "dit_path",
                "DiT to start from instead of the pipeline's transformer/: a .safetensors file, or a folder in "
                "Diffusers' or Wan's own layout",
                Text("a file or folder"),
                common=True,
                on_resume=MUST_NOT_CHANGE,
            )
        ],
        [],
        train_batch_size=4,
        gradient_accumulation_steps=8,
        max_train_steps=10_000,
        learning_rate=1e-5,
    )
    | {
        "LoRA on a frozen backbone": [
            Option(
                "lora_rank",
                "train a LoRA of this rank, such as 64, on the linear layers of all blocks, over the backbone frozen "
                "in the --mixed_precision: less memory, smaller files; needs peft",
                COUNT,
                common=True,
                on_resume=MUST_NOT_CHANGE,
            ),
            OFFLOAD_BACKBONE,
        ]
    },
    check_phase1_options,
    _phase1_defaults,
)

PHASE2 = Command(
    "train_phase2.py",
    "Phase 2: ground the control on mixed CG and real video, over the frozen backbone of phase 1.",
    _training_groups(
        "2",
        [
            Option(
                "resume_backbone_from",
                "frozen backbone: best/ or final/ of phase 1, a folder in Diffusers' or Wan's own layout, or a "
                ".safetensors or .gguf file",
                Text("a folder or file"),
                metavar="PATH",
                required=True,
                common=True,
            ),
            DINOV3,
        ],
        [
            Option(
                "cg_dataset",
                "one or several folders (or remote addresses) with CG pairs: a metadata.csv with file_name, "
                "control_name and text; CG samples are drawn in proportion to the weights, which are 1 where none is "
                "given",
                Text("folders or addresses"),
                metavar=DATASET_METAVAR,
                several=True,
                common=True,
            ),
            Option(
                "cg_ratio",
                "share of CG samples, exact over the run",
                SHARE,
                0.2,
                common=True,
                on_resume="from the command line if it has changed, else the share that the run has reached",
            ),
        ],
        train_batch_size=1,
        gradient_accumulation_steps=1,
        max_train_steps=15_000,
        learning_rate=5e-6,
        # Under 3 % of a run at batch 1, see benchmarks/validation_share.py.
        validation_steps=1500,
        num_validation_clips=4,
    )
    | {
        "frozen backbone": [
            OFFLOAD_BACKBONE,
            Option(
                "fp8_backbone",
                "store the matrices of the backbone's blocks in 8 bit; on the toy this changes the gradients by 2 %",
                Flag(),
                False,
                on_resume=MUST_NOT_CHANGE,
            ),
        ],
        "control": [
            Option(
                "injection",
                "blocks: ControlNet blocks add residuals after the backbone's blocks; latent: no blocks, the tokens "
                "of the adapter are added once to the patch-embedded latents, as in the released C2R",
                Choice(INJECTIONS),
                "blocks",
                on_resume=MUST_NOT_CHANGE,
            ),
            Option(
                "resume_controlnet_from",
                "control weights to start from: best/ or final/ of phase 2, or a file of the released C2R; default: "
                "clones of the backbone's blocks",
                Text("a folder or file"),
                metavar="PATH",
                on_resume="not used",
            ),
            Option(
                "control_layers",
                "number of ControlNet blocks; not used with --injection latent",
                COUNT,
                15,
                common=True,
                on_resume=MUST_NOT_CHANGE,
            ),
            Option(
                "control_stride",
                "backbone blocks per ControlNet block: 1 injects after the first blocks, 3 after every third; not "
                "used with --injection latent",
                COUNT,
                1,
                on_resume=MUST_NOT_CHANGE,
            ),
            Option(
                "causal_control",
                "each latent frame sees the control of its own and earlier frames, never of later ones",
                Flag(),
                False,
                on_resume=MUST_NOT_CHANGE,
            ),
            Option("conditioning_scale", "factor of the control residuals", NOT_NEGATIVE, 1.0),
            Option("control_dropout", "share of samples trained with a blank control", SHARE, 0.1),
            Option(
                "cache_control_features",
                "run DINOv3 once per clip instead of in each step: 194 MB of disk per clip of 480x832x81",
                Flag(),
                False,
            ),
            Option(
                "best_by",
                "criterion of best/: the lowest validation loss, or the highest control gain",
                Choice(("loss", "control_gain")),
                "loss",
                on_resume="from the command line; a change discards the previous best",
            ),
        ],
        "against a CG look": [
            Option("real_weight", "loss weight of a real sample relative to a CG sample, such as 2", POSITIVE, 1.0),
            Option(
                "adversarial_weight",
                "weight of the gradient that makes the predicted latents of CG samples look real to a domain "
                "classifier, such as 0.1; 0: no classifier",
                NOT_NEGATIVE,
                0.0,
                on_resume="from the command line; cannot be switched on or off",
            ),
            Option(
                "control_augmentation",
                "share of real clips whose control is altered in its look, never in its geometry",
                SHARE,
                0.0,
            ),
            Option(
                "control_projection",
                "project DINOv3's features on directions that agree between looks of one place: fit, or a "
                "control_projection.safetensors of another run; default: that of --resume_controlnet_from, or none",
                Text("fit or a file"),
                metavar="fit|FILE",
                on_resume=MUST_NOT_CHANGE,
            ),
            Option(
                "control_directions",
                "directions of --control_projection; default: all up to the first that disagrees between looks",
                COUNT,
                on_resume=MUST_NOT_CHANGE,
            ),
            Option(
                "control_tail_drop",
                "share of samples trained without the last directions of the projection, from a random one on",
                SHARE,
                0.0,
            ),
            Option(
                "cg_ratio_min",
                "lower bound of --cg_ratio, which is halved while the samples' CG look stays above --monitor_bound; "
                "default: --cg_ratio stays as it is",
                SHARE,
            ),
        ],
        "sample videos and CG monitor": [
            Option(
                "num_samples",
                "videos made at each sampling; below 4 the CG monitor only reports; 0: no samples and no CG monitor",
                COUNT_OR_ZERO,
                4,
                common=True,
            ),
            Option("sample_steps", "optimizer steps between samplings", COUNT, 2500),
            Option(
                "sample_dataset",
                "folder of coarse videos to sample from, laid out like --cg_dataset, with the prompts as captions; "
                "default: held-out CG pairs with captions of held-out real clips",
                FOLDER,
            ),
            *sampling_options(num_inference_steps=20),
            Option(
                "monitor_bound", "CG look that counts as too strong: 0 is real clips, 1 is CG clips", ANY_NUMBER, 0.5
            ),
            Option(
                "monitor_patience",
                "samplings in a row above --monitor_bound after which the run advises, or lowers --cg_ratio",
                COUNT,
                3,
            ),
        ],
    },
    check_phase2_options,
    partial(preset_options, "2"),
)
