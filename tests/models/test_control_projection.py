"""The frozen projection in front of the control adapter: its fit, its file and its place in the branch."""

import json

import pytest
import torch
from safetensors.torch import save_file

from c2r import InputError
from c2r.models.control_adapter import ControlAdapter
from c2r.models.control_projection import (
    Certificate,
    ControlProjection,
    Figure,
    FittedProjection,
    LookScatter,
    ProjectedControlAdapter,
    check_projection,
    load_projection,
    orthonormal,
    require_same_dinov3,
    save_projection,
)
from c2r.models.controlnet import C2RControlNet
from c2r.models.controlnet_files import load_control_start, load_controlnet
from c2r.models.transformer import C2RTransformer
from tests.helpers.tiny import FEATURE_DIM, tiny_inputs, tiny_transformer

WIDTH = 10
FIGURES = {name: [0.6, 0.5, 0.7] for name in Certificate.__annotations__}


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def two_looks(offset, seed, strength=3.0):
    """Places whose second look differs by an offset, by noise, and in the first coordinate at random."""
    places = draw(3000, WIDTH, seed=seed) * torch.linspace(2, 1, WIDTH)
    other = places + offset + 0.1 * draw(3000, WIDTH, seed=seed + 1)
    other[:, 0] += strength * draw(3000, seed=seed + 2)
    return places, other


def scatter_of(*pairs):
    scatter = LookScatter(WIDTH)
    for kind, (one, other) in enumerate(pairs):
        for part in (slice(None, 1000), slice(1000, None)):
            scatter.add(str(kind), one[part][None], other[part][None])
    return scatter


def fitted(*pairs):
    return scatter_of(*pairs).solve()


def example(rows=6, chosen=4, width=FEATURE_DIM):
    """A projection with random directions."""
    directions = orthonormal(draw(rows, width).float())
    figures = {name: Figure(*values) for name, values in FIGURES.items()}
    other = figures | {"cg_or_real": Figure(1.0)}
    return FittedProjection(
        draw(width, seed=1).float(),
        directions,
        torch.arange(rows, 0, -1.0) / (rows * (rows + 1) / 2),
        chosen,
        {2: other, chosen: figures},
        other,
        "sha",
        ["data/a", "data/b"],
    )


def projected_controlnet(control_layers, **options):
    """Return the ControlNet of a new tiny transformer, with the projection of `example`."""
    controlnet = C2RControlNet.from_transformer(tiny_transformer(), control_layers, feature_dim=FEATURE_DIM, **options)
    controlnet.set_projection(example())
    return controlnet


# ----------------------------------------------------------------------------------------------------------------- fit


def test_the_means_of_all_looks_coincide():
    pairs = [two_looks(draw(WIDTH, seed=5), 10), two_looks(draw(WIDTH, seed=6), 20)]
    mean, directions = fitted(*pairs)
    assert directions.shape == (WIDTH - 3, WIDTH)  # four looks: three differences
    for look in (look for pair in pairs for look in pair):
        assert (directions @ (look.mean(0) - mean)).abs().max() < 1e-12


def test_a_direction_of_the_look_comes_last():
    one, other = (look - look.mean(0) for look in two_looks(0, 10))  # a difference of the means would be erased
    _, directions = fitted((one, other))
    agreement = [torch.corrcoef(torch.stack([one @ v, other @ v]))[0, 1] for v in directions]
    assert agreement[-1] < 0.8 < 0.97 < min(agreement[:-1])
    assert (directions[:-1, 0].abs() < 0.02).all()  # the planted look is in the first feature


def test_directions_solve_the_generalised_eigenproblem():
    one, other = (look - look.mean(0) for look in two_looks(0, 10))
    _, directions = fitted((one, other))
    looks = torch.cov(((one - other) / 2).T, correction=0)
    middle = (one + other) / 2
    frames = [frame - frame.mean(0) for frame in (middle[:1000], middle[1000:])]
    places = torch.cov(torch.cat(frames).T, correction=0)
    looks += 0.05 * (looks + places).trace() / WIDTH * torch.eye(WIDTH)
    products = directions @ places @ directions.T, directions @ looks @ directions.T
    torch.testing.assert_close(directions.norm(dim=1), torch.ones(len(directions)).double())
    for product in products:
        off_diagonal = product - product.diag().diag()
        assert off_diagonal.abs().max() < 1e-8
    ratios = products[0].diag() / products[1].diag()
    expected = torch.linalg.eigvals(torch.linalg.solve(looks, places)).real.sort(descending=True).values
    torch.testing.assert_close(ratios, expected)


def test_the_same_pairs_give_the_same_bits():
    pair = two_looks(draw(WIDTH), 10)
    assert all(map(torch.equal, fitted(pair), fitted(pair)))


def test_nothing_to_fit_on_is_refused():
    with pytest.raises(ValueError, match="no pair"):
        LookScatter(3).solve()
    scatter = LookScatter(3)
    scatter.add("a", torch.ones(2, 5, 3), torch.ones(2, 5, 3))
    with pytest.raises(ValueError, match="do not vary"):
        scatter.solve()


def test_a_look_that_both_looks_of_a_frame_share_is_no_place():
    """Such as the weather: it differs between clips, and survives an alteration."""
    scatter = LookScatter(WIDTH)
    for clip in range(50):
        places = draw(4, 20, WIDTH, seed=2 * clip)
        places[..., 0] = 3 * draw(4, 1, seed=2 * clip + 1) + 0.1 * places[..., 0]
        scatter.add("a", places, places + 0.3 * draw(4, 20, WIDTH, seed=1000 + clip))
    _, directions = scatter.solve()
    assert directions[:, 0].abs().argmax() == len(directions) - 1


def test_all_kinds_of_pairs_weigh_the_same():
    one, other = (look[None] + 5 for look in two_looks(0, 10))  # another mean than that of the other kind
    few, many = draw(1, 100, WIDTH, seed=30) - 2, draw(1, 100, WIDTH, seed=31) - 2
    once, often = LookScatter(WIDTH), LookScatter(WIDTH)
    for scatter, times in ((once, 1), (often, 5)):
        scatter.add("b", few, many)
        for _ in range(times):
            scatter.add("a", one, other)
    fits = [scatter.solve() for scatter in (once, often)]
    for found, expected in zip(*fits):
        torch.testing.assert_close(found, expected)
    shares = [scatter.shares(orthonormal(directions)) for scatter, (_, directions) in zip((once, often), fits)]
    torch.testing.assert_close(*shares)


def test_shares_are_those_of_the_variance():
    pair = two_looks(draw(WIDTH), 10)
    scatter = scatter_of(pair)
    directions = orthonormal(scatter.solve()[1])
    features = torch.cat(pair)
    expected = (features @ directions.T).var(0, unbiased=False) / features.var(0, unbiased=False).sum()
    torch.testing.assert_close(scatter.shares(directions), expected)


# ---------------------------------------------------------------------------------------------------------- projection


def filled(directions=4):
    module = ControlProjection(FEATURE_DIM, directions)
    module.fill(example())
    return module


def test_orthonormal_directions_span_the_same_first_by_first():
    given = draw(5, WIDTH)
    found = orthonormal(given)
    torch.testing.assert_close(found @ found.T, torch.eye(5).double())
    for k in range(1, 6):
        torch.testing.assert_close(given[:k] @ found[:k].T @ found[:k], given[:k])
        assert given[k - 1] @ found[k - 1] > 0  # not turned round


def test_it_keeps_what_lies_in_the_span_and_removes_the_rest():
    projection, mean = filled(), example().mean
    inside = draw(7, 4).float() @ example().directions[:4]
    outside = draw(7, FEATURE_DIM, seed=3).float()
    outside -= outside @ example().directions[:4].T @ example().directions[:4]
    found = projection((mean + inside + outside)[None, None, None])
    scale = example().shares[:4].sum() ** -0.5
    torch.testing.assert_close(found[0, 0, 0], mean + scale * inside, rtol=1e-4, atol=1e-5)


def test_what_is_kept_has_the_features_variance():
    pair = two_looks(draw(WIDTH), 10)
    scatter, (mean, directions) = scatter_of(pair), fitted(pair)
    kept = orthonormal(directions)[:3]
    projection = FittedProjection(mean, kept, scatter.shares(kept), 3, {}, {}, "sha", [])
    module = ControlProjection(WIDTH, 3)
    module.fill(projection)
    features = torch.cat(pair)
    variances = [
        x.var(0, unbiased=False).sum() for x in (features.float(), module(features.float()[None, None])[0, 0])
    ]
    torch.testing.assert_close(*variances)


def test_a_blank_control_stays_blank():
    features = draw(2, 5, 3, 2, FEATURE_DIM).float()
    features[1] = 0
    projected = filled()(features)
    assert projected[0].any(-1).all()
    assert not projected[1].any()


def test_it_computes_in_fp32_under_autocast_and_needs_no_gradient():
    module, features = filled(), draw(1, 1, 3, 2, FEATURE_DIM).float()
    mean, directions = module.mean.double(), module.directions.double()
    expected = mean + (features.double() - mean) @ directions.T @ directions
    with torch.autocast("cpu", torch.bfloat16):
        projected, in_bf16 = module(features), module(features.bfloat16())
    torch.testing.assert_close(projected, expected.float())
    assert torch.equal(in_bf16, module(features.bfloat16().float()).bfloat16())
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_a_dropped_tail_is_that_of_fewer_directions():
    features = draw(3, 1, 3, 2, FEATURE_DIM).float()
    dropped = filled()(features, torch.tensor([4, 1, 3]))
    scales = [example().shares[:kept].sum() ** -0.5 for kept in range(1, 5)]
    for sample, kept in enumerate((4, 1, 3)):
        fewer = filled(kept)(features)[sample] - example().mean  # at the scale of fewer directions
        torch.testing.assert_close(dropped[sample] - example().mean, fewer * scales[3] / scales[kept - 1])


def test_the_adapter_sees_what_is_projected():
    projected = ProjectedControlAdapter(FEATURE_DIM, 4, 8)
    projected.projection.fill(example())
    plain = ControlAdapter(FEATURE_DIM, 8)
    plain.load_state_dict({k: v for k, v in projected.state_dict().items() if not k.startswith("projection.")})
    features, kept = draw(1, 5, 2, 2, FEATURE_DIM).float(), torch.tensor([2])
    for given in ((), (kept,)):
        expected = plain(filled()(features, *given), (2, 2, 2))
        assert torch.equal(projected(features, (2, 2, 2), *given), expected)
    assert not torch.equal(projected(features, (2, 2, 2), kept), projected(features, (2, 2, 2)))


# --------------------------------------------------------------------------------------------------- in the ControlNet


@pytest.mark.parametrize("injection", ["blocks", "latent"])
def test_a_controlnet_is_saved_and_loaded_with_it(tmp_path, injection):
    controlnet = projected_controlnet(2, injection=injection)
    trained = {name for name, parameter in controlnet.named_parameters() if parameter.requires_grad}
    frozen = {name for name, _ in controlnet.named_parameters()} - trained
    assert frozen == {"control_adapter.projection.mean", "control_adapter.projection.directions"}
    assert controlnet.config.control_directions == 4
    controlnet.save_pretrained(tmp_path)
    loaded = load_controlnet(tmp_path)
    assert {name for name, parameter in loaded.named_parameters() if parameter.requires_grad} == trained
    inputs, transformer = tiny_inputs(), tiny_transformer()
    before, after = (C2RTransformer(transformer, net)(*inputs).sample for net in (controlnet.eval(), loaded))
    assert torch.equal(before, after)


def test_weights_in_bf16_keep_it_in_fp32(tmp_path):
    projected_controlnet(1).save_pretrained(tmp_path)
    adapter = load_controlnet(tmp_path, torch.bfloat16).control_adapter
    expected = ControlProjection(FEATURE_DIM, 4)
    expected.fill(example())
    assert torch.equal(adapter.projection.directions, expected.directions)
    assert adapter.proj.weight.dtype == torch.bfloat16


def test_a_branch_cast_to_bf16_still_projects():
    controlnet = projected_controlnet(1).bfloat16()
    assert controlnet.control_adapter(tiny_inputs()[-1], (2, 3, 2)).dtype == torch.bfloat16


def test_its_certificate_is_saved_with_the_controlnet(tmp_path):
    projected_controlnet(1).save_pretrained(tmp_path)
    assert load_controlnet(tmp_path).config.control_certificate == example().certificate


@pytest.mark.parametrize("injection", ["blocks", "latent"])
def test_an_empty_one_has_the_same_modules(tmp_path, injection):
    """Processes that read no weights get them from the main process, parameter by parameter."""
    projected_controlnet(2, injection=injection).save_pretrained(tmp_path / "projected")
    plain = C2RControlNet.from_transformer(tiny_transformer(), 2, feature_dim=FEATURE_DIM, injection=injection)
    plain.save_pretrained(tmp_path / "plain")
    later = load_control_start(tmp_path / "plain", tiny_transformer().config, empty=True)
    later.set_projection(example())
    tmp_path /= "projected"
    shapes = [
        {name: (tuple(p.shape), p.dtype, p.requires_grad, p.device.type) for name, p in net.named_parameters()}
        for net in (
            load_controlnet(tmp_path),
            load_controlnet(tmp_path, empty=True),
            load_control_start(tmp_path, tiny_transformer().config, empty=True),
            later,
        )
    ]
    assert shapes[0] == shapes[1] == shapes[2] == shapes[3]


@pytest.mark.parametrize("injection", ["blocks", "latent"])
def test_a_trained_controlnet_takes_one_and_keeps_its_weights(injection):
    options = {"feature_dim": FEATURE_DIM, "injection": injection, "causal_control": True}
    controlnet = C2RControlNet.from_transformer(tiny_transformer(), 1, **options)
    with torch.no_grad():
        for parameter in controlnet.parameters():
            parameter.normal_(std=0.1)
    model, inputs = C2RTransformer(tiny_transformer(), controlnet), tiny_inputs()
    weights, before = {**controlnet.state_dict()}, model(*inputs).sample
    state = torch.get_rng_state()
    controlnet.set_projection(example(rows=FEATURE_DIM, chosen=FEATURE_DIM))  # of all directions: changes nothing
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(model(*inputs).sample, before)
    for _ in range(2):  # the second takes the place of the first
        controlnet.set_projection(example())
        assert controlnet.control_adapter.projection.directions.shape == (4, FEATURE_DIM)
        assert controlnet.config.control_directions == 4
        assert controlnet.config.control_certificate == example().certificate
        assert (model(*inputs).sample - before).abs().max() > 1e-4
        found = controlnet.state_dict()
        assert weights.keys() == {name for name in found if ".projection." not in name}
        assert all(torch.equal(tensor, found[name]) for name, tensor in weights.items())
    trained = {name for name, parameter in controlnet.named_parameters() if parameter.requires_grad}
    assert trained == weights.keys()
    assert C2RControlNet.from_config(controlnet.config).config.control_directions == 4
    assert not controlnet.eval().control_adapter.training
    controlnet.set_projection(example())
    assert not controlnet.control_adapter.training
    with pytest.raises(ValueError, match=f"of width 3: expected {FEATURE_DIM}"):
        controlnet.set_projection(example(rows=2, chosen=2, width=3))


def test_only_what_is_projected_reaches_the_output():
    torch.manual_seed(0)
    controlnet = projected_controlnet(1, injection="latent")
    model = C2RTransformer(tiny_transformer(), controlnet)
    *others, features = tiny_inputs()
    directions = example().directions[:4].double()
    inside = torch.linalg.lstsq(directions, directions @ draw(FEATURE_DIM, seed=3)).solution
    outside = draw(FEATURE_DIM, seed=3) - inside  # orthogonal to every direction
    own = model(*others, features).sample
    torch.testing.assert_close(model(*others, features + outside.float()).sample, own, rtol=1e-4, atol=1e-5)
    assert (model(*others, features + inside.float()).sample - own).abs().max() > 1e-4
    kept = model(*others, features, kept_directions=torch.tensor([1, 4])).sample
    assert not torch.equal(kept[0], own[0])
    assert torch.allclose(kept[1], own[1], atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------- file


def test_its_file_holds_it_with_its_figures(tmp_path):
    path = tmp_path / "p.safetensors"
    save_projection(path, example())
    loaded = load_projection(path, FEATURE_DIM)
    assert torch.equal(loaded.directions, example().directions)
    assert torch.equal(loaded.mean, example().mean)
    assert torch.equal(loaded.shares, example().shares)
    assert loaded.projected == example().projected
    assert (loaded.num_directions, loaded.dinov3, loaded.datasets) == (4, "sha", ["data/a", "data/b"])
    assert loaded.certificate == example().certificate
    assert loaded.certificate["cg_or_real_projected"] == 0.6
    assert loaded.certificate["cg_or_real_unprojected"] == 1
    assert loaded.certificate["look_projected_high"] == 0.7


def test_another_number_of_directions_has_figures_of_its_own(tmp_path):
    path = tmp_path / "p.safetensors"
    save_projection(path, example())
    loaded = load_projection(path, FEATURE_DIM, 2)
    assert loaded.num_directions == 2
    assert loaded.certificate["cg_or_real_projected"] == 1
    with pytest.raises(InputError, match=r"--control_directions 3: .* has figures for 2, 4 directions"):
        load_projection(path, FEATURE_DIM, 3)


def test_one_for_another_dinov3_of_the_same_width_is_refused(tmp_path):
    path = tmp_path / "p.safetensors"
    save_projection(path, example())
    metadata = check_projection(path, FEATURE_DIM)
    require_same_dinov3(path, metadata, "sha")
    with pytest.raises(InputError, match=r"another DINOv3 \(on data/a, data/b\)"):
        require_same_dinov3(path, metadata, "other")


def hostile(**change):
    """The parts of a file, one of them changed."""
    parts = {"mean": torch.zeros(FEATURE_DIM), "directions": torch.eye(6, FEATURE_DIM), "shares": torch.ones(6) / 6}
    return parts | {"metadata": metadata()} | change


def metadata(**change):
    figures = {"projected": {"2": FIGURES, "4": FIGURES}, "unprojected": FIGURES}
    return {"directions": 4, **figures, "dinov3": "sha", "datasets": ["a"]} | change


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (hostile(mean=torch.zeros(7)), "is no control projection"),
        (hostile(directions=torch.ones(6, 2, FEATURE_DIM)), "is no control projection"),
        (hostile(directions=torch.ones(0, FEATURE_DIM), shares=torch.ones(0)), "is no control projection"),
        (hostile(directions=torch.ones(FEATURE_DIM)), "is no control projection"),
        (hostile(directions=torch.ones(())), "is no control projection"),
        (hostile(directions=torch.zeros(50_000, FEATURE_DIM), shares=torch.zeros(50_000)), "is no control projection"),
        (hostile(shares=torch.ones(7) / 7), "is no control projection"),
        (hostile(directions=torch.ones(6, FEATURE_DIM)), "not orthonormal"),
        (hostile(directions=torch.full((6, FEATURE_DIM), torch.nan)), "not orthonormal"),
        (hostile(shares=torch.zeros(6)), "shares of variance"),
        (hostile(shares=torch.full((6,), torch.nan)), "shares of variance"),
        (hostile(shares=torch.ones(6)), "shares of variance"),
        (hostile(shares=torch.tensor([1.0, -1, 0, 0, 0, 0])), "shares of variance"),
        (hostile(mean=torch.zeros(FEATURE_DIM).double()), "is no control projection"),
        (hostile(mean=torch.zeros(8), directions=torch.eye(6, 8)), "features of width 8, --dinov3 gives"),
        (hostile(mean=torch.full((FEATURE_DIM,), torch.nan)), "not finite"),
        (hostile(metadata=metadata(directions=7)), "names 2, 4, 7"),
        (hostile(metadata=metadata(directions=0)), "directions"),
        (hostile(metadata=metadata(directions=3)), "no figures of its 3 directions"),
        (hostile(metadata=metadata(projected={"x": FIGURES})), "names 4, x"),
        (hostile(metadata=metadata(projected={"4": FIGURES | {"look": [2, 0, 1]}})), "less than or equal to 1"),
        (hostile(metadata=metadata(unprojected=None)), "unprojected"),
        (hostile(metadata=[1]), "should be an object"),
    ],
)
def test_another_file_is_refused_in_one_line(tmp_path, parts, message):
    path = tmp_path / "p.safetensors"
    text = json.dumps(parts.pop("metadata"))
    save_file(parts, path, metadata={"c2r": text})
    with pytest.raises(InputError, match=message) as refused:
        load_projection(path, FEATURE_DIM)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_file_that_is_none_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        load_projection(tmp_path / "none", FEATURE_DIM)
    (tmp_path / "text").write_text("text")
    with pytest.raises(InputError, match="cannot be read"):
        load_projection(tmp_path / "text", FEATURE_DIM)
