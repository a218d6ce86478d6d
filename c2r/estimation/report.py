"""An estimate in numbers, and as text."""

from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from c2r.data.buckets import Bucket
from c2r.estimation.configs import ModelConfigs
from c2r.estimation.engines import (
    ADAPTER,
    DEVICES_OF_A_MACHINE,
    ENGINE,
    NVLINK,
    Communication,
    Sizes,
    bytes_of,
    communication_of,
    num_bytes,
    split_by,
)
from c2r.estimation.stages import (
    GENERATION,
    STEP,
    TEXT_ENCODING,
    VAE_ENCODING,
    record_generation,
    record_text_encoding,
    record_training,
    record_vae_encoding,
)
from c2r.estimation.step import build_models
from c2r.estimation.tracker import ATTENTION, BACKWARD, FORWARD, KINDS, LINEAR, RECOMPUTATION
from c2r.training.checkpoint import checkpoint_bytes
from c2r.units import GIB, duration_text, size_text


@dataclass(frozen=True)
class Estimate:
    """The memory, the FLOPs and the disk space of a run on one device."""

    peaks: dict[str, dict[str, float]]  #: {stage: {kind: bytes at its peak}}, in the order of a run
    flops: Counter[tuple[str, str]]  #: of a micro-step by (pass, LINEAR or ATTENTION)
    checkpoint: int  #: bytes
    exported: int  #: bytes of best/ and of final/
    host: float  #: bytes on the host in training, over all processes: what offloading moves there
    communication: Communication
    streams_text_encoder: bool = False  #: in the stage of encoding prompts, which would be the largest otherwise

    @property
    def largest(self) -> str:
        """The stage with the highest peak."""
        return max(self.peaks, key=self.total)

    def total(self, stage: str) -> float:
        """Return the bytes at the peak of a stage."""
        return sum(self.peaks[stage].values())


def estimate_run(
    args: Namespace,
    configs: ModelConfigs,
    bucket: Bucket,
    *,
    device_type: str = "cuda",
    engine: str = "single_gpu",
    num_processes: int = 1,
    step_only: bool = False,
    cpu_offload: bool = False,
    vae_tiling: bool = False,
) -> Estimate:
    """Compute what a run takes on one device, by running it on the fake device.

    Args:
        args: options of a training script; with `control_layers` they are phase 2's.
        configs: of the models.
        bucket: largest size of its clips.
        device_type: "cuda" or "cpu".
        engine: one of `c2r.options.ENGINES`.
        num_processes: number of devices.
        step_only: leave out all stages but the training step.
        cpu_offload, vae_tiling: options of `c2r.generate`.

    Raises:
        InputError: the backbone has too few blocks for the control branch.
    """
    models = build_models(args, configs)
    peaks: dict[str, dict[str, float]] = {}
    streamed = False
    if not step_only:
        peaks[TEXT_ENCODING] = {}
        peaks[VAE_ENCODING] = record_vae_encoding(configs, bucket, device_type).peak()
    recordings = record_training(args, models, configs, bucket, device_type, step_only=step_only)
    sizes = Sizes.of(models.model)  # now: the optimizer has chosen how weights are stored
    split = split_by(engine, num_processes, sizes, num_bytes(models.dinov3) if models.dinov3 else 0)
    peaks |= {stage: split.peak(recording) for stage, recording in recordings.items()}
    if not step_only:
        control = (args.control_layers, args.control_stride, args.injection) if models.has_control else None
        peaks[GENERATION] = record_generation(
            configs, bucket, device_type, control=control, cpu_offload=cpu_offload, vae_tiling=vae_tiling
        ).peak()
        # On a device that is just large enough for the other stages, as `load_text_encoder` chooses there.
        whole_text_encoder = record_text_encoding(configs, device_type).peak()
        streamed = sum(whole_text_encoder.values()) > max(sum(peak.values()) for peak in peaks.values())
        peaks[TEXT_ENCODING] = (
            record_text_encoding(configs, device_type, streamed=True).peak() if streamed else whole_text_encoder
        )
    kept_back = sum(bytes_of(tensor) for tensor in models.model.parameters() if not tensor.is_meta)
    host = split.host + num_processes * (kept_back + recordings[STEP].host_peak())
    if engine == "deepspeed_zero3_offload" and args.ema_decay is not None:
        host += 4 * sizes.count
    return Estimate(
        peaks,
        recordings[STEP].flops,
        checkpoint=checkpoint_bytes(sizes.count, args),
        exported=4 * sizes.count,
        host=host,
        communication=communication_of(engine, num_processes, sizes, args.gradient_accumulation_steps),
        streams_text_encoder=streamed,
    )


def memory_table(estimate: Estimate) -> Iterator[str]:
    """Yield the lines of a table of all stages, in GiB."""
    kinds = [kind for kind in (*KINDS, ENGINE) if any(peak.get(kind) for peak in estimate.peaks.values())]
    heads = ["GiB at the peak of", *kinds, "in all"]
    rows = [
        [stage, *(f"{peak.get(kind, 0) / GIB:.2f}" for kind in kinds), f"{estimate.total(stage) / GIB:.2f}"]
        for stage, peak in estimate.peaks.items()
    ]
    yield from _table([heads, *rows])


def flops_table(estimate: Estimate) -> Iterator[str]:
    """Yield the lines of a table of a micro-step's FLOPs, in 10^12."""
    passes = [name for name in (FORWARD, RECOMPUTATION, BACKWARD) if any(key[0] == name for key in estimate.flops)]
    rows = [["TFLOP of a micro-step", LINEAR, ATTENTION, "in all"]]
    for name in passes:
        numbers = [estimate.flops[name, what] for what in (LINEAR, ATTENTION)]
        rows.append([name, *(f"{number / 1e12:.4g}" for number in (*numbers, sum(numbers)))])
    totals = [sum(estimate.flops[name, what] for name in passes) for what in (LINEAR, ATTENTION)]
    rows.append(["in all", *(f"{number / 1e12:.4g}" for number in (*totals, sum(totals)))])
    yield from _table(rows)


def _table(rows):
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]
        yield "  ".join(cells).rstrip()


def other_lines(args: Namespace, estimate: Estimate, tflops: float | None) -> Iterator[str]:
    """Yield lines on the largest stage, the time at a rate of `tflops` · 10^12 FLOPs a second, disk and host."""
    largest = estimate.largest
    yield f"largest: {largest}, {estimate.total(largest) / GIB:.1f} GiB allocated; a card shows 1 to 3 GiB more"
    if estimate.streams_text_encoder:
        yield (
            f"{TEXT_ENCODING}: the text encoder's blocks are copied to the device one at a time, as on a device that "
            "is too small for all of them"
        )
    moved = estimate.communication
    if tflops is not None:
        seconds = args.gradient_accumulation_steps * sum(estimate.flops.values()) / (tflops * 1e12)
        run = seconds * args.max_train_steps
        line = (
            f"time: {seconds:.3g} s a step of {args.gradient_accumulation_steps} micro-steps at {tflops:g} TFLOP/s, "
            f"{duration_text(run)} for {args.max_train_steps:,} steps"
        )
        if moved.num_processes > 1:
            line += f", {moved.num_processes * run / 3600:,.0f} GPU hours"
        yield f"{line}, without encoding, DINOv3, validation and communication"
    if moved.num_processes > 1:
        yield (
            f"communication: in a step each device collects {moved.gathered / 1e9:.1f} GB of weights and the devices "
            f"sum {moved.reduced / 1e9:.1f} GB of gradients, of which each receives {moved.received / 1e9:.1f} GB; "
            f"{moved.nvlink_seconds:.2f} s over NVLink at {NVLINK / 1e9:g} GB/s"
        )
    if moved.num_processes > DEVICES_OF_A_MACHINE:
        yield (
            f"network: {moved.network_seconds(1):.2f} s between machines of {DEVICES_OF_A_MACHINE} devices with one "
            f"adapter of 400 Gb/s ({ADAPTER / 1e9:g} GB/s) each, {moved.network_seconds(DEVICES_OF_A_MACHINE):.2f} s "
            f"with {DEVICES_OF_A_MACHINE}; rates of links are those of their specifications"
        )
    yield (
        f"disk: {size_text(estimate.checkpoint)} a checkpoint, {size_text(estimate.exported)} for each of best/ and "
        "final/"
    )
    if estimate.host:
        yield f"host: {size_text(estimate.host)} for what is offloaded, over all processes"
