"""An estimated training step against a real one on the CPU: the allocator's events and FlopCounterMode."""

from argparse import Namespace

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from c2r import flow_matching
from c2r.estimation import measure, tracker
from c2r.estimation.stages import SAVING, STEP, record_training
from c2r.estimation.step import EightBitStates, build_models
from c2r.estimation.tracker import LINEAR, TEMPORARY
from c2r.flow_matching import SigmaDensity
from c2r.models.adversary import DomainClassifier, WithAdversary, domain_loss
from c2r.models.controlnet import C2RControlNet
from c2r.models.diffusers_layout import stored_dtype
from c2r.models.dinov3 import DINOv3FeatureExtractor
from c2r.models.lora import LoraWeights
from c2r.models.transformer import C2RTransformer
from c2r.training.backward_step import StepInBackward
from c2r.training.batches import Draw
from c2r.training.optimizer import OptimizerSettings, build_optimizer
from c2r.training.precision import frozen_dtype
from c2r.training.setup import set_forward
from c2r.training.step import NoiseSettings, domain_weights, make_noisy_batch
from tests.helpers.estimates import BUCKET, CONFIGS, DINOV3, TRANSFORMER, training_options
from tests.helpers.memory import peak_bytes, storage_bytes

CPU = torch.device("cpu")


class RealStep:
    """The models of a run on the CPU, and its step as the scripts write it."""

    def __init__(self, args: Namespace):
        self.args, dtype = args, frozen_dtype(args.mixed_precision)
        torch.manual_seed(0)
        backbone = module = WanTransformer3DModel.from_config(TRANSFORMER)
        self.model, self.classifier, self.dinov3 = backbone, None, None
        has_control = hasattr(args, "control_layers")
        if has_control or args.lora_rank is not None:
            for name, parameter in backbone.named_parameters():
                parameter.data = parameter.data.to(stored_dtype(backbone, name, dtype))
        if not has_control and args.lora_rank is not None:
            module = LoraWeights.from_config(LoraWeights.config_of(TRANSFORMER, args.lora_rank))
            module.attach(backbone)
        if has_control:
            module = C2RControlNet.from_transformer(backbone, args.control_layers, 1, DINOV3["hidden_size"])
            self.model = C2RTransformer(backbone, module)
            vit = DINOv3ViTModel(DINOv3ViTConfig(**DINOV3)).to(dtype)
            self.dinov3 = DINOv3FeatureExtractor(vit, (0.5,) * 3, (0.5,) * 3)
            if args.adversarial_weight > 0:
                self.classifier = DomainClassifier(TRANSFORMER["out_channels"])
                self.model = WithAdversary(self.model, self.classifier)
        set_forward(args, self.model, backbone, CPU)
        self.optimizer = build_optimizer(module, OptimizerSettings.of(args), CPU, self.classifier)
        self.trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        for parameter in self.trainable:
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if args.step_in_backward:
            self.in_backward = StepInBackward(self.optimizer)

    @property
    def state_bytes(self) -> int:
        """Bytes of weights and of the optimizer's states."""
        tensors = [*self.model.parameters(), *self.model.buffers(), *getattr(self.optimizer, "low_bits", {}).values()]
        tensors += [value for state in self.optimizer.state.values() for value in state.values()]
        if self.dinov3 is not None:
            tensors += [*self.dinov3.parameters(), *self.dinov3.buffers()]
        return storage_bytes(*(tensor for tensor in tensors if isinstance(tensor, torch.Tensor)))

    def micro_step(self) -> None:
        args, batch_size = self.args, self.args.train_batch_size
        latents, text = torch.randn(batch_size, 4, *BUCKET.latent_grid), torch.randn(batch_size, 512, 32)
        batch = {"latents_mean": latents, "latents_logvar": latents, "prompt_embeds": text}
        noise = NoiseSettings(seed=0, density=SigmaDensity())
        noisy = make_noisy_batch(batch, noise, Draw([*range(batch_size)], 0, batch_size), text[0], CPU)
        del latents, text, batch  # a GPU would not hold them
        inputs = (noisy.noisy_latents, noisy.timesteps, noisy.prompt_embeds)
        domains = torch.zeros(batch_size, dtype=torch.int64)
        if self.dinov3 is not None:
            frames, height, width = BUCKET
            grid = (batch_size, frames, height // 16, width // 16, DINOV3["hidden_size"])
            inputs += (torch.randn(grid).to(frozen_dtype(args.mixed_precision)), 1.0)
        if self.classifier is not None:
            inputs += (args.adversarial_weight * domains,)
        prediction = self.model(*inputs)
        losses = noisy.weights * flow_matching.velocity_loss(prediction.sample, noisy.velocity_target)
        loss = losses.mean()
        if self.dinov3 is not None:
            loss = (domain_weights(domains, args.real_weight, args.cg_ratio) * losses).mean()
        if self.classifier is not None:
            loss = loss + domain_loss(prediction.domain_logits, domains, ~noisy.dropped_control, 0.2).mean()
        (loss / args.gradient_accumulation_steps).backward()

    def take(self) -> None:
        for _ in range(self.args.gradient_accumulation_steps):
            self.micro_step()
        if self.args.step_in_backward:
            self.in_backward.take_grad_norm()
            return
        torch.nn.utils.clip_grad_norm_(self.trainable, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


CASES = [
    (1, {}),
    (1, {"mixed_precision": "no"}),
    (1, {"gradient_checkpointing": "none", "train_batch_size": 2}),
    (1, {"gradient_accumulation_steps": 3}),
    (1, {"weight_storage": "bf16"}),
    (2, {}),
    (2, {"mixed_precision": "no", "gradient_checkpointing": "none"}),
    (2, {"gradient_checkpointing": "none"}),
    (2, {"adversarial_weight": 0.1, "train_batch_size": 2}),
    (1, {"gradient_checkpointing": "selective"}),
    (2, {"gradient_checkpointing": "selective", "ffn_chunks": 2}),
    (1, {"step_in_backward": True, "max_grad_norm": 0.0}),
    (1, {"lora_rank": 16}),
]


@pytest.mark.parametrize(("phase", "given"), CASES)
def test_the_peak_of_a_step_is_within_2_percent_of_the_allocators_events(phase, given):
    args = training_options(phase, **given)
    real = RealStep(args)
    real.take()  # torch sets up its kernels
    measured = real.state_bytes + peak_bytes(real.take)
    estimated = record_training(args, build_models(args, CONFIGS), CONFIGS, BUCKET, "cpu", step_only=True)[STEP].peak()
    assert sum(estimated.values()) == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("phase", [1, 2])
def test_flops_equal_those_of_flop_counter_mode(phase, monkeypatch):
    args = training_options(phase)
    # Its counter has no formula for the CPU's attention.
    real = RealStep(args)
    with FlopCounterMode(display=False) as counter:
        real.take()
    on_cpu = record_training(args, build_models(args, CONFIGS), CONFIGS, BUCKET, "cpu", step_only=True)[STEP].flops
    assert sum(on_cpu.values()) == counter.get_total_flops()
    # It sees the fake device's operators if none is left out because its result is known.
    monkeypatch.setattr(tracker, "_makes_new_tensors", lambda func: False)
    with FlopCounterMode(display=False) as counter:
        flops = record_training(args, build_models(args, CONFIGS), CONFIGS, BUCKET, "cuda", step_only=True)[STEP].flops
    assert sum(flops.values()) == counter.get_total_flops()
    assert sum(count for (_, what), count in flops.items() if what == LINEAR) == sum(on_cpu.values())


@pytest.mark.parametrize("phase", [1, 2])
def test_results_that_are_known_already_change_no_figure(phase, monkeypatch):
    args = training_options(phase, gradient_accumulation_steps=2)

    def recording():
        return record_training(args, build_models(args, CONFIGS), CONFIGS, BUCKET, "cuda", step_only=True)[STEP]

    known = recording()
    monkeypatch.setattr(tracker, "_makes_new_tensors", lambda func: False)
    assert (recording().peak(), recording().flops) == (known.peak(), known.flops)


def test_eight_bit_states_have_the_sizes_of_bitsandbytes():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in ((64, 64), (100, 41), (7,))]
    settings = {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 0.0, "eps": 1e-8}
    theirs, ours = bitsandbytes.optim.AdamW8bit(parameters, **settings), EightBitStates(parameters, **settings)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    theirs.step()
    ours.step()

    def sizes(optimizer, parameter):
        states = {name: value for name, value in optimizer.state[parameter].items() if torch.is_tensor(value)}
        return {name: value.nbytes for name, value in states.items() if not name.startswith("qmap")}

    for parameter in parameters:
        assert sizes(ours, parameter) == sizes(theirs, parameter)


@pytest.mark.parametrize(
    ("phase", "given"),
    [
        (1, {"gradient_accumulation_steps": 2}),
        (1, {"step_in_backward": True, "max_grad_norm": 0.0}),
        (2, {"adversarial_weight": 0.1, "ema_decay": 0.9, "gradient_checkpointing": "selective"}),
        (2, {"offload_backbone": True, "ffn_chunks": 2, "weight_storage": "bf16"}),
        (1, {"lora_rank": 16, "gradient_checkpointing": "selective"}),
        (1, {"lora_rank": 16, "offload_backbone": True}),
    ],
)
def test_a_real_step_with_random_weights_trains_and_has_the_estimated_peak(phase, given):
    """`--measure` takes it on a GPU; --offload_backbone moves nothing on the CPU, where all memory is one."""
    args = training_options(phase, **given)
    torch.manual_seed(0)
    step = measure.RealStep(args, CONFIGS, BUCKET, CPU)
    step.take()
    before = [parameter.clone() for parameter in step.state.trainable]
    peak = peak_bytes(step.take)
    after = step.state.trainable
    assert all(parameter.isfinite().all() for parameter in after)
    assert not all(torch.equal(ours, theirs) for ours, theirs in zip(before, after))
    if given.get("offload_backbone"):
        return
    recordings = record_training(args, build_models(args, CONFIGS), CONFIGS, BUCKET, "cpu")
    state = sum(recordings[SAVING].peak().values()) - recordings[SAVING].peak()[TEMPORARY]
    estimated = sum(recordings[STEP].peak().values()) - state
    assert peak == pytest.approx(estimated, rel=0.02)
