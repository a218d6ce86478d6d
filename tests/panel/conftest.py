"""Models of both phases, and a panel that has loaded those of phase 2."""

import socket

import pytest
import torch

from c2r import cli
from c2r.data.video_writer import write_video
from c2r.models.backbone import load_transformer
from c2r.models.lora import LoraWeights, save_lora
from c2r.options import APP, GENERATE
from c2r.panel.model import check_model, load_panel
from tests.helpers.panel import noise
from tests.helpers.trained import FPS, save_trained_models


@pytest.fixture(scope="package")
def models(tmp_path_factory):
    """Folders of both phases, coarse.mp4, and a LoRA: loras/style.safetensors."""
    folder = tmp_path_factory.mktemp("models")
    write_video(folder / "coarse.mp4", noise(0), FPS)
    save_trained_models(folder)
    lora = LoraWeights.from_config(LoraWeights.config_of(load_transformer(folder / "base").config, 3))
    for parameter in lora.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(4))
    (folder / "loras").mkdir()
    save_lora(folder / "loras/style.safetensors", lora, comfyui=True)
    return folder


@pytest.fixture(scope="package")
def loaded(models):
    """The function that loads a phase: (phase, folder, *options) to its panel."""

    def load(phase, folder, *options):
        args = cli.parse(APP, [f"--model={models}/phase{phase}/best", *options])
        given = {name: value for name, value in vars(args).items() if name in GENERATE.options}
        contract, dtype = check_model(args, "cpu")
        return load_panel(args, given, contract, folder, "cpu", dtype)

    return load


@pytest.fixture(scope="package")
def panel(models, loaded, tmp_path_factory):
    """Phase 2, loaded."""
    folder = tmp_path_factory.mktemp("panel")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", f"{folder}/page")
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        yield loaded(2, folder, f"--port={port}", f"--lora_dir={models}/loras")
