"""One training step of each phase on fake CUDA tensors, at the real width, on a machine without a GPU.

Fake tensors have a device, a dtype and a shape but no memory. So six of the 1.3B model's 30 blocks, which are all
alike, run a whole step (forward under bf16 autocast, checkpointed backward, clipping, AdamW) at 480x832x81 within
seconds. Whole commands, with true values but tiny models, run on the device of `tests.helpers.simulated_device`.

A CPU-only torch refuses CUDA devices in autograd and autocast. A small library with an empty device guard makes it
accept them. The library must be loaded before torch is imported, so this module runs in a separate process:

    python -m tests.helpers.fake_cuda phase1 phase2

For each phase one line of JSON is printed: properties of the step's results, and the most bytes that the step had
on the device.
"""

import ctypes
import importlib.util
import json
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

SHIM = r"""
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace at {
// The registry looks a class of exactly this name up.
struct CUDAHooks : public CUDAHooksInterface {
  CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  int getNumGPUs() const override { return 1; }
};
using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks);
}  // namespace at

namespace {
using namespace c10;
struct Guard final : public c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device device() const { return Device(DeviceType::CUDA, 0); }
  Stream stream() const { return Stream(Stream::DEFAULT, device()); }
  Device exchangeDevice(Device) const override { return device(); }
  Device getDevice() const override { return device(); }
  Stream getStream(Device) const noexcept override { return stream(); }
  Stream getDefaultStream(Device) const override { return stream(); }
  Stream getNewStream(Device, int) const override { return stream(); }
  Stream exchangeStream(Stream) const noexcept override { return stream(); }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);
}  // namespace
"""

WAN_1_3B = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
NUM_LAYERS, CONTROL_LAYERS = 6, 3
FRAMES, HEIGHT, WIDTH, BATCH_SIZE = 81, 480, 832, 2


def torch_folder():
    """Return torch's folder without importing torch."""
    return Path(importlib.util.find_spec("torch").origin).parent


def build_shim(folder):
    """Compile the shim with g++ (some seconds) into `folder` and return its path, without importing torch."""
    code, shim, torch_root = Path(folder) / "fake_cuda.cpp", Path(folder) / "libfake_cuda.so", torch_folder()
    code.write_text(SHIM)
    command = ["g++", "-O0", "-std=c++20", "-shared", "-fPIC", f"-I{torch_root}/include", str(code)]
    subprocess.run([*command, "-o", str(shim), f"-L{torch_root}/lib", "-lc10", "-ltorch_cpu"], check=True)
    return shim


def load_shim(shim):
    """Make the torch that this process imports next accept CUDA devices."""
    for library in (torch_folder() / "lib/libc10.so", torch_folder() / "lib/libtorch_cpu.so", shim):
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def replace_tensors(module, fn, recurse=True):
    """Replace `Module._apply`, which swaps tensors in place, where fake tensors need new parameters."""
    import torch

    for child in module.children() if recurse else ():
        child._apply(fn)  # also where a module has its own
    for name, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[name] = torch.nn.Parameter(fn(parameter.detach()), parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = fn(buffer)
    return module


@contextmanager
def fake_cuda():
    """Make every new tensor fake inside the context, with CUDA autocast and flash attention as on a GPU."""
    import torch
    import torch.nn.functional as F
    from torch._subclasses.fake_tensor import FakeTensorMode

    from c2r.estimation.fake_device import FusedRMSNorm

    def flash_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **options):
        # A CPU build would choose the kernel that stores all N x N scores, and promote dtypes unlike CUDA.
        assert attn_mask is None
        if torch.is_autocast_enabled("cuda"):
            query, key, value = (tensor.to(torch.get_autocast_dtype("cuda")) for tensor in (query, key, value))
        assert query.dtype == key.dtype == value.dtype == torch.bfloat16, "flash attention needs half precision"
        return torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, scale=scale
        )[0]

    def fused_rms_norm(hidden_states, normalized_shape, weight, eps=None):
        # CUDA has a fused kernel, for which autocast casts to fp32. The CPU's keeps more for the backward pass.
        if torch.is_autocast_enabled("cuda"):
            hidden_states, weight = hidden_states.float(), weight.float()
        return FusedRMSNorm.apply(hidden_states, weight)

    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda *args, **options: True
    F.scaled_dot_product_attention = flash_attention
    torch.nn.functional.rms_norm = fused_rms_norm
    torch.nn.Module._apply = replace_tensors
    with FakeTensorMode():
        yield


def peak_of(function, *kept):
    """Run a function on fake CUDA tensors; return its result and the most bytes on the device at a time.

    Args:
        function: takes no arguments.
        kept: tensors that are on the device before.
    """
    import weakref

    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    alive, now, most = set(), 0, 0

    def add(tensor):
        nonlocal now, most
        storage = tensor.untyped_storage()
        if tensor.device.type == "cuda" and storage._cdata not in alive:
            num_bytes = -(-storage.nbytes() // 512) * 512
            alive.add(storage._cdata)
            weakref.finalize(storage, remove, storage._cdata, num_bytes).atexit = False
            now += num_bytes
            most = max(most, now)

    def remove(address, num_bytes):
        nonlocal now
        alive.remove(address)
        now -= num_bytes

    class Peak(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            import torch

            result = func(*args, **kwargs or {})
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor):
                    add(leaf)
            return result

    for tensor in kept:
        add(tensor)
    with Peak():
        return function(), most


def to_bf16(model):
    """Cast parameters as `from_pretrained(torch_dtype=torch.bfloat16)` does: buffers and some modules stay in fp32."""
    import torch

    keep = set(getattr(model, "_keep_in_fp32_modules", None) or [])
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not keep.intersection([*path.split("."), name]):
                setattr(module, name, torch.nn.Parameter(parameter.detach().bfloat16()))
    return model


def phase1_model():
    """Return the bare backbone: fp32, checkpointed, on the CPU."""
    from diffusers import WanTransformer3DModel

    from c2r.models.attention import use_lean_attention

    transformer = WanTransformer3DModel(**WAN_1_3B | {"num_layers": NUM_LAYERS}).train()
    use_lean_attention(transformer)
    transformer.enable_gradient_checkpointing()
    return transformer


def phase2_models():
    """Return the joined model with adversary (bf16 backbone, the rest fp32) and DINOv3 ViT-B in bf16, on the CPU."""
    from diffusers import WanTransformer3DModel
    from transformers import DINOv3ViTConfig, DINOv3ViTModel
    from transformers.initialization import no_init_weights

    from c2r.estimation.configs import DINOV3_VITB
    from c2r.models.adversary import DomainClassifier, WithAdversary
    from c2r.models.attention import use_lean_attention
    from c2r.models.controlnet import C2RControlNet
    from c2r.models.dinov3 import DINOv3FeatureExtractor
    from c2r.models.transformer import C2RTransformer

    transformer = to_bf16(WanTransformer3DModel(**WAN_1_3B | {"num_layers": NUM_LAYERS}))
    controlnet = C2RControlNet.from_transformer(transformer, CONTROL_LAYERS)
    model = WithAdversary(C2RTransformer(transformer, controlnet), DomainClassifier()).train()
    use_lean_attention(model)
    model.enable_gradient_checkpointing()
    with no_init_weights():  # drawing from a truncated normal reads values, which fake tensors do not have
        dinov3 = DINOv3ViTModel(DINOv3ViTConfig(**DINOV3_VITB))
    return model, DINOv3FeatureExtractor(
        to_bf16(dinov3), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), chunk_size=FRAMES
    )


def data_batch():
    """Return a batch as of the data loader, on the CPU."""
    import torch

    latents = (BATCH_SIZE, 16, (FRAMES - 1) // 4 + 1, HEIGHT // 8, WIDTH // 8)
    return {
        "latents_mean": torch.randn(latents),
        "latents_logvar": torch.randn(latents),
        "prompt_embeds": torch.randn(BATCH_SIZE, 512, 4096),
        "domain": torch.tensor([0, 1]),
        "control_frames": torch.randint(0, 256, (BATCH_SIZE, FRAMES, 3, HEIGHT, WIDTH), dtype=torch.uint8),
    }


def training_step(model, dinov3, optimizer, batch, device):
    """Train on one micro-batch with one optimizer step, as the scripts' loops do; return the loss.

    Args:
        model: `WithAdversary`, or with `dinov3` None the bare backbone of phase 1.
        batch: see `data_batch`.
    """
    import torch

    from c2r.flow_matching import SigmaDensity, velocity_loss
    from c2r.models.adversary import domain_loss
    from c2r.training.batches import Draw
    from c2r.training.step import NoiseSettings, domain_weights, make_noisy_batch

    settings = NoiseSettings(seed=0, density=SigmaDensity(), prompt_dropout=0.1, control_dropout=0.1)
    noisy = make_noisy_batch(batch, settings, Draw([0, 1], 0, 2), torch.zeros(512, 4096), device)
    inputs = [noisy.noisy_latents, noisy.timesteps, noisy.prompt_embeds]
    if dinov3 is not None:
        control_features = dinov3(batch["control_frames"].to(device).float() / 255)
        control_features[noisy.dropped_control] = 0
        inputs.append(control_features)
    domains = batch["domain"].to(device)
    with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
        output = model(*inputs) if dinov3 is None else model(*inputs, reversal_strength=0.1 * domains)
    losses = noisy.weights * velocity_loss(output.sample, noisy.velocity_target)
    loss = (domain_weights(domains, 2.0, cg_ratio=0.2) * losses).mean()
    if dinov3 is not None:
        loss = loss + domain_loss(output.domain_logits, domains, ~noisy.dropped_control, cg_ratio=0.2).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    return loss


def run(phase):
    """Run one step of a phase; return devices, dtypes and sizes of its results."""
    import torch

    from c2r.training.precision import disable_autocast

    device = torch.device("cuda")
    model, dinov3 = (phase1_model(), None) if phase == "phase1" else phase2_models()
    model.to(device)
    if dinov3 is not None:
        dinov3.to(device)
    backbone = model if dinov3 is None else model.transformer
    disable_autocast(backbone.condition_embedder.time_embedder, device)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-5, fused=True)
    for parameter in trainable:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    kept = [*model.parameters(), *model.buffers(), *([] if dinov3 is None else dinov3.parameters())]
    kept += [value for state in optimizer.state.values() for value in state.values()]
    batch = data_batch()
    loss, peak = peak_of(lambda: training_step(model, dinov3, optimizer, batch, device), *kept)
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    states = [value for state in optimizer.state.values() for value in state.values()]
    return {
        "loss": [str(loss.device), str(loss.dtype), list(loss.shape)],
        "peak": peak,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trainable": sum(parameter.numel() for parameter in trainable),
        "with_gradient": sum(grad.numel() for grad in grads),
        "gradients": sorted({f"{grad.device} {grad.dtype}" for grad in grads}),
        "optimizer": sorted({f"{state.device} {state.dtype}" for state in states}),
        "model": sorted({str(tensor.device) for tensor in [*model.parameters(), *model.buffers()]}),
    }


def main():
    with tempfile.TemporaryDirectory() as folder:
        load_shim(build_shim(folder))
    with fake_cuda():  # once: DINOv3 caches a tensor, which another fake mode could not use
        for phase in sys.argv[1:]:
            print(json.dumps(run(phase)), flush=True)


if __name__ == "__main__":
    main()
