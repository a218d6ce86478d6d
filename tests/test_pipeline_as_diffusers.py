"""C2RPipeline has what Diffusers' tests expect of a pipeline: loading, saving, publishing, callbacks, batches."""

import base64
import json
import re
import shutil
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from diffusers.callbacks import PipelineCallback
from huggingface_hub.utils import filter_repo_objects
from PIL import Image

from c2r import InputError
from c2r.data.control_video import as_control_frames
from c2r.data.video_writer import write_video
from c2r.generate import main
from c2r.models import hub
from c2r.models.backbone import fingerprint_transformer
from c2r.models.contract import read_contract
from c2r.models.hub import fingerprint_files
from c2r.models.transformer import C2RTransformer
from c2r.pipeline import C2RPipeline
from tests.helpers.source import ROOT
from tests.helpers.tiny import PROMPT_LENGTH
from tests.helpers.trained import FPS, FRAMES, HEIGHT, WIDTH, save_trained_models

PROMPT = "the street with three people"
MODELS = ("text_encoder", "vae", "transformer", "dinov3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The trained models, samples of their run, and coarse.mp4."""
    folder = save_trained_models(tmp_path_factory.mktemp("trained"))
    for step in (20, 30, 40):
        (folder / f"phase2/samples/step-{step}").mkdir(parents=True)
        Image.new("RGB", (8, 8), (step, 0, 0)).save(folder / f"phase2/samples/step-{step}/sheet.png")
    write_video(folder / "coarse.mp4", np.random.default_rng(0).random((12, HEIGHT, WIDTH, 3)), FPS)
    return folder


@pytest.fixture(scope="module")
def loaded(folder):
    return quiet(C2RPipeline.from_pretrained(folder / "phase2/best"))


@pytest.fixture(scope="module")
def saved(loaded, tmp_path_factory):
    """The folder of the whole pipeline."""
    folder = tmp_path_factory.mktemp("saved") / "pipeline"
    loaded.save_pretrained(folder)
    return folder


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def control_video(seed=0):
    return torch.rand(FRAMES, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(seed))


def generate(pipeline, seed=0, **arguments):
    """Return the frames, by default the latents of a video of the trained size."""
    defaults = {"control_video": control_video(), "num_inference_steps": 3, "output_type": "latent"}
    defaults |= {"generator": torch.Generator().manual_seed(seed), "prompt": PROMPT}
    return pipeline(**defaults | arguments).frames


def weights(pipeline):
    """Return all weights of a pipeline by name."""
    models = {name: getattr(pipeline, name).state_dict() for name in MODELS}
    return {f"{name}.{key}": tensor for name, state in models.items() for key, tensor in state.items()}


def equal_weights(first, second):
    first, second = weights(first), weights(second)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# ------------------------------------------------------------------------------------------------------------- loading


def test_guidance_is_that_of_the_samples_of_training(loaded, monkeypatch):
    default = generate(loaded, guidance="cfg")
    expected = generate(loaded, guidance="cfg", guidance_scale=2.0, control_guidance_scale=1.5)
    trained = {"guidance": "cfg", "guidance_scale": 2.0, "control_guidance_scale": 1.5}
    monkeypatch.setattr(loaded, "contract", replace(loaded.contract, **trained))
    assert torch.equal(generate(loaded), expected)
    assert torch.equal(generate(loaded, guidance_scale=5.0, control_guidance_scale=1.0), default)
    monkeypatch.setattr(loaded, "contract", replace(loaded.contract, guidance="apg", control_guidance_scale=None))
    assert torch.equal(generate(loaded, guidance="cfg"), default)


def test_a_phase_2_folder_loads_whole_and_as_trained(folder, loaded):
    assert all(part is not None for name, part in loaded.components.items() if name != "transformer_2")
    assert not any(p.requires_grad for name in MODELS for p in getattr(loaded, name).parameters())
    assert loaded.scheduler.shift == 2.0
    assert loaded.contract == read_contract(folder / "phase2/best")
    latents = generate(loaded)
    assert torch.equal(latents, generate(loaded, conditioning_scale=0.9))
    assert not torch.equal(latents, generate(loaded, conditioning_scale=1.0))
    assert latents.shape[2:] == ((FRAMES - 1) // 4 + 1, HEIGHT // 8, WIDTH // 8)
    assert generate(loaded, control_video=None).shape == latents.shape


def test_weights_have_the_given_dtype_but_the_vae_stays_fp32(folder):
    pipeline = quiet(C2RPipeline.from_pretrained(folder / "phase2/best", torch_dtype=torch.bfloat16))
    assert {name: getattr(pipeline, name).dtype for name in MODELS} == dict.fromkeys(MODELS, torch.bfloat16) | {
        "vae": torch.float32
    }
    frames = generate(pipeline, output_type="np")
    assert np.isfinite(frames).all()


def test_a_phase_1_folder_loads_without_control(folder):
    pipeline = quiet(C2RPipeline.from_pretrained(folder / "phase1/best"))
    assert pipeline.dinov3 is None
    assert generate(pipeline, control_video=None).shape[0] == 1
    with pytest.raises(ValueError, match="no ControlNet and DINOv3"):
        generate(pipeline)


@pytest.mark.parametrize(
    ("moved", "keyword", "option"),
    [
        ("base", "base", "--pretrained_model_name_or_path"),
        ("phase1/best", "backbone", "--backbone"),
        ("dinov3", "dinov3", "--dinov3"),
    ],
)
def test_a_moved_model_is_named_with_its_keyword_and_option(folder, loaded, tmp_path, moved, keyword, option):
    copy = shutil.copytree(folder, tmp_path / "copy")
    shutil.move(copy / moved, tmp_path / "moved")
    with pytest.raises(InputError) as error:
        C2RPipeline.from_pretrained(copy / "phase2/best")
    assert str(copy / moved) in str(error.value)
    assert f"with {option} (in Python {keyword}=)" in str(error.value)
    with pytest.raises(InputError, match=f"with {option} "):
        main([f"--model={copy}/phase2/best", f"--control_video={folder}/coarse.mp4", "--prompt=a", "--output=a.mp4"])
    assert equal_weights(C2RPipeline.from_pretrained(copy / "phase2/best", **{keyword: tmp_path / "moved"}), loaded)


def test_another_backbone_is_refused(folder):
    with pytest.raises(InputError, match=r"not the backbone of .*in Python backbone="):
        C2RPipeline.from_pretrained(folder / "phase2/best", backbone=folder / "base")


def test_parts_are_replaced_or_left_out(folder, loaded):
    pipeline = C2RPipeline.from_pretrained(
        folder / "phase2/best", text_encoder=None, tokenizer=None, vae=loaded.vae, transformer=None, dinov3=None
    )
    assert pipeline.vae is loaded.vae
    assert [name for name in (*MODELS, "tokenizer") if getattr(pipeline, name) is None] == [
        *("text_encoder", "transformer", "dinov3", "tokenizer")
    ]


def test_of_a_hub_name_only_needed_parts_are_downloaded(saved, loaded, tmp_path, monkeypatch):
    patterns = []

    def download(name, allow_patterns, ignore_patterns):
        assert name == "me/street"
        patterns.append(allow_patterns)
        names = [str(path.relative_to(saved)) for path in saved.rglob("*") if path.is_file()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(saved / name, tmp_path / name)
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    pipeline = quiet(C2RPipeline.from_pretrained("me/street", text_encoder=None))
    assert pipeline.text_encoder is None
    assert not list(tmp_path.glob("text_encoder/*.safetensors"))
    with torch.no_grad():
        embeds, negative = loaded.encode_prompt(PROMPT)
    given = {"prompt": None, "prompt_embeds": embeds, "negative_prompt_embeds": negative}
    assert torch.equal(generate(pipeline, **given), generate(loaded))


def test_another_model_of_the_hub_is_refused_before_its_weights_are_downloaded(tmp_path, monkeypatch):
    def download(name, allow_patterns, ignore_patterns):
        assert allow_patterns == ["*.json"]
        (tmp_path / "config.json").write_text("{}")
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    with pytest.raises(InputError, match=r"me/other: has neither c2r\.json nor model_index\.json"):
        C2RPipeline.from_pretrained("me/other")


@pytest.mark.parametrize("keyword", ["custom_pipeline", "trust_remote_code", "variant", "revision"])
def test_keywords_that_would_change_what_is_read_are_refused(saved, keyword):
    with pytest.raises(TypeError, match=f"does not take {keyword}"):
        C2RPipeline.from_pretrained(saved, **{keyword: True})


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("_class_name", "WanImageToVideoPipeline", "its pipeline is WanImageToVideoPipeline"),
        ("_class_name", None, "its pipeline is None"),
        ("transformer_2", ["diffusers", "WanTransformer3DModel"], "a Wan 2.2 pipeline"),
        ("boundary_ratio", 0.9, "a Wan 2.2 pipeline"),
        ("expand_timesteps", True, "a Wan 2.2 pipeline"),
    ],
)
def test_pipelines_of_other_models_are_refused(saved, tmp_path, entry, value, message):
    copy = shutil.copytree(saved, tmp_path / "copy")
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {entry: value}))
    with pytest.raises(InputError, match=message):
        C2RPipeline.from_pretrained(copy)


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"_class_name": ["WanPipeline"]}', '{"_class_name": "C2RPipeline"']
)
@pytest.mark.parametrize("name", ["model_index.json", "c2r.json"])
def test_damaged_lists_are_one_line(saved, tmp_path, name, content):
    copy = shutil.copytree(saved, tmp_path / "copy")
    (copy / name).write_text(content)
    with pytest.raises(InputError) as error:
        C2RPipeline.from_pretrained(copy)
    assert str(copy / name) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("part", ["transformer", "controlnet", "vae", "text_encoder", "dinov3"])
def test_weights_are_never_read_from_a_pickle(saved, tmp_path, part):
    copy = shutil.copytree(saved, tmp_path / "copy")
    (file,) = (copy / part).glob("*.safetensors")
    torch.save({"a": torch.zeros(1)}, file.with_suffix(".bin"))
    file.unlink()
    with pytest.raises(InputError, match=f"{part}: has no safetensors weights"):
        C2RPipeline.from_pretrained(copy)


# -------------------------------------------------------------------------------------------------------------- saving


def test_a_saved_pipeline_loads_equal(loaded, saved):
    again = quiet(C2RPipeline.from_pretrained(saved))
    assert equal_weights(again, loaded)
    assert again.scheduler.config == loaded.scheduler.config
    assert again.tokenizer.get_vocab() == loaded.tokenizer.get_vocab()
    assert torch.equal(generate(again), generate(loaded))
    again.scheduler.register_to_config(shift=4.0)
    again.save_pretrained(saved.parent / "again")
    assert C2RPipeline.from_pretrained(saved.parent / "again").scheduler.config.shift == 4.0


def test_large_models_are_split_and_safetensors_is_the_only_format(loaded, tmp_path):
    loaded.save_pretrained(tmp_path / "split", safe_serialization=True, max_shard_size="20KB")
    for part in (*MODELS, "controlnet"):
        assert len(list((tmp_path / "split" / part).glob("*.safetensors"))) > 1
    assert equal_weights(C2RPipeline.from_pretrained(tmp_path / "split", use_safetensors=True), loaded)
    with pytest.raises(ValueError, match="safe_serialization is False"):
        loaded.save_pretrained(tmp_path / "pickle", safe_serialization=False)
    with pytest.raises(ValueError, match="use_safetensors is False"):
        C2RPipeline.from_pretrained(tmp_path / "split", use_safetensors=False)


def test_the_contract_of_a_saved_pipeline_names_its_own_parts(loaded, saved):
    contract = read_contract(saved)
    assert Path(contract.base_model) == saved
    assert (contract.backbone, contract.dinov3) == (str(saved / "transformer"), str(saved / "dinov3"))
    assert contract.backbone_sha256 == fingerprint_transformer(saved) == loaded.contract.backbone_sha256
    assert contract.weights_sha256 == fingerprint_files(saved / "controlnet") == loaded.contract.weights_sha256
    assert "/" not in json.dumps([json.loads((saved / "c2r.json").read_text())[e] for e in ("base_model",)])


def test_a_moved_pipeline_folder_and_another_dtype_keep_their_fingerprint(folder, saved, tmp_path):
    half = C2RPipeline.from_pretrained(saved, torch_dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    (tmp_path / "half").rename(tmp_path / "moved")
    again = C2RPipeline.from_pretrained(tmp_path / "moved", torch_dtype=torch.bfloat16)
    assert equal_weights(again, half)
    assert again.contract.backbone_sha256 != read_contract(saved).backbone_sha256


def test_the_command_generates_the_same_from_a_saved_pipeline(folder, saved, tmp_path):
    for name, model in (("phase", folder / "phase2/best"), ("pipeline", saved)):
        options = [f"--model={model}", f"--control_video={folder}/coarse.mp4", "--prompt=rain"]
        main([*options, f"--output={tmp_path}/{name}.mp4", "--num_inference_steps=2"])
    assert (tmp_path / "phase.mp4").read_bytes() == (tmp_path / "pipeline.mp4").read_bytes()


def test_a_stock_pipeline_loads_the_saved_folder_without_control(loaded, saved):
    stock = quiet(WanPipeline.from_pretrained(saved))
    arguments = {"guidance_scale": 5.0, "control_video": None, "negative_prompt": "rain"}
    expected = generate(loaded, **arguments, guidance="cfg")
    arguments |= {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES, "max_sequence_length": PROMPT_LENGTH}
    del arguments["control_video"]
    frames = stock(
        PROMPT, **arguments, num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="latent"
    ).frames
    torch.testing.assert_close(frames, expected, rtol=1e-4, atol=1e-4)


def test_parts_that_are_none_stay_none(loaded, tmp_path):
    for part in ("text_encoder", "dinov3"):
        parts = loaded.components | {part: None, "tokenizer": None}
        C2RPipeline(**parts).save_pretrained(tmp_path / part)
        again = C2RPipeline.from_pretrained(tmp_path / part)
        assert [name for name in (*MODELS, "tokenizer") if getattr(again, name) is None] == [part, "tokenizer"]
        assert again.contract is None
    assert isinstance(again.transformer, C2RTransformer)


def test_a_folder_with_files_is_not_overwritten(loaded, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="has files already; give a new folder"):
        loaded.save_pretrained(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_from_pipe_shares_the_parts_of_a_wan_pipeline(folder, loaded):
    stock = WanPipeline.from_pretrained(folder / "base", torch_dtype=torch.bfloat16)
    ours = quiet(C2RPipeline.from_pipe(stock))
    assert all(getattr(ours, name) is part for name, part in stock.components.items())
    assert ours.transformer.dtype == torch.bfloat16
    controlled = quiet(C2RPipeline.from_pipe(stock, transformer=loaded.transformer, dinov3=loaded.dinov3))
    assert generate(controlled).shape[0] == 1
    again = quiet(C2RPipeline.from_pipe(loaded))
    assert again.contract == loaded.contract
    assert torch.equal(generate(again), generate(loaded))


# ---------------------------------------------------------------------------------------------------------- publishing


class Hub(HTTPServer):
    """The calls of the hub that an upload makes; keeps the files of the commit."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _HubHandler)
        self.files, self.created = {}, None
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}"


class _HubHandler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        server = self.server
        if self.path == "/api/repos/create":
            server.created = json.loads(body)
            answer = {"url": f"{server.address}/me/street", "name": "me/street"}
        elif self.path.endswith("/preupload/main"):
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            answer = {"files": [file | {"shouldIgnore": False} for file in files]}
        elif "/commit/main" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            answer = {"commitUrl": f"{server.address}/me/street/commit/1", "commitOid": "1" * 40}
        else:  # /api/validate-yaml
            answer = {"errors": [], "warnings": []}
        self.answer(answer)

    def do_GET(self):
        self.answer({"id": "me/street", "sha": "0" * 40, "siblings": []})

    def answer(self, content):
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


def test_an_upload_has_all_files_and_a_card_that_loads_it(loaded, saved, tmp_path, monkeypatch):
    server = Hub()
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.address)
    try:
        with monkeypatch.context() as quantised:
            quantised.setattr(loaded.transformer.transformer, "hf_quantizer", "any", raising=False)
            with pytest.raises(InputError, match="quantised"):
                loaded.push_to_hub("street", token="hf_none")
            assert server.created is None
        loaded.push_to_hub("street", token="hf_none", private=True)
    finally:
        server.shutdown()
        server.server_close()
    assert (server.created["name"], server.created["visibility"]) == ("street", "private")
    assert set(server.files) == {str(path.relative_to(saved)) for path in saved.rglob("*") if path.is_file()}
    for name, data in server.files.items():
        path = tmp_path / "downloaded" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    assert equal_weights(C2RPipeline.from_pretrained(tmp_path / "downloaded"), loaded)
    assert 'C2RPipeline.from_pretrained("me/street", torch_dtype=torch.bfloat16)' in server.files["README.md"].decode()


def test_the_card_tells_of_the_run(saved):
    card = (saved / "README.md").read_text()
    for text in (
        "pipeline_tag: video-to-video",
        "| optimizer steps | 30 |",
        "| share of CG samples | 0.2 |",
        "| real | 40 | `ab12` |",
        "| cg | 12 | `cd34` |",
        "| validation loss | 0.4 |",
        "| control gain: loss with another clip's control minus loss | 0.0851 |",
        "![Samples](samples.png)",
        "## Licence",
    ):
        assert text in card
    assert str(saved.parents[1]) not in (saved / "c2r.json").read_text()
    assert Image.open(saved / "samples.png").getpixel((0, 0)) == (30, 0, 0)  # of the model's own step


def test_the_card_knows_the_licences_of_the_models_of_the_hub(loaded, saved, tmp_path, monkeypatch):
    names = {"base_model": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "dinov3": "facebook/dinov3-vitb16-pretrain-lvd1689m"}
    monkeypatch.setattr(loaded, "contract", replace(loaded.contract, **names))
    loaded.save_pretrained(tmp_path / "saved")
    assert read_contract(tmp_path / "saved").copied_from == names
    C2RPipeline.from_pretrained(tmp_path / "saved").save_pretrained(tmp_path / "again")
    for name in ("saved", "again"):
        card = (tmp_path / name / "README.md").read_text()
        assert "base_model: Wan-AI/Wan2.1-T2V-1.3B-Diffusers" in card
        assert "license: other" in card
        assert "DINOv3 License" in card


def test_a_relative_path_is_not_taken_for_a_hub_name(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder.parent)
    here = Path(folder.name)
    pipeline = C2RPipeline.from_pretrained(
        here / "phase2/best", base=here / "base", backbone=str(here / "phase1/best"), dinov3=str(here / "dinov3")
    )
    pipeline.save_pretrained(tmp_path / "saved")
    assert read_contract(tmp_path / "saved").copied_from == {}
    card = (tmp_path / "saved/README.md").read_text()
    assert "huggingface.co" not in card
    assert str(here) not in card


def test_nothing_of_replaced_parts_is_in_contract_and_card(folder, loaded, saved, tmp_path):
    as_trained = C2RPipeline.from_pretrained(saved)
    as_trained.contract = replace(as_trained.contract, copied_from={"base_model": "Wan-AI/Wan2.1", "dinov3": "a/b"})
    as_trained.save_pretrained(tmp_path / "copies")
    dinov3 = C2RPipeline.from_pretrained(tmp_path / "copies", dinov3=folder / "dinov3")
    transformer = C2RPipeline.from_pipe(as_trained, transformer=loaded.transformer)
    for name, pipeline, copies, has_data in (
        ("dinov3", dinov3, {"base_model": "Wan-AI/Wan2.1"}, True),
        ("transformer", transformer, as_trained.contract.copied_from, False),
        (
            "none",
            C2RPipeline.from_pretrained(tmp_path / "copies", text_encoder=None),
            transformer.contract.copied_from,
            True,
        ),
    ):
        pipeline.save_pretrained(tmp_path / name)
        card, contract = (tmp_path / name / "README.md").read_text(), read_contract(tmp_path / name)
        assert contract.copied_from == copies
        assert ("## Validation" in card) == ("samples.png" in card) == (name == "none")
        assert (contract.validation_loss is None) == (contract.metrics == {}) == (name != "none")
        assert ("## Data" in card) == has_data
        assert equal_weights(C2RPipeline.from_pretrained(tmp_path / name, text_encoder=loaded.text_encoder), loaded)


def python_of(text):
    """Return the one example of Python in a Markdown text."""
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return code


@pytest.mark.parametrize("where", ["README", "card"])
def test_the_python_of_readme_and_card_runs(folder, saved, tmp_path, monkeypatch, where):
    code = python_of((ROOT / "README.md" if where == "README" else saved / "README.md").read_text())
    assert len([line for line in code.splitlines() if line]) == 6
    for name, here in {"outputs/phase2/best": folder / "phase2/best", "coarse.mp4": folder / "coarse.mp4"}.items():
        assert name in code or where == "card"
        code = code.replace(name, str(here))
    monkeypatch.chdir(tmp_path)
    exec(code if torch.cuda.is_available() else code.replace('"cuda"', '"cpu"'), {})
    assert (tmp_path / "out.mp4").stat().st_size > 0


# ------------------------------------------------------------------------------------------------------------- calling


def test_a_callback_sees_each_step_and_its_tensors(loaded):
    seen = []

    def remember(pipeline, step, timestep, tensors):
        assert pipeline is loaded
        assert pipeline.current_timestep == timestep
        seen.append((step, sorted(tensors), tensors["latents"].clone()))
        return {}

    names = ["control_features", "latents", "negative_prompt_embeds", "prompt_embeds"]
    latents = generate(loaded, callback_on_step_end=remember, callback_on_step_end_tensor_inputs=names)
    assert [(step, found) for step, found, _ in seen] == [(step, names) for step in range(3)]
    assert torch.equal(seen[-1][2], latents)
    assert torch.equal(latents, generate(loaded))


@pytest.mark.parametrize("name", ["latents", "prompt_embeds", "negative_prompt_embeds", "control_features"])
def test_a_callback_changes_what_comes_next(loaded, name):
    def change(pipeline, step, timestep, tensors):
        return {name: tensors[name] * 0.5} if step == 0 else {}

    changed = generate(loaded, callback_on_step_end=change, callback_on_step_end_tensor_inputs=[name])
    assert not torch.equal(changed, generate(loaded))


def test_a_callback_of_diffusers_own_class_names_its_tensors(loaded):
    class Zero(PipelineCallback):
        tensor_inputs = ["latents"]  # noqa: RUF012 (diffusers' convention)

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            return {"latents": torch.zeros_like(callback_kwargs["latents"])}

    assert not generate(loaded, callback_on_step_end=Zero(cutoff_step_ratio=None, cutoff_step_index=2)).any()


def test_an_interrupted_call_ends_with_the_latents_so_far(loaded):
    steps = []

    def interrupt(pipeline, step, timestep, tensors):
        steps.append(tensors["latents"])
        pipeline._interrupt = step == 1
        return {}

    assert torch.equal(generate(loaded, callback_on_step_end=interrupt), steps[1])
    assert len(steps) == 2
    assert loaded.interrupt
    generate(loaded)
    assert not loaded.interrupt


def test_properties_tell_of_the_last_call(loaded):
    generate(loaded, guidance_scale=3.0)
    assert (loaded.guidance_scale, loaded.do_classifier_free_guidance, loaded.num_timesteps) == (3.0, True, 3)
    assert (loaded.current_timestep, loaded.interrupt, loaded.attention_kwargs) == (None, False, None)
    generate(loaded, guidance_scale=1.0)
    assert not loaded.do_classifier_free_guidance


def test_attention_kwargs_reach_the_backbone(loaded):
    seen = []
    handle = loaded.transformer.transformer.register_forward_pre_hook(
        lambda module, args, options: seen.append(options["attention_kwargs"]), with_kwargs=True
    )
    try:
        generate(loaded, attention_kwargs={"scale": 0.5}, num_inference_steps=1)
    finally:
        handle.remove()
    assert seen == [{"scale": 0.5}] * 2
    assert loaded.attention_kwargs == {"scale": 0.5}


def test_several_videos_of_each_prompt_agree_with_single_ones(loaded):
    prompts, videos = ["rain", "a red brick street"], [control_video(0), control_video(1)]
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    together = generate(
        loaded, prompt=prompts, control_video=videos, num_videos_per_prompt=2, generator=generators, guidance="cfg"
    )
    assert len(together) == 4
    for i in range(4):
        alone = generate(loaded, seed=i, prompt=prompts[i // 2], control_video=videos[i // 2], guidance="cfg")
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-3, atol=1e-3)
    embeds, negative = (tensor.detach() for tensor in loaded.encode_prompt(prompts))
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    of_embeds = generate(
        loaded,
        prompt=None,
        prompt_embeds=embeds,
        negative_prompt_embeds=negative,
        control_video=videos,
        num_videos_per_prompt=2,
        generator=generators,
        guidance="cfg",
    )
    assert torch.equal(of_embeds, together)


def test_frames_of_floats_are_written_as_rounded_bytes(tmp_path):
    frames = np.random.default_rng(0).random((3, HEIGHT, WIDTH, 3))
    write_video(tmp_path / "floats.mp4", frames, FPS)
    write_video(tmp_path / "bytes.mp4", (frames * 255).round().astype(np.uint8), FPS)
    assert (tmp_path / "floats.mp4").read_bytes() == (tmp_path / "bytes.mp4").read_bytes()
    for value in (-0.5, 1.5, np.nan):
        with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
            write_video(tmp_path / "bad.mp4", np.full_like(frames, value), FPS)


def test_output_types(loaded):
    shape = (1, FRAMES, HEIGHT, WIDTH, 3)
    array = generate(loaded, output_type="np")
    assert array.shape == shape
    pixels = generate(loaded, output_type="pt")
    np.testing.assert_array_equal(pixels.permute(0, 1, 3, 4, 2).numpy(), array)
    pictures = generate(loaded, output_type="pil")
    np.testing.assert_array_equal(np.stack(pictures[0]), (array[0] * 255).round().astype(np.uint8))
    arguments = {"num_inference_steps": 1, "output_type": "latent"}
    (frames,) = loaded(PROMPT, control_video(), return_dict=False, **arguments)
    assert frames.shape[0] == 1


def test_prompts_are_encoded_alike_alone_and_in_a_call(loaded):
    with torch.no_grad():
        first, negative = loaded.encode_prompt(PROMPT)
        second, _ = loaded.encode_prompt(PROMPT)
    assert first.shape[1] == PROMPT_LENGTH
    assert torch.equal(first, second)
    expected = generate(loaded)
    given = {"prompt": None, "prompt_embeds": first, "negative_prompt_embeds": negative}
    assert torch.equal(generate(loaded, **given), expected)
    short = generate(loaded, max_sequence_length=PROMPT_LENGTH - 4)
    assert not torch.equal(short, expected)  # padding is part of the prompt that attention sees


def test_offloading_knows_all_models_of_the_pipeline(loaded):
    modules = {name for name, part in loaded.components.items() if isinstance(part, torch.nn.Module)}
    assert set(C2RPipeline.model_cpu_offload_seq.split("->")) == modules == set(MODELS)


def group_offload(pipeline):
    cpu = torch.device("cpu")
    pipeline.enable_group_offload(cpu, offload_device=cpu, offload_type="block_level", num_blocks_per_group=1)


#: Others are in test_pipeline_switches.py.
SWITCHES = {
    "group offload in memory": group_offload,
    "tiled and sliced VAE": lambda pipeline: (pipeline.vae.enable_tiling(), pipeline.vae.enable_slicing()),
    "attention backend": lambda pipeline: pipeline.transformer.set_attention_backend("_native_math"),
}


@pytest.mark.parametrize("name", SWITCHES)
def test_switches_of_diffusers_leave_the_video_as_it_is(saved, loaded, name):
    pipeline = quiet(C2RPipeline.from_pretrained(saved))
    SWITCHES[name](pipeline)
    frames = generate(pipeline, output_type="pt")
    torch.testing.assert_close(frames, generate(loaded, output_type="pt"), rtol=0, atol=1e-3)


# ------------------------------------------------------------------------------------------------------- control video


def test_all_forms_of_a_control_video_agree(folder, loaded, tmp_path):
    size = {"num_frames": FRAMES, "height": HEIGHT, "width": WIDTH, "fps": FPS}
    video = as_control_frames(folder / "coarse.mp4", **size)
    assert video.shape == (1, FRAMES, 3, HEIGHT, WIDTH)
    array = (video[0] * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    pictures = [Image.fromarray(frame) for frame in array]
    for i, picture in enumerate(pictures):
        picture.save(tmp_path / f"a_{i:02d}.png")
    forms = [
        *(str(folder / "coarse.mp4"), tmp_path, tmp_path / "a_##.png", pictures, array, array / 255, array[None]),
        *(list(array), video[0], video, [video[0]], list(video[0]), (video[0] * 255).round().to(torch.uint8)),
    ]
    for form in forms:
        torch.testing.assert_close(as_control_frames(form, **size), video, rtol=0, atol=1e-6)
    several = [array, pictures, video[0], folder / "coarse.mp4"]
    torch.testing.assert_close(as_control_frames(several, **size), video.expand(4, -1, -1, -1, -1), rtol=0, atol=1e-6)
    torch.testing.assert_close(
        generate(loaded, control_video=folder / "coarse.mp4"), generate(loaded, control_video=pictures)
    )
    larger = generate(loaded, control_video=str(folder / "coarse.mp4"), height=48, width=64, fps=FPS / 2)
    assert larger.shape[-2:] == (6, 8)


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (3, "is a int"),
        (["a", 1], "no such file"),
        ([], "is a list"),
        (np.zeros((4, 8, 8)), "is a array of shape"),
        (torch.zeros(4, 8, 8, 3), r"has shape \(4, 8, 8, 3\)"),
        (np.zeros((4, 8, 8, 4)), "has shape"),
        ([np.zeros((8, 8, 3)), np.zeros((8, 9, 3))], "differ in type or shape"),
        ([np.zeros((2, 8, 8, 3)), np.zeros((2, 8, 9, 3))], "different shapes"),
        (np.full((2, 8, 8, 3), 255.0), "values from 255 to 255"),
        ("absent.mp4", "no such file; give a video, or a folder"),
    ],
)
def test_other_control_videos_are_refused(video, message):
    with pytest.raises(ValueError, match=message):
        as_control_frames(video, num_frames=5, fps=8.0, height=32, width=48)


def test_a_control_video_that_is_too_short_is_named(folder, loaded):
    with pytest.raises(InputError, match=r"coarse\.mp4: gives 12 frames at 8 fps, but num_frames is 13"):
        generate(loaded, control_video=folder / "coarse.mp4", num_frames=13)
