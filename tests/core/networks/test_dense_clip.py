"""Image -> CLIP patch tokens -> G: every head against transformers' own forward in float64, with hooks."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPModel

import nerve_core
from nerve_core.networks.dense_clip import HEADS, ClipConfig, DenseClip, PatchFeatures
from reference import soft_row
from small_models import outputs_of, picture, slow_bilinear, small_clip

PATCH = 4
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)  # as OpenAI published them
DEVIATION = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
SIZES = ((24, 24), (24, 40), (36, 24), (12, 60))  # exact multiples of the patch: nothing is resized


@pytest.fixture(scope="module")
def clip():
    return small_clip(patch=PATCH, image=24)


def dense(clip, head="vanilla", **options):
    """Over a copy: `DenseClip` takes the vision tower over."""
    return DenseClip(copy.deepcopy(clip), ClipConfig(head=head, **{"short_side": 24, **options}))


def untouched(clip):
    """A copy in float64 whose attention is the plain matrix form, and the pixels' normalisation."""
    twin = copy.deepcopy(clip).double()
    twin.set_attn_implementation("eager")
    return twin


def normalised(image):
    return ((image - MEAN) / DEVIATION).double()


def projected(twin, hidden):
    """The projection that CLIP's class token gets, for patches: unit rows [..., patches, D]."""
    vectors = twin.visual_projection(twin.vision_model.post_layernorm(hidden[..., 1:, :]))
    return vectors / vectors.square().sum(-1, keepdim=True).sqrt()


def vanilla_reference(twin, pixels):
    return projected(twin, twin.vision_model(pixels, interpolate_pos_encoding=True).last_hidden_state), None


def maskclip_reference(twin, pixels):
    """The last layer's attention replaced by: each token's own value through the output projection."""
    last = twin.vision_model.encoder.layers[-1].self_attn

    def own_value(module, arguments, keywords, output):
        hidden = keywords.get("hidden_states", arguments[0] if arguments else None)
        value = hidden @ module.v_proj.weight.T + module.v_proj.bias
        return value @ module.out_proj.weight.T + module.out_proj.bias, None

    hook = last.register_forward_hook(own_value, with_kwargs=True)
    try:
        return vanilla_reference(twin, pixels)
    finally:
        hook.remove()


def layer_norm(x, norm):
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + norm.eps)
    return scaled * norm.weight.numpy() + norm.bias.numpy()


def cliper_reference(twin, pixels):
    """CLIPer written from its description, head by head: fused maps of the earlier layers over every layer's input."""
    layers = twin.vision_model.encoder.layers
    watched = {f"norm {k}": layer.layer_norm1 for k, layer in enumerate(layers)}
    watched |= {f"attention {k}": layer.self_attn for k, layer in enumerate(layers)}
    watched["before last"] = layers[-2]
    with outputs_of(watched) as seen:
        twin.vision_model(pixels, interpolate_pos_encoding=True, output_attentions=True)
    maps = [seen[f"attention {k}"][1][0].numpy() for k in range(len(layers) - 1)]  # [heads, T, T] each
    inputs = [seen[f"norm {k}"][0].numpy() for k in range(len(layers) - 1)]
    before_last = seen["before last"]
    inputs.append(
        (before_last[0] if isinstance(before_last, tuple) else before_last).reshape(-1, inputs[0].shape[1]).numpy()
    )
    last = layers[-1].self_attn
    heads, size = last.num_heads, last.head_dim
    fused = []
    for head in range(heads):
        A = sum(layer[head] for layer in maps)
        A = A / A.sum(0, keepdims=True)  # columns, then rows
        A = A / A.sum(1, keepdims=True)
        A = (A + A.T) / 2
        A = np.maximum(A - A.mean(0, keepdims=True), 0)
        fused.append(A / A.sum(1, keepdims=True))
    images = []
    for tokens in inputs:
        values = layer_norm(tokens, layers[-1].layer_norm1) @ last.v_proj.weight.numpy().T + last.v_proj.bias.numpy()
        attended = np.concatenate(
            [fused[head] @ values[:, head * size : (head + 1) * size] for head in range(heads)], axis=1
        )
        images.append(attended @ last.out_proj.weight.numpy().T + last.out_proj.bias.numpy())
    affinity = sum(A[1:, 1:] for A in fused) / heads
    affinity = affinity / affinity.sum(1, keepdims=True)
    return projected(twin, torch.from_numpy(np.stack(images))), torch.from_numpy(affinity)


def last_layer(twin, pixels):
    """What enters the last layer [T, width], and its queries, keys and values of it, a list [T, size] a head each."""
    layers = twin.vision_model.encoder.layers
    with outputs_of({"before last": layers[-2]}) as seen:
        twin.vision_model(pixels, interpolate_pos_encoding=True)
    hidden = seen["before last"]
    hidden = (hidden[0] if isinstance(hidden, tuple) else hidden).reshape(-1, layers[0].layer_norm1.weight.numel())
    attention, normed = layers[-1].self_attn, layer_norm(hidden.numpy(), layers[-1].layer_norm1)
    projected = [
        np.split(normed @ project.weight.numpy().T + project.bias.numpy(), attention.num_heads, axis=1)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    ]
    return hidden, *projected


def merged(twin, heads):
    """What the heads [T, size] found, through the last layer's output projection."""
    project = twin.vision_model.encoder.layers[-1].self_attn.out_proj
    return torch.from_numpy(np.concatenate(heads, 1) @ project.weight.numpy().T + project.bias.numpy())


def sclip_reference(twin, pixels):
    hidden, Q, K, V = last_layer(twin, pixels)
    heads = [(soft_rows(scaled(q, q)) + soft_rows(scaled(k, k))) @ v for q, k, v in zip(Q, K, V, strict=True)]
    last = twin.vision_model.encoder.layers[-1]
    hidden = hidden + merged(twin, heads)
    return projected(twin, hidden + last.mlp(last.layer_norm2(hidden)))[None], None


def clearclip_reference(twin, pixels):
    _, Q, _, V = last_layer(twin, pixels)
    heads = [soft_rows(scaled(q, q)) @ v for q, v in zip(Q, V, strict=True)]
    return projected(twin, merged(twin, heads))[None], None


def naclip_reference(twin, pixels):
    """The Gaussian patch by patch: exp(-distance^2 / 50), nothing to and from the class token."""
    _, _, K, V = last_layer(twin, pixels)
    columns = pixels.shape[-1] // PATCH
    omega = np.zeros((len(K[0]), len(K[0])))
    for i, j in np.ndindex(len(omega) - 1, len(omega) - 1):
        down, right = i // columns - j // columns, i % columns - j % columns
        omega[1 + i, 1 + j] = math.exp(-(down**2 + right**2) / 50)
    heads = [soft_rows(scaled(k, k) + omega) @ v for k, v in zip(K, V, strict=True)]
    return projected(twin, merged(twin, heads))[None], None


def scaled(q, k):
    """q k^T / sqrt(size), pair by pair."""
    return np.array([[math.fsum(a * b for a, b in zip(x, y, strict=True)) for y in k] for x in q]) / math.sqrt(
        len(q[0])
    )


def soft_rows(scores):
    return np.array([soft_row(list(row)) for row in scores])


REFERENCES = {
    "vanilla": vanilla_reference,
    "maskclip": maskclip_reference,
    "sclip": sclip_reference,
    "clearclip": clearclip_reference,
    "naclip": naclip_reference,
    "cliper": cliper_reference,
}


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("head", REFERENCES)
def test_a_heads_patches_equal_its_description_on_transformers_own_forward(clip, head, size):
    image = picture(*size)
    ours = dense(clip, head, short_side=min(size)).features(image)
    with torch.inference_mode():
        embeddings, affinity = REFERENCES[head](untouched(clip), normalised(image))
    assert ours.grid == (size[0] // PATCH, size[1] // PATCH)
    assert ours.embeddings.shape == (4 if head == "cliper" else 1, ours.grid[0] * ours.grid[1], 16)
    assert ours.embeddings.dtype == torch.float32
    torch.testing.assert_close(ours.embeddings.double(), embeddings, rtol=0, atol=2e-5)
    assert (affinity is None) == (ours.affinity is None)
    if affinity is not None:
        torch.testing.assert_close(ours.affinity.double(), affinity, rtol=0, atol=2e-6)


def test_every_head_has_a_reference_and_they_differ(clip):
    assert set(HEADS) == set(REFERENCES)
    image = picture(24, 32)
    found = [dense(clip, head).features(image).embeddings[-1] for head in HEADS]
    for k, one in enumerate(found):
        for other in found[k + 1 :]:
            assert (one - other).abs().max() > 0.05


@given(rows=st.integers(1, 12), columns=st.integers(1, 12))
def test_positions_are_resized_as_transformers_does(clip, rows, columns):
    ours = dense(clip).positions((rows, columns))
    embeddings = clip.vision_model.embeddings
    with torch.inference_mode():
        theirs = embeddings.interpolate_pos_encoding(
            torch.zeros(1, 1 + rows * columns, 24), rows * PATCH, columns * PATCH
        )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_positions_of_many_grids_are_not_kept_for_ever(clip):
    frame = dense(clip)
    for columns in range(6, 106):
        frame.positions((6, columns))
    assert len(frame._positions) <= 32


@pytest.mark.parametrize(
    ("image", "grid"),
    [
        ((480, 640), (24, 32)),
        ((640, 480), (32, 24)),
        ((1080, 1920), (24, 43)),  # 1920 * 336 / 1080 = 597.3 = 42.67 patches
        ((512, 512), (24, 24)),
        ((100, 103), (24, 25)),  # 24.72 patches
        ((1, 1), (24, 24)),
        ((7, 5), (34, 24)),  # 33.6 patches
    ],
)
def test_the_short_side_is_set_and_the_aspect_kept_to_the_nearest_patch(image, grid):
    wide = small_clip(image=28, patch=14, layers=2)
    assert dense(wide, short_side=336).grid(*image) == grid


def test_640_x_480_in_patches_of_14_is_448_x_336():
    wide = small_clip(image=28, patch=14, layers=2)
    frame = dense(wide, short_side=336)
    with outputs_of({"patches": frame.vision.embeddings.patch_embedding}) as seen:
        features = frame.features(picture(480, 640))
    assert features.grid == (24, 32)
    assert features.embeddings.shape == (1, 768, 16)
    assert tuple(seen["patches"].shape) == (1, 24, 24, 32)


def test_stretch_makes_every_image_square(clip):
    image = picture(48, 96)
    stretched = dense(clip, stretch=True).features(image)
    assert stretched.grid == (6, 6)
    with torch.inference_mode():
        reference, _ = vanilla_reference(untouched(clip), normalised(pil_bicubic(image, (24, 24))))
    torch.testing.assert_close(stretched.embeddings.double(), reference, rtol=0, atol=1e-3)


def pil_bicubic(image, size):
    """The image resized by Pillow, in float: an independent antialiased bicubic."""
    planes = [
        np.asarray(Image.fromarray(plane.numpy(), "F").resize(size[::-1], Image.Resampling.BICUBIC))
        for plane in image[0]
    ]
    return torch.from_numpy(np.stack(planes))[None].clamp(0, 1)


@pytest.mark.parametrize("size", [(97, 130), (11, 16), (300, 401)])
def test_an_image_is_resized_bicubically_with_antialiasing_and_normalised(clip, size):
    image = torch.rand((1, 3, *size), generator=torch.Generator().manual_seed(1))
    frame, inputs = dense(clip), []
    patches = frame.vision.embeddings.patch_embedding
    hook = patches.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    grid = frame.features(image).grid
    hook.remove()
    expected = (pil_bicubic(image, (grid[0] * PATCH, grid[1] * PATCH)) - MEAN) / DEVIATION
    torch.testing.assert_close(inputs[0], expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("size", [(1, 3000), (4000, 2)])
def test_an_extreme_aspect_is_squeezed_so_that_no_image_asks_for_endless_patches(clip, size):
    assert sorted(dense(clip).grid(*size)) == [6, 6 * 8]
    assert dense(clip).features(torch.rand((1, 3, *size))).grid == dense(clip).grid(*size)
    assert dense(clip).grid(100, 799) == (6, 48)
    assert dense(clip).grid(100, 600) == (6, 36)


def unit_rows(count, width, seed):
    rows = torch.randn((count, width), generator=torch.Generator().manual_seed(seed))
    return rows / rows.norm(dim=-1, keepdim=True)


def slow_probabilities(features, queries, scale, size):
    """G by loops over maps, patches and pixels, in float64."""
    embeddings, queries = features.embeddings.double().numpy(), queries.double().numpy()
    soft = np.zeros((*embeddings.shape[:2], len(queries)))
    for index in np.ndindex(*embeddings.shape[:2]):
        powers = [math.exp(scale * float(embeddings[index] @ query)) for query in queries]
        soft[index] = np.array(powers) / sum(powers)
    if features.affinity is None:
        scores = soft.mean(0)
    else:  # the earlier layers' mean, and the last one averaged along the affinity
        scores = (soft[:-1].mean(0) + features.affinity.double().numpy() @ soft[-1]) / 2
    planes = [slow_bilinear(scores[:, k].reshape(features.grid), size).ravel() for k in range(len(queries))]
    return np.stack(planes, 1)


@pytest.mark.parametrize("size", [(8, 8), (9, 13), (3, 5), (6, 10)])
@pytest.mark.parametrize("head", HEADS)
def test_probabilities_equal_a_softmax_over_all_queries_resized_bilinearly(clip, head, size):
    frame = dense(clip, head, logit_scale=20.0)
    features = frame.features(picture(24, 40))
    queries = unit_rows(5, 16, seed=3)
    G = frame.probabilities(features, queries, size)
    assert G.shape == (size[0] * size[1], 5)
    assert G.dtype == torch.float32
    np.testing.assert_allclose(G.numpy(), slow_probabilities(features, queries, 20.0, size), rtol=0, atol=2e-6)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("count", [1, 2, 254])
def test_rows_of_G_are_distributions(clip, head, count):
    frame = dense(clip, head)
    for size in ((24, 24), (24, 88), (50, 31)):
        G = frame.probabilities(frame.features(picture(*size)), unit_rows(count, 16, seed=count), (16, 24))
        assert (G >= 0).all()
        torch.testing.assert_close(G.sum(-1), torch.ones(len(G)), rtol=0, atol=1e-5)


def test_rows_of_G_are_distributions_where_cliper_has_nothing_to_attend_to():
    """Where every layer attends evenly, maps less their column means are zero everywhere."""
    even = small_clip()
    for layer in even.vision_model.encoder.layers:
        layer.self_attn.q_proj.weight.zero_()
        layer.self_attn.q_proj.bias.zero_()
    frame = dense(even, "cliper")
    for image in (picture(24, 24), torch.full((1, 3, 24, 24), 0.5)):
        features = frame.features(image)
        torch.testing.assert_close(features.affinity.sum(-1), torch.ones(36), rtol=0, atol=1e-5)
        G = frame.probabilities(features, unit_rows(3, 16, 0), (8, 8))
        torch.testing.assert_close(G.sum(-1), torch.ones(64), rtol=0, atol=1e-5)


def test_tokens_that_none_attends_to_leave_everything_finite():
    sharp = small_clip()
    for layer in sharp.vision_model.encoder.layers:
        layer.self_attn.q_proj.weight.mul_(1e5)  # every token attends to one
    frame = dense(sharp, "cliper")
    features = frame.features(picture(24, 24))
    assert features.embeddings.isfinite().all()
    torch.testing.assert_close(features.affinity.sum(-1), torch.ones(36), rtol=0, atol=1e-5)


def test_a_single_patch_is_enough(clip):
    for head in HEADS:
        frame = dense(clip, head, short_side=2)
        features = frame.features(picture(2, 2))
        assert features.grid == (1, 1)
        G = frame.probabilities(features, unit_rows(3, 16, 0), (4, 6))
        torch.testing.assert_close(G.sum(-1), torch.ones(24), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("dtype", "patches", "rows"), [(torch.bfloat16, 0.05, 0.05), (torch.float16, 0.005, 0.005)])
@pytest.mark.parametrize("head", HEADS)
def test_half_precision_stays_within_stated_bounds_of_the_description(clip, head, dtype, patches, rows):
    """Against transformers' own forward: unit embeddings in any entry, and the affinity in L1 a row."""
    image = picture(36, 24)
    half = dense(copy.deepcopy(clip).to(dtype), head).features(image)
    with torch.inference_mode():
        embeddings, affinity = REFERENCES[head](untouched(clip), normalised(image))
    assert half.embeddings.dtype == torch.float32
    assert (half.embeddings - embeddings).abs().max() < patches
    if affinity is not None:
        assert (half.affinity - affinity).abs().sum(-1).max() < rows


@pytest.mark.parametrize("head", HEADS)
def test_the_vision_tower_is_taken_over_and_the_text_tower_left(head):
    whole = small_clip()
    DenseClip(whole, ClipConfig(head=head, short_side=24))
    assert not [name for name, _ in whole.named_parameters() if name.startswith("vis")]
    assert whole.text_model is not None
    with pytest.raises(ValueError, match="taken over before"):
        DenseClip(whole, ClipConfig(head=head))


@pytest.mark.parametrize("head", HEADS)
def test_every_parameter_that_is_kept_has_a_part_in_the_features(head):
    frame = dense(small_clip().double(), head)  # not packed in this dtype, so that weights stay parameters
    for name, parameter in [*frame.vision.named_parameters(), *frame.projection.named_parameters()]:
        value = parameter.clone()
        parameter.fill_(torch.nan)
        frame._positions.clear()
        assert frame.features(picture(24, 40)).embeddings.isnan().any(), name
        parameter.copy_(value)


def test_the_embedded_clip_equals_transformers_own_forward():
    clip = CLIPModel.from_pretrained(Path(nerve_core.__file__).parent / "embedded/clip", dtype=torch.float32).eval()
    patch = clip.config.vision_config.patch_size
    image = picture(6 * patch, 9 * patch)
    ours = dense(clip, short_side=6 * patch).features(image)
    with torch.inference_mode():
        reference, _ = vanilla_reference(untouched(clip), normalised(image))
    torch.testing.assert_close(ours.embeddings.double(), reference, rtol=0, atol=2e-5)


def test_features_know_no_names(clip):
    features = dense(clip).features(picture(24, 24))
    assert isinstance(features, PatchFeatures)
    torch.testing.assert_close(features.embeddings.norm(dim=-1), torch.ones(1, 36))


def test_cliper_needs_two_layers_and_says_so():
    shallow = small_clip(layers=1)
    with pytest.raises(ValueError, match="at least two layers; choose vanilla or maskclip"):
        dense(shallow, "cliper").features(picture(24, 24))
    dense(shallow, "maskclip").features(picture(24, 24))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"head": "sclip2"}, "vanilla, maskclip, sclip, clearclip, naclip, cliper"),
        ({"short_side": 0}, "short_side"),
        ({"logit_scale": 0}, "logit_scale"),
        ({"logit_scale": -1.0}, "logit_scale"),
        ({"logit_scale": math.nan}, "logit_scale"),
        ({"logit_scale": math.inf}, "logit_scale"),
        ({"negatives": "wall"}, "negatives"),
    ],
    ids=str,
)
def test_a_wrong_configuration_is_refused_by_name(change, said):
    with pytest.raises(ValueError, match=said):
        ClipConfig(**change)
