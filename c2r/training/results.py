"""Save best/ and final/, the folders that a phase hands to the next one and to generation."""

import math
from pathlib import Path
from typing import Any

from c2r.bars import slow_work
from c2r.data.mixture import Mixture
from c2r.models.contract import PhaseContract, save_phase
from c2r.training.failing_together import failing_together
from c2r.training.run import Run, TrainState
from c2r.training.split_weights import gathered_state_dict


def save_model(run: Run, state: TrainState, name: str, phase: int, mixtures: list[Mixture], **more: Any):
    """Save the trained weights with their contract. Call it on every process.

    Args:
        run, state: the script's. The weights are those that the model holds now, averaged or not.
        name: "best" or "final".
        phase: 1 or 2.
        mixtures: the mixtures that were trained on.
        more: further entries of the contract of phase 2 or of a LoRA, see `PhaseContract`.

    Raises:
        InputError: no room or no permission to write.
    """
    folder = Path(run.args.output_dir) / name
    main = run.accelerator.is_main_process
    with slow_work(f"gathering the weights of {name}/", main):
        weights = gathered_state_dict(run.accelerator, state.trainable, state.optimizer)
    with failing_together(run.accelerator, folder), slow_work(f"writing {name}/", main):
        if main:
            progress = run.progress
            contract = PhaseContract(
                phase=phase,
                base_model=run.args.pretrained_model_name_or_path,
                step=progress.global_step,
                validation_loss=progress.metrics.get("loss"),
                metrics=progress.metrics | progress.cg_look,
                dataset_fingerprints={mixture.domain: mixture.fingerprint for mixture in mixtures},
                num_clips={mixture.domain: len(mixture.train) for mixture in mixtures},
                **max(run.settings.buckets, key=math.prod)._asdict(),
                fps=run.args.fps,
                flow_shift=run.args.flow_shift,
                **more,
            )
            save_phase(folder, state.trainable, contract, weights)
