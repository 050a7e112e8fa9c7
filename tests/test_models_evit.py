"""EViT blocks against timm's plain blocks and against a reference written from the paper's equations."""

import copy
import math

import pytest
import timm
import tiny
import torch
from timm.layers import DropPath
from timm.models import cait, deit, mlp_mixer
from timm.models.vision_transformer import Attention
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import engine
import main
import models
import models_evit
from flags import fill, parse_args
from models_evit import EViTBlock, KeepRate, evit_blocks, keep_attentive, reduce_tokens
from samplers import Batch
from teachers import FrozenTeacher
from utils import World

CPU = torch.device("cpu")
TINY = {"patch_size": 8, "embed_dim": 48, "depth": 5, "num_heads": 3, "num_classes": 7}
RATES, LAYERS = 0.6, (1, 3)


def evit(name="evit_tiny_patch16_224", seed=0, img_size=48, **options):
    """A tiny model in evaluation mode, with attention that is far from uniform."""
    torch.manual_seed(seed)
    entry = {"drop_loc": LAYERS, "keep_rate": RATES} if name.startswith("evit") else {}
    model = timm.create_model(name, **TINY | {"img_size": img_size} | entry | options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.eval()


def images(count=3, height=48, width=48):
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1))


def naive_block(block, x, keep_rate, fuse, prefix, class_rows):
    """One image [N, D] through a block, with the whole attention matrix and a loop over heads and patches."""
    attn, (N, D) = block.attn, x.shape
    y = block.norm1(x)
    qkv = y @ attn.qkv.weight.T + (attn.qkv.bias if attn.qkv.bias is not None else 0)
    heads, size = attn.num_heads, D // attn.num_heads
    outputs, attentiveness = [], torch.zeros(N, dtype=x.dtype)
    for head in range(heads):
        q, k, v = (qkv[:, part * D + head * size : part * D + (head + 1) * size] for part in range(3))
        q, k = attn.q_norm(q), attn.k_norm(k)
        matrix = torch.softmax(q @ k.T / math.sqrt(size), dim=-1)
        outputs.append(matrix @ v)
        for row in range(class_rows):
            attentiveness += matrix[row] / (heads * class_rows)
    x = x + block.ls1(attn.proj(torch.cat(outputs, dim=1)))
    num_keep = math.ceil(keep_rate * (N - prefix))
    if num_keep < N - prefix:
        ranked = sorted(range(prefix, N), key=lambda i: -float(attentiveness[i]))
        rows = [x[i] for i in range(prefix)] + [x[i] for i in ranked[:num_keep]]
        if fuse:
            fused = torch.zeros(D, dtype=x.dtype)
            for i in ranked[num_keep:]:
                fused = fused + attentiveness[i] * x[i]
            rows.append(fused)
        x = torch.stack(rows)
    return x + block.ls2(block.mlp(block.norm2(x)))


def naive_features(model, batch, rate_of, fuse, class_rows):
    x = model.norm_pre(model._pos_embed(model.patch_embed(batch)))
    for layer, block in enumerate(model.blocks):
        rate = rate_of.get(layer, 1.0)
        x = torch.stack([naive_block(block, tokens, rate, fuse, model.num_prefix_tokens, class_rows) for tokens in x])
    return model.norm(x)


@pytest.mark.parametrize("distilled", [False, True])
def test_with_keep_rate_1_it_is_deit(distilled):
    infix = "_distilled" if distilled else ""
    model = reduce_tokens(evit(f"evit_tiny{infix}_patch16_224"), 1.0, LAYERS)
    plain = evit(f"deit_tiny{infix}_patch16_224", seed=9)
    plain.load_state_dict(model.state_dict())  # the same names: EViT adds no parameters
    torch.testing.assert_close(model(images()), plain(images()), atol=1e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("fused_attention", [True, False])
@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("distilled", [False, True])
def test_with_lower_rates_it_is_the_papers_equations(distilled, fuse, fused_attention):
    name = f"evit_tiny{'_distilled' if distilled else ''}_patch16_224"
    model = evit(name, fuse_token=fuse).double()  # in float32, the difference depends on the CPU
    if not fused_attention:
        models.unfuse_attention(model)
    batch = images().double()
    expected = naive_features(model, batch, dict.fromkeys(LAYERS, RATES), fuse, 1 + distilled)
    found = model.forward_features(batch)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


OTHERS = {
    "layer scale": ("deit3_small_patch16_224", {}),
    "registers": ("vit_small_patch16_224", {"reg_tokens": 4}),
    "qk norm": ("vit_small_patch16_224", {"qk_norm": True}),
    "no embedding of the class token": ("vit_small_patch16_224", {"no_embed_class": True}),
    "other patches": ("vit_small_patch16_224", {"patch_size": 12}),
    "not square": ("vit_small_patch16_224", {"img_size": (48, 32)}),
    "average pooling": ("vit_small_patch16_224", {"global_pool": "avg"}),
}


@torch.no_grad()
@pytest.mark.parametrize("case", OTHERS)
def test_any_plain_vit_reduces_and_keeps_its_prefix(case):
    name, options = OTHERS[case]
    model = reduce_tokens(evit(name, block_fn=EViTBlock, **options), RATES, LAYERS).double()
    batch = images(2, *model.patch_embed.img_size).double()
    expected = naive_features(model, batch, dict.fromkeys(LAYERS, RATES), True, 1)
    torch.testing.assert_close(model.forward_features(batch), expected, atol=1e-12, rtol=1e-12)
    assert model(batch).shape == (2, 7)
    patches = math.prod(model.patch_embed.grid_size)
    for _ in LAYERS:
        patches = math.ceil(RATES * patches) + 1
    assert expected.shape[1] == model.num_prefix_tokens + patches


def test_kept_patches_are_ordered_and_the_rest_is_fused_unnormalized():
    patches = torch.tensor([[[1.0], [2.0], [3.0], [4.0]]])
    attentiveness = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    assert keep_attentive(patches, attentiveness, 2, False).flatten().tolist() == [2.0, 4.0]
    fused = keep_attentive(patches, attentiveness, 2, True).flatten()
    torch.testing.assert_close(fused, torch.tensor([2.0, 4.0, 0.1 * 1 + 0.2 * 3]))


def test_gradients_of_kept_and_fused_patches_by_hand():
    tokens, attentiveness = torch.randn(3, 8, 4, requires_grad=True), torch.rand(3, 6, requires_grad=True)
    above = torch.randn(3, 3, 4)  # gradients of two kept patches and of the fused one
    keep_attentive(tokens[:, 2:], attentiveness, 2, True).backward(above)
    for image in range(3):
        order = attentiveness[image].argsort(descending=True).tolist()
        assert not tokens.grad[image, :2].any()
        for index, patch in enumerate(order):
            if index < 2:
                expected, of_attention = above[image, index], 0.0
            else:
                expected = attentiveness[image, patch] * above[image, 2]
                of_attention = torch.dot(tokens[image, 2 + patch], above[image, 2])
            torch.testing.assert_close(tokens.grad[image, 2 + patch], expected)
            torch.testing.assert_close(attentiveness.grad[image, patch], torch.as_tensor(of_attention))


@torch.no_grad()
def test_each_image_keeps_its_own_patches():
    # the original implementation indexed the batch instead of the tokens
    model = evit("evit_tiny_distilled_patch16_224")
    together = model(images())
    for number in range(3):
        torch.testing.assert_close(together[number], model(images()[number : number + 1])[0], atol=1e-5, rtol=0)


def test_gradients_reach_every_parameter_and_both_heads():
    model = evit("evit_tiny_distilled_patch16_224").train()
    model.set_distilled_training(True)
    class_logits, distillation_logits = model(images())
    (class_logits.square().mean() + distillation_logits.square().mean()).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_gradient_checkpointing_changes_nothing():
    model, again = evit().train(), evit().train()
    again.set_grad_checkpointing()
    for each in (model, again):
        each(images()).square().mean().backward()
    for first, second in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(first.grad, second.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_it_reduces_alike(dtype):
    model = evit()
    with torch.autocast("cpu", dtype=dtype):
        assert model.forward_features(images()).shape == model.forward_features(images()).shape == (3, 16, 48)
        assert model(images()).isfinite().all()


class Squares(TorchDispatchMode):
    """Counts the square matrices that operators create, by side."""

    def __init__(self):
        super().__init__()
        self.sides = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for result in results if isinstance(results, (tuple, list)) else (results,):
            if isinstance(result, torch.Tensor) and result.ndim >= 3 and result.shape[-1] == result.shape[-2] > 1:
                self.sides.append(result.shape[-1])
        return results


@pytest.mark.parametrize("training", [False, True])
def test_no_layer_makes_the_whole_attention_matrix(training):
    model = evit("evit_tiny_distilled_patch16_224", img_size=96).train(training)  # 146, then 90, then 56 tokens

    def sides():
        with Squares() as squares:
            output = model(images(height=96, width=96))
            if training:
                output.sum().backward()
        return set(squares.sides) & {146, 90, 56}

    assert sides() == set()
    with sdpa_kernel(SDPBackend.MATH):  # the same model with plain matrix products: the check does see them
        assert sides() == {146, 90, 56}


@torch.no_grad()
def test_attention_on_a_cpu_in_bf16_is_that_of_matrix_products():
    model, teacher = evit(img_size=96), FrozenTeacher(evit(img_size=96), *[((0.5,) * 3, (0.5,) * 3)] * 2)
    batch = Batch(images(height=96, width=96), None, None)

    def sides(dtype):
        with Squares() as squares, engine.autocast(model, dtype):
            logits = model(batch.images)
            teacher(batch)
        return logits, [side for side in squares.sides if side == 145]

    logits, whole = sides(None)
    assert not whole
    rounded, whole = sides(torch.bfloat16)
    assert len(whole) >= 2 * TINY["depth"]  # the layers before the first drop, of model and teacher
    torch.testing.assert_close(rounded.float(), logits, atol=0.05, rtol=0.05)


def test_unfused_attention_has_the_gradients_of_fused_attention():
    model, again = evit().train(), evit().train()
    models.unfuse_attention(again)
    for each in (model, again):
        each(images()).square().mean().backward()
    for first, second in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(first.grad, second.grad, atol=1e-6, rtol=1e-4)
    for block in evit_blocks(again):
        block.attn.attn_drop.p = 1.0  # nothing is attended to
    block = again.blocks[LAYERS[0]]
    attended, _ = block.attn.forward_with_attentiveness(torch.randn(2, 37, 48), 1, 1)
    assert (attended == block.attn.proj.bias).all()


def test_published_and_own_names_are_timm_models_with_deits_configuration():
    for size in ("tiny", "small", "base"):
        for name in (f"evit_{size}_patch16_224", f"deit_{size}_patch16_shrink_base"):
            assert timm.get_pretrained_cfg(name).url == timm.get_pretrained_cfg(f"deit_{size}_patch16_224").url
        assert timm.is_model(f"evit_{size}_distilled_patch16_224")


def test_defaults_are_the_papers():
    model = timm.create_model("evit_tiny_patch16_224")
    assert [layer for layer, block in enumerate(evit_blocks(model)) if block.keep_rate == 0.7] == [3, 6, 9]
    assert all(block.fuse_token for block in evit_blocks(model))


def test_each_layer_may_have_its_rate():
    model = reduce_tokens(evit(), (0.9, 0.5), LAYERS)
    assert [block.keep_rate for block in evit_blocks(model)] == [1.0, 0.9, 1.0, 0.5, 1.0]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"drop_loc": (1, 5)}, "outside 0 to 4"),
        ({"drop_loc": (1, 1)}, "names a layer twice"),
        ({"keep_rate": (0.5,)}, "1 keep rates for 2 layers"),
        ({"keep_rate": 0.0}, "not in"),
        ({"keep_rate": 1.5}, "not in"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        reduce_tokens(evit(), **{"drop_loc": LAYERS} | options)


def test_models_that_cannot_reduce_are_refused():
    with pytest.raises(ValueError, match="no EViT blocks"):
        reduce_tokens(evit("deit_tiny_patch16_224"))
    headless = evit("vit_small_patch16_224", block_fn=EViTBlock, class_token=False, global_pool="avg")
    with pytest.raises(ValueError, match="no class token"):
        reduce_tokens(headless)
    with pytest.raises(NotImplementedError, match="mask"):
        evit_blocks(evit())[1](torch.zeros(1, 37, 48), is_causal=True)


def test_keep_rate_is_1_then_a_cosine_then_final_in_bounded_steps():
    model = evit()
    average = copy.deepcopy(model)
    schedule = KeepRate([model, average], updates_per_epoch=100, start_epoch=2, epochs=4, steps=10)
    seen = []
    for update in range(700):
        schedule.step_update(update)
        seen.append(schedule.value)
        if 200 <= update < 600:  # within a step's half of the exact cosine
            exact = RATES + (1 - RATES) * (math.cos((update - 200) / 400 * math.pi) + 1) / 2
            assert schedule.value == pytest.approx(exact, abs=(1 - RATES) / 20 + 1e-9)
    assert set(seen[:200]) == {1.0} and set(seen[600:]) == {RATES}
    assert seen == sorted(seen, reverse=True) and len(set(seen)) == 11
    assert [block.keep_rate for block in evit_blocks(average)] == [block.keep_rate for block in evit_blocks(model)]


def test_keep_rate_depends_on_the_update_alone():
    schedule = KeepRate([evit()], updates_per_epoch=10, start_epoch=1, epochs=3)
    schedule.step_update(25)
    value = schedule.value
    for update in (0, 99, 25):
        schedule.step_update(update)
        assert schedule.is_comparable == (update == 99)
    assert schedule.value == value
    at_once = KeepRate([evit()], updates_per_epoch=10, start_epoch=0, epochs=0)
    at_once.step_update(0)
    assert at_once.value == RATES


@pytest.fixture
def dynamo_settings():
    """The settings of torch.compile that engine.build_state changes are restored after the test.

    monkeypatch.setattr cannot do that: they are no attributes in the module's __dict__, so it deletes them.
    """
    config = torch._dynamo.config
    names = ("cache_size_limit", "specialize_float", "optimize_ddp")
    with config.patch({name: getattr(config, name) for name in names}):
        yield
    torch._dynamo.reset()


@pytest.mark.compile
@pytest.mark.usefixtures("dynamo_settings")
def test_a_compiled_run_compiles_once_per_keep_rate_and_mode(monkeypatch):
    # Recompilations do not depend on the backend; this one does without a C++ compiler.
    counter, compile_module = CompileCounterWithBackend("aot_eager"), torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **flags: compile_module(self, backend=counter, **flags)
    )
    torch._dynamo.reset()
    flags = [*RUN, *REDUCED, "--compile", "--no-model-ema", "--amp", "off", "--grad-checkpointing"]
    flags += ["--model-kwargs", "embed_dim=48", "depth=1", "num_heads=3"]
    args = parse_args([*flags, "--shrink-start-epoch", "1", "--shrink-epochs", "4"])
    model = models.place(models.build_model(fill(models.ModelOptions, args), 10), CPU)
    options = fill(engine.OptimizerOptions, args)
    state = engine.build_state(model, model, options, 4, (3, 32, 32), None, World.alone(CPU))
    _, schedule = engine.build_schedules(state, 10, fill(engine.ScheduleOptions, args))
    rates = set()
    for update in (0, 8, 20, 50):
        schedule.step_update(update)
        rates.add(schedule.value)
        state.model.train()
        state.model(torch.randn(4, 3, 32, 32)).sum().backward()
        list_of_batches = [Batch(torch.randn(n, 3, 32, 32), torch.zeros(n).long(), torch.arange(n)) for n in (4, 3)]
        engine.evaluate(model, list_of_batches, engine.autocast(model, None))
    assert len(rates) == 3  # of the 11 that there are
    assert counter.frame_count == 2 * len(rates)  # two modes for each rate
    eager = copy.deepcopy(model)
    eager._compiled_call_impl = None
    x = torch.randn(4, 3, 32, 32)
    assert torch.allclose(model(x), eager(x), atol=1e-5)
    assert schedule.value == 0.5 and evit_blocks(eager)[0].keep_rate == 0.5


def test_registration_leaves_nothing_but_models():
    assert set(models_evit.default_cfgs) <= set(models_evit.__all__)


# -- published names ---------------------------------------------------------------------------------------------------

# millions of parameters, as the README of facebookresearch/deit gives them for DeiT III
DEIT3 = {"small_patch16": 22.0, "medium_patch16": 38.8, "base_patch16": 86.6, "large_patch16": 304.4}
DEIT3 |= {"huge_patch14": 632.1}


def on_meta(name, **options):
    """Build the model on the meta device."""
    with torch.device("meta"):
        return timm.create_model(name, **options)


@pytest.mark.parametrize("name", DEIT3)
def test_deit3_names_have_the_published_size_layer_scale_and_weights(name):
    model = on_meta(f"deit_{name}_LS")
    assert sum(map(torch.numel, model.parameters())) / 1e6 == pytest.approx(DEIT3[name], abs=0.1)
    assert model.pos_embed.shape[1] == model.patch_embed.num_patches  # none for the class token
    assert model.pretrained_cfg["url"].endswith(f"deit/deit_3_{name.partition('_')[0]}_224_1k.pth")
    gamma = timm.create_model(f"deit_{name}_LS", depth=1, embed_dim=32, num_heads=1).blocks[0].ls2.gamma
    assert torch.equal(gamma, torch.full((32,), 1e-4))


# of models_v2.py: blocks, width, heads, branches of a block, whether there is LayerScale
THINGS = {
    "deit_tiny_patch16_LS": (12, 192, 3, 1, True),
    "deit_small_patch16_36": (36, 384, 6, 1, False),
    "deit_small_patch16_36_LS": (36, 384, 6, 1, True),
    "deit_small_patch16_18x2": (18, 384, 6, 2, False),
    "deit_small_patch16_18x2_LS": (18, 384, 6, 2, True),
    "deit_base_patch16_36x1": (36, 768, 12, 1, False),
    "deit_base_patch16_36x1_LS": (36, 768, 12, 1, True),
    "deit_base_patch16_18x2": (18, 768, 12, 2, False),
    "deit_base_patch16_18x2_LS": (18, 768, 12, 2, True),
    "deit_huge_patch14_52_LS": (52, 1280, 16, 1, True),
    "deit_huge_patch14_26x2_LS": (26, 1280, 16, 2, True),
}


def arguments_of(name, monkeypatch):
    """What timm builds for a name: (variant, keyword arguments)."""
    built = []

    def build(_, variant, pretrained, **kwargs):
        built.append((variant, kwargs))
        return torch.nn.Identity()

    for module in (deit, cait, mlp_mixer):
        monkeypatch.setattr(module, "build_model_with_cfg", build)
    timm.create_model(name)
    return built[0]


@pytest.mark.parametrize("name", THINGS)
def test_names_without_weights_have_the_published_shape(name, monkeypatch):
    depth, width, heads, branches, has_scale = THINGS[name]
    _, built = arguments_of(name, monkeypatch)
    assert (built["depth"], built["embed_dim"], built["num_heads"]) == (depth, width, heads)
    assert built["init_values"] == (1e-4 if has_scale else None) and built["no_embed_class"]
    block = built["block_fn"](dim=8, num_heads=1, init_values=built["init_values"], drop_path=0.5)
    assert sum(isinstance(module, Attention) for module in block.modules()) == branches
    assert built["pretrained_cfg"]["mean"] == (0.485, 0.456, 0.406) and "url" not in built["pretrained_cfg"]


def test_pretrained_weights_of_a_name_without_are_refused():
    with tiny.user_error("--model deit_tiny_patch16_LS: pretrained weights cannot be loaded"):
        models.build_model(models.ModelOptions("deit_tiny_patch16_LS", pretrained=True), 1000)


@pytest.mark.parametrize("name", ["deit_small_patch16_LS", "deit_small_patch16_18x2"])
def test_deit3_drops_all_blocks_at_one_rate(name):
    def rates(name, **options):
        model = on_meta(name, depth=3, **options)
        return [[m.drop_prob for m in block.modules() if isinstance(m, DropPath)] for block in model.blocks]

    branches = 2 if "x2" in name else 1
    assert rates(name, drop_path_rate=0.3) == [[0.3] * 2 * branches] * 3
    assert rates(name) == [[], [], []]
    # of timm's names it rises
    assert rates("deit3_small_patch16_224", drop_path_rate=0.3) == [
        [],
        [pytest.approx(0.15)] * 2,
        [pytest.approx(0.3)] * 2,
    ]


@pytest.mark.parametrize("size", [160, 192, 384])
def test_deit3_takes_its_published_image_sizes(size):
    options = models.ModelOptions(
        "deit_small_patch16_LS", input_size=(size, size), model_kwargs={"depth": 1, "embed_dim": 48}
    )
    model = models.build_model(options, 5)
    assert model.patch_embed.grid_size == (size // 16, size // 16)
    assert model.pos_embed.shape[1] == (size // 16) ** 2
    with tiny.user_error("160 is not a multiple of the 14 px patch", "use 154 or 168"):
        models.try_out(
            on_meta("deit_huge_patch14_LS", img_size=160, depth=1), "--model deit_huge_patch14_LS", (160, 160)
        )


# of cait_models.py and resmlp_models.py: image size, width, blocks
SHAPES = {
    "cait_XXS24_224": (224, 192, 24),
    "cait_XXS24": (384, 192, 24),
    "cait_XXS36_224": (224, 192, 36),
    "cait_XXS36": (384, 192, 36),
    "cait_XS24": (384, 288, 24),
    "cait_S24_224": (224, 384, 24),
    "cait_S24": (384, 384, 24),
    "cait_S36": (384, 384, 36),
    "cait_M36": (384, 768, 36),
    "cait_M48": (448, 768, 48),
    "resmlp_12": (224, 384, 12),
    "resmlp_24": (224, 384, 24),
    "resmlp_36": (224, 384, 36),
    "resmlpB_24": (224, 768, 24),
}


@pytest.mark.parametrize("name", SHAPES)
def test_cait_and_resmlp_have_their_published_names(name, monkeypatch):
    variant, built = arguments_of(name, monkeypatch)
    config = timm.get_pretrained_cfg(name)
    assert (config.input_size[1], built["embed_dim"], built.get("depth", built.get("num_blocks"))) == SHAPES[name]
    assert config.url == timm.get_pretrained_cfg(variant).url
    file = config.url.rpartition("/")[2].removesuffix(".pth").removesuffix("_no_dist")
    size = SHAPES[name][0]
    assert file == (name if name.startswith("res") else f"{name.removeprefix('cait_').removesuffix('_224')}_{size}")


def test_every_published_name_has_been_compared():
    deit3 = {f"deit_{name}_LS" for name in DEIT3}
    assert models_evit.PUBLISHED.keys() == deit3 | SHAPES.keys() and models_evit.UNTRAINED.keys() == THINGS.keys()


@pytest.mark.parametrize(
    "name, size, rate",
    [
        ("224_shrink_base", 224, 0.7),
        ("224_shrink", 224, 0.7),
        ("272_shrink", 272, 0.7),
        ("224_shrink05", 224, 0.5),
        ("288_shrink06", 288, 0.6),
        ("304_shrink05", 304, 0.5),
    ],
)
def test_example_names_of_evit_have_their_sizes_and_rates(name, size, rate):
    model = on_meta(f"deit_small_patch16_{name}")
    assert model.patch_embed.img_size == (size, size) and model.embed_dim == 384
    assert [block.keep_rate for block in evit_blocks(model)] == [rate if i in (3, 6, 9) else 1.0 for i in range(12)]
    assert models_evit.is_evit(f"deit_small_patch16_{name}")
    assert timm.get_pretrained_cfg(f"deit_small_patch16_{name}").input_size == (3, size, size)


RUN = ["--model", "evit_tiny_distilled_patch16_224", *tiny.MODEL, *tiny.DATA, "--warmup-epochs", "0"]
REDUCED = ["--drop-loc", "0", "--base-keep-rate", "0.5"]


@pytest.mark.process
def test_a_distilled_evit_trains_resumes_and_evaluates_at_its_final_rate(tmp_path, monkeypatch):
    few = ["--train-fraction", "0.25", "--batch-size", "32"]
    main.cli([*tiny.RESNET, *few, "--epochs", "1", "--output-dir", str(tmp_path / "teacher")])
    run = [*RUN, *REDUCED, *few, "--shrink_start_epoch", "1", "--shrink_epochs", "2", "--epochs", "4"]
    run += ["--distillation-type", "hard", "--teacher-model", "test_resnet"]
    run += ["--teacher-path", str(tmp_path / "teacher" / "best.pth"), "--output-dir", str(tmp_path / "student")]
    main.cli(run)
    whole = tiny.log_of(tmp_path / "student")
    rates = [record["keep_rate"] for record in whole]
    assert rates[0] == 1.0 and 0.5 < rates[1] < 1.0 and rates[2:] == [0.5, 0.5]
    best = torch.load(tmp_path / "student" / "best.pth", weights_only=True)
    final = {record["epoch"]: record["test_acc1"] for record in whole[2:]}
    assert best["best_acc1"] == final[best["epoch"] - 1] == max(final.values())
    main.cli([*run, "--output-dir", str(tmp_path / "again"), "--resume", str(tmp_path / "student" / "best.pth")])
    again = tiny.log_of(tmp_path / "again")
    previous = tmp_path / "student" / "checkpoint_previous.pth"
    for name in ("keep_rate", "test_loss", "test_ema_loss"):
        assert [record[name] for record in again] == [record[name] for record in whole]
    output = tiny.run("main.py", *RUN, *REDUCED, "--eval", "--resume", tmp_path / "student" / "checkpoint.pth")
    assert f"test_loss {whole[-1]['test_loss']:.4g}" in output
    assert f"test_ema_loss {whole[-1]['test_ema_loss']:.4g}" in output
    rates, evaluate = [], engine.evaluate

    def noting(model, *rest):
        rates.append([block.keep_rate for block in evit_blocks(model)])
        return evaluate(model, *rest)

    monkeypatch.setattr(engine, "evaluate", noting)
    main.cli([*RUN, *REDUCED, "--eval", "--resume", str(previous)])
    assert rates == [[0.5, 1.0]] * 2  # the weights and their average


def test_weights_of_a_deit_load_into_the_evit_and_back(tmp_path):
    for name, start in (("deit", None), ("evit", "deit"), ("deit", "evit")):
        flags = ["--model", f"{name}_tiny_patch16_224", *tiny.MODEL, *tiny.DATA, "--epochs", "1", "--overwrite"]
        flags += ["--train-fraction", "0.1", "--batch-size", "32"]
        flags += ["--finetune", str(tmp_path / start / "checkpoint.pth")] if start else []
        flags += REDUCED if name == "evit" else []
        main.cli([*flags, "--output-dir", str(tmp_path / name)])
        assert len(tiny.log_of(tmp_path / name)) == 1
