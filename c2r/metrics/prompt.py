"""Agreement of a video with its prompt, by CLIP."""

import torch
from torch.nn import functional as F
from transformers import AutoTokenizer, CLIPModel

from c2r.files import library_errors_as_input, read_json
from c2r.metrics.clip import EvaluatedClip
from c2r.metrics.metric import Against
from c2r.metrics.networks import chunks, cover_and_crop, load_network, normalise, read_preprocessor
from c2r.models.hub import refuse_entries

CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


class ClipSimilarity:
    """Mean cosine of CLIP's features of the frames and of the prompt; `clip_similarity`.

    In [−1, 1]; values of matching pairs are usually near 0.3, so only differences count. CLIP reads 77 tokens: the
    rest of a longer prompt does not matter. As CLIP's own preparation, frames are cropped to a square.

    Args:
        name_or_path: a folder or hub name of a CLIP with its tokenizer.
        device: where it runs.

    Raises:
        InputError: it cannot be loaded.

    Source: Radford et al. 2021 (arXiv 2103.00020); CLIPScore of Hessel et al. 2021 (arXiv 2104.08718) is 2.5 times it.
    """

    name = "clip_similarity"
    higher_is_better: bool | None = True
    against: Against = "prompt"
    unit = "cosine"
    bounds = (-1.0, 1.0)

    def __init__(self, name_or_path: str, device: torch.device | str):
        self.model, folder = load_network(name_or_path, {"clip": CLIPModel}, device)
        self.preprocessor = read_preprocessor(folder)
        path = folder / "tokenizer_config.json"
        refuse_entries(path, read_json(path))
        with library_errors_as_input(path):
            self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)

    @torch.no_grad()
    def __call__(self, clip: EvaluatedClip) -> float | None:
        if not clip.prompt.strip():
            return None
        text = self.model.get_text_features(**self._tokenize(clip.prompt)).pooler_output  # (1, D)
        similarities = []
        for frames in chunks(clip.video, self.model.device):
            frames = cover_and_crop(frames, self.model.config.vision_config.image_size)
            pixel_values = normalise(frames, self.preprocessor, CLIP_MEAN, CLIP_STD)
            images = self.model.get_image_features(pixel_values=pixel_values).pooler_output  # (n, D)
            similarities.append(F.cosine_similarity(images, text))
        return torch.cat(similarities).mean().item()

    def _tokenize(self, prompt):
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer([prompt], truncation=True, max_length=length, return_tensors="pt")
        return {name: tokens[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
