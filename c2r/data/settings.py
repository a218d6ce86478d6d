"""Settings of the data stage, shared by reading, encoding and training."""

from dataclasses import dataclass
from pathlib import Path

from c2r.data.buckets import Bucket


@dataclass(frozen=True)
class ClipSettings:
    """Settings for cutting files into clips, encoding these and caching the result."""

    buckets: tuple[Bucket, ...]
    fps: float  #: frames per second that clips are resampled to
    base_model: str  #: the Wan pipeline whose VAE and text encoder encode: a folder or hub name
    vae_dtype: str = "fp32"  #: dtype in which the VAE encodes: "fp32" or "bf16"
    sequence_fps: float | None = None  #: rate of image sequences whose row has no fps
    cache_dir: Path | None = None  #: None: .c2r_cache in each dataset's folder
    max_dropped: float | None = None  #: largest share of a dataset's rows that may be dropped; None: any
    video_cache_gb: float = 50.0  #: bound of the videos kept from remote datasets, in units of 1e9 bytes
    num_workers: int = 0  #: data loader workers per process

    def cache_folder(self, dataset_folder: str | Path) -> Path:
        """Return the folder that caches what is made from a dataset."""
        return self.cache_dir or Path(dataset_folder) / ".c2r_cache"
