"""A model's validation, kept beside its videos: a command that continues need not validate again."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from typing_extensions import TypedDict

from c2r import InputError, __version__
from c2r.encoding.cache import CacheSettings, encoder_fingerprint
from c2r.files import digest, read_json, write_atomic
from c2r.models.hub import resolve_model_folder
from c2r.scoring.models import Model
from c2r.scoring.run_datasets import ModelLosses, RunDatasets
from c2r.scoring.videos import videos_folder


class _Content(TypedDict):
    """The entries of the file."""

    key: str
    losses: ModelLosses


@dataclass(frozen=True)
class LossesFile:
    """The file that keeps the validation of a model.

    Attributes:
        path: the file.
        key: digest of all that the validation depends on.
    """

    path: Path
    key: str

    def read(self) -> ModelLosses | None:
        """Return the validation that was made from this key; None if there is none, or the file is damaged."""
        try:
            content = read_json(self.path, _Content)
        except InputError:
            return None
        return content["losses"] if content["key"] == self.key else None

    def write(self, losses: ModelLosses) -> None:
        """Write a finished validation, in place of an earlier one."""
        write_atomic(self.path, json.dumps({"key": self.key, "losses": asdict(losses)}).encode())


def losses_file(model: Model, datasets: RunDatasets) -> LossesFile:
    """Return the file that keeps the validation of a model on datasets."""
    args, phase = model.args, model.contract.phase
    conditions = datasets.conditions(phase, *model.trained_with)
    # The contract is in the model's fingerprint, and names those of the weights and of the backbone.
    models = [encoder_fingerprint(Path(args.model)), model.other_backbone, str(model.dtype), args.attention_backend]
    if phase == 2:
        models.append(encoder_fingerprint(resolve_model_folder(args.dinov3)))
    clips = [conditions.setting, conditions.domains, asdict(CacheSettings.of(datasets.settings))]
    path = videos_folder(Path(args.output_dir), args.model) / ".validation.json"
    return LossesFile(path, digest([__version__, *models, *clips]))
