"""Rewrites of the graph: each alone and all together give the numbers of eager, and are found where they should be."""

import collections
import copy
import dataclasses

import original
import pytest
import torch
import torch.nn.functional as F
from models import quantize_by_hand, run_unet, tiny_sdxl_unet, unet_inputs
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch._subclasses import FakeTensorMode

from mixdq_ao import MixDQConfig, MixDQTensor, Passes, families, observe, quantize_
from mixdq_ao.passes import REWRITES, FuseQuantizers
from mixdq_ao.siblings import mark_shared, pack_siblings_

SWITCHES = [f.name for f in dataclasses.fields(Passes) if f.type is bool]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Backend:
    """Runs the pass, counts the calls that are left, and executes the graph without a compiler."""

    def __init__(self, passes: Passes | None = None, attention: str | None = None):
        self.fuse = FuseQuantizers(passes, attention)
        self.calls = collections.Counter()

    def __call__(self, gm, inputs):
        self.fuse(gm.graph)
        # torch 2.11 looks the graph up in its cache now, and wants this.
        assert all("example_value" in node.args[0].meta for node in gm.graph.nodes if node.op == "call_method")
        gm.recompile()
        self.calls = collections.Counter(
            node.target if isinstance(node.target, str) else node.target.__name__
            for node in gm.graph.nodes
            if node.op in ("call_function", "call_method")
        )
        return aot_eager(gm, inputs)


def compiled(module, passes: Passes | None = None, attention: str | None = None):
    backend = Backend(passes, attention)
    return torch.compile(module, fullgraph=True, backend=backend, dynamic=False), backend


def check(module, *args, passes: Passes | None = None, attention: str | None = None, **kwargs) -> Backend:
    """Bit-equal to eager, and how that was done."""
    fast, backend = compiled(module, passes, attention)
    with torch.no_grad():
        assert torch.equal(fast(*args, **kwargs), module(*args, **kwargs))
    return backend


def alone(*names: str) -> Passes:
    return dataclasses.replace(Passes.none(), **dict.fromkeys(names, True))


def static(layer: nn.Module, **options) -> nn.Module:
    values = {"act_scale": 0.05, "act_zero_point": 3.0, **options}
    layer.weight = nn.Parameter(MixDQTensor.from_float(layer.weight, **values), requires_grad=False)
    return layer


def noise(*shape, seed=1, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# --- a transformer block ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quantized_block():
    from diffusers.models.attention import BasicTransformerBlock

    torch.manual_seed(0)
    block = BasicTransformerBlock(32, 4, 8, cross_attention_dim=24, activation_fn="geglu").eval()
    with observe(block) as recorder:
        block(*tokens())
    quantize_(block, MixDQConfig(recorder.params()))
    return block.requires_grad_(False)


@pytest.fixture
def block(quantized_block):
    return copy.deepcopy(quantized_block)


def tokens(dtype=torch.float32):
    return noise(2, 16, 32, dtype=dtype), None, noise(2, 7, 24, seed=2, dtype=dtype)


BLOCK_HITS = {
    "layers": 10,
    "share": 3,
    "merge": 2,
    "residual": 3,
    "layer_norm": 3,
    "geglu": 1,
    "geglu_product": 1,
    "opaque": 3,
}


def test_a_transformer_block(block):
    backend = check(block, *tokens())
    assert {name: n for name, n in backend.fuse.hits.items() if n and name != "no_ops"} == BLOCK_HITS
    assert sum(backend.calls[name] for name in ("linear", "linear_multi", "linear_geglu")) == 7
    left = ("add", "layer_norm", "gelu", "quantize_traced", "dropout", "truediv", "to")
    assert not any(backend.calls[name] for name in left)


# What a rewrite finds with those alone that it cannot do without.
ALONE = {"merge": (["share"], 2), "share": ([], 3), "residual": (["no_ops"], 3), "geglu": (["no_ops"], 1),
         "geglu_product": (["no_ops", "geglu"], 1), "attention_quantize": ([], 0), "layer_norm": ([], 5),
         "group_norm": ([], 0), "opaque": ([], 2), "no_ops": ([], 7)}  # fmt: skip


@pytest.mark.parametrize("name", SWITCHES)
def test_each_rewrite_alone(block, name):
    needs, hits = ALONE[name]
    found = check(block, *tokens(), passes=alone(name, *needs)).fuse.hits
    assert set(found) == {"layers", name, *needs} and found[name] == hits


def test_no_rewrites(block):
    backend = check(block, *tokens(), passes=Passes.none())
    assert set(backend.fuse.hits) == {"layers"} and backend.calls["quantize_traced"] == 10


def test_without_one_rewrite(block):
    for name in SWITCHES:
        check(block, *tokens(), passes=dataclasses.replace(Passes(), **{name: False}))
        torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(block, dtype):
    """Norms and residuals are not rounded in between, so codes differ here and there."""
    block.to(dtype)
    fast, _ = compiled(block)
    with torch.no_grad():
        expected, found = block(*tokens(dtype)), fast(*tokens(dtype))
    assert found.dtype == dtype
    assert (found - expected).float().norm() < 0.02 * expected.float().norm()


def test_blocks_share_the_text_and_one_graph_each(quantized_block):
    """All keys and values of the text become one product, at most so many together."""
    blocks = nn.ModuleList(copy.deepcopy(quantized_block) for _ in range(3))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = blocks

        def forward(self, x, mask, text):
            for one in self.blocks:
                x = one(x, mask, text)
            return x

    for max_merged, merged in ((20, 1), (4, 2), (2, 3)):
        backend = check(Model(), *tokens(), passes=Passes(max_merged=max_merged))
        assert backend.fuse.hits["merge"] == 3 + merged
        torch._dynamo.reset()


def test_equal_blocks_share_a_graph(quantized_block):
    blocks = [copy.deepcopy(quantized_block) for _ in range(3)]
    backend = Backend()
    torch._dynamo.utils.counters.clear()
    x, mask, text = tokens()
    for one in blocks:
        one.compile(fullgraph=True, backend=backend)
        with torch.no_grad():
            x = one(x, mask, text)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


# --- what must not be merged ------------------------------------------------------------------------------------------


def with_other_scale(layer: nn.Linear) -> None:
    w = layer.weight
    other = MixDQTensor.from_float(w.dequantize(), act_scale=w.act_scale * 2, act_zero_point=w.act_zero_point)
    layer.weight = nn.Parameter(other, requires_grad=False)


def test_unequal_siblings_are_not_merged(block):
    with_other_scale(block.attn1.to_k)
    mark_shared(block)
    backend = check(block, *tokens())
    assert backend.fuse.hits["merge"] == 2 and backend.fuse.hits["share"] == 2
    assert backend.fuse.hits["layer_norm"] == 4  # one for each scale


def test_siblings_without_a_number_are_not_merged(block):
    for layer in families.layers_of(block).values():
        layer.weight.act_group = None
    backend = check(block, *tokens())
    assert not backend.fuse.hits["merge"] and not backend.fuse.hits["share"]


def test_a_changed_scale_is_compiled_again(block):
    """A merged layer that gets other parameters is never run with its sibling's."""
    fast, backend = compiled(block)
    with torch.no_grad():
        fast(*tokens())
        assert backend.fuse.hits["merge"] == 2
        other = copy.deepcopy(block.attn1.to_v)
        with_other_scale(other)
        block.attn1.to_v.weight.copy_(other.weight)
        assert torch.equal(fast(*tokens()), block(*tokens()))
    assert backend.fuse.hits["share"] == 2


def test_mixed_widths_share_a_quantizer_and_not_a_product(block):
    w = block.attn1.to_v.weight
    narrow = MixDQTensor.from_float(w.dequantize(), 4, act_scale=w.act_scale, act_zero_point=w.act_zero_point)
    block.attn1.to_v.weight = nn.Parameter(narrow, requires_grad=False)
    mark_shared(block)
    backend = check(block, *tokens())
    assert backend.fuse.hits["share"] == 3 and backend.fuse.hits["merge"] == 2 and backend.calls["linear"] == 5


def test_packed_weights_run_in_the_same_graph(block):
    """Adjacency is no guard: the operator looks at run time."""
    fast, backend = compiled(block)
    with torch.no_grad():
        before = fast(*tokens())
        backend.fuse = None  # called again it would fail
        pack_siblings_(block)
        assert torch.equal(fast(*tokens()), before)


def test_a_lora_does_not_match(block):
    peft = pytest.importorskip("peft")
    adapted = peft.inject_adapter_in_model(
        peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), copy.deepcopy(block)
    )
    backend = check(adapted.requires_grad_(False), *tokens())
    assert backend.fuse.hits["layers"] == 10 and backend.fuse.hits["layer_norm"] == 1
    # The floating norm is read by the LoRA as well; its quantizers stay by themselves.
    assert backend.calls["layer_norm"] == 2


@pytest.mark.parametrize("options", [{"act_scale": None, "act_bits": 8}, {"act_scale": None, "act_zero_point": None}])
def test_dynamic_and_weight_only_layers_are_left_alone(options):
    weight = MixDQTensor.from_float(torch.randn(8, 16), act_bits=options.get("act_bits"))
    layer = nn.Linear(16, 8)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    assert check(layer, noise(2, 5, 16)).fuse.hits["layers"] == 0


# --- the BOS token ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [True, False], ids=["bos_input", "always"])
def test_bos_rows_of_merged_layers(block, known):
    """Only samples that start with the BOS token get its output, in every merged layer its own."""
    _, _, text = x = tokens()
    bos = text[0, 0].clone() if known else None
    for layer in (block.attn2.to_k, block.attn2.to_v):
        w = layer.weight
        layer.weight = nn.Parameter(
            MixDQTensor.from_float(
                w.dequantize(),
                act_scale=w.act_scale,
                act_zero_point=w.act_zero_point,
                bos_input=bos,
                bos_output=noise(32, seed=id(layer) % 100),
            ),
            requires_grad=False,
        )
    mark_shared(block)
    without = copy.deepcopy(block)
    for layer in (without.attn2.to_k, without.attn2.to_v):
        layer.weight.bos_output = layer.weight.bos_input = None
    assert check(block, *x).fuse.hits["merge"] == 2
    changed = (block(*x) != without(*x)).flatten(1).any(1)
    assert changed.tolist() == [True, not known]


# --- convolutions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [(32, 32), (32, 64)], ids=["same", "shortcut"])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_resnet_block(channels, batch):
    from diffusers.models.resnet import ResnetBlock2D

    torch.manual_seed(0)
    block = ResnetBlock2D(in_channels=channels[0], out_channels=channels[1], temb_channels=24, groups=8).eval()
    x, temb = noise(batch, channels[0], 9, 7), noise(batch, 24)
    quantize_by_hand(block, lambda: block(x, temb))
    backend = check(block.requires_grad_(False), x, temb)
    hits = backend.fuse.hits
    assert (hits["group_norm"], hits["residual"]) == (2, 2)  # the time embedding is one
    assert not backend.calls["add"] and not backend.calls["group_norm"]


def test_a_transformer_at_its_ends(unet):
    """GroupNorm quantizes before pixels become tokens; the residual is added before tokens become pixels."""
    transformer = unet.down_blocks[1].attentions[0]
    x, text = noise(2, 64, 4, 4), noise(2, 7, 64, seed=2)

    def run(x):
        return transformer(x, encoder_hidden_states=text, return_dict=False)[0]

    backend = check(run, x)
    assert backend.fuse.hits["group_norm"] == 1 and backend.fuse.hits["residual"] == 4
    assert not backend.calls["contiguous"]


@pytest.mark.parametrize("tokens, hits", [((2, 12), 1), ((6, 4), 0), ((1, 24), 0)])
def test_tokens_that_become_pixels(tokens, hits):
    """A layer of lines, or of all images at once, has no place for the residual of an image."""
    layer, x, image = static(nn.Linear(16, 16)), noise(*tokens, 16), noise(2, 16, 3, 4)

    def run(x, image):
        return layer(x).reshape(2, 3, 4, 16).permute(0, 3, 1, 2).contiguous() + image

    assert check(run, x, image).fuse.hits["residual"] == hits


class Conv(nn.Module):
    def __init__(self, norm=True, silu=True, **options):
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.GroupNorm(4, 16) if norm else nn.Identity()
        self.conv = static(nn.Conv2d(16, 8, 3, **options))
        self.silu = silu

    def forward(self, x):
        x = self.norm(x)
        return self.conv(F.silu(x) if self.silu else x)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize(
    "options", [{"padding": 1}, {"padding": "same", "dilation": 2}, {"stride": 2}, {"padding": (2, 0)}]
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_group_norm_before_a_convolution(options, silu, layout):
    x = noise(2, 16, 9, 8).to(memory_format=layout)
    assert check(Conv(silu=silu, **options), x).fuse.hits["group_norm"] == 1


def test_a_convolution_without_a_norm_and_of_one_image():
    assert check(Conv(norm=False, padding=1), noise(2, 16, 6, 6)).fuse.hits["layers"] == 1
    torch._dynamo.reset()
    assert check(Conv(norm=False, padding=1).conv, noise(16, 6, 6)).fuse.hits["layers"] == 0


class Functions(nn.Module):
    """A layer behind what is almost one of the patterns."""

    def __init__(self, before=None, after=None):
        super().__init__()
        torch.manual_seed(0)
        self.linear = static(nn.Linear(16, 16))
        self.before, self.after = before, after

    def forward(self, x):
        y = x if self.before is None else self.before(x)
        y = self.linear(y)
        return y if self.after is None else self.after(y, x)


def tanh_geglu(x):
    a, b = x.repeat(1, 1, 2).chunk(2, dim=-1)
    return a * F.gelu(b, approximate="tanh")


def swapped_geglu(x):
    gate, value = torch.cat([x, x + 1], -1).chunk(2, dim=-1)
    return value * F.gelu(gate)


def tokens_geglu(x):
    a, b = x.repeat(1, 2, 1).chunk(2, dim=1)
    return a * F.gelu(b)


@pytest.mark.parametrize(
    "before, after, name",
    [
        (tanh_geglu, None, "geglu"),
        (swapped_geglu, None, "geglu"),
        (tokens_geglu, None, "geglu"),
        (lambda x: F.layer_norm(x, x.shape[-2:]), None, "layer_norm"),
        (None, lambda y, x: y + x[:1], "residual"),
        (None, lambda y, x: y + x.double(), "residual"),
        (None, lambda y, x: (y + x) * y, "residual"),
        (None, lambda y, x: torch.add(y, x, alpha=2), "residual"),
        (lambda x: F.dropout(x, 0.5, training=False) / 2.0, None, "layer_norm"),
    ],
)
def test_near_misses(before, after, name):
    assert check(Functions(before, after), noise(2, 5, 16)).fuse.hits[name] == 0


@pytest.mark.parametrize("after", [lambda y, x: y + x, lambda y, x: x + y, lambda y, x: F.dropout(y, 0.0) / 1.0 + x])
def test_residuals(after):
    assert check(Functions(after=after), noise(2, 5, 16)).fuse.hits["residual"] == 1


class FeedForward(nn.Module):
    """``between`` may change what GEGLU reads; ``groups`` are those of the layer that reads the codes."""

    def __init__(self, between=None, groups=None):
        super().__init__()
        static_of = {} if groups is None else {"input_groups": groups}
        self.wide = static(nn.Linear(16, 64))
        scale = [0.05] * len(groups or [1])
        self.narrow = static(nn.Linear(32, 16), act_scale=scale, act_zero_point=[3.0] * len(scale), **static_of)
        self.between = between

    def forward(self, x):
        y = self.wide(x)
        value, gate = (y if self.between is None else self.between(y)).chunk(2, dim=-1)
        z = self.narrow(value * F.gelu(gate))
        return z if self.between is None else z + y.mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_geglu_joins_the_product_before_it(dtype):
    """Which rounds its outputs as if it had written them."""
    module, x = FeedForward().to(dtype), noise(2, 5, 16, dtype=dtype)
    (apart, _), (joined, backend) = compiled(module, Passes(geglu_product=False)), compiled(module)
    with torch.no_grad():
        expected = apart(x)
        torch._dynamo.reset()
        assert torch.equal(joined(x), expected)
    assert backend.fuse.hits["geglu_product"] == backend.calls["linear_geglu"] == 1


@pytest.mark.parametrize(
    "between, groups",
    [(lambda y: y, None), (lambda y: y + 1, None), (None, [20, 12])],
    ids=["read", "changed", "groups"],
)
def test_products_that_geglu_does_not_join(between, groups):
    backend = check(FeedForward(between, groups), noise(2, 5, 16))
    assert backend.fuse.hits["geglu"] == 1 and backend.fuse.hits["geglu_product"] == 0


@pytest.mark.parametrize("affine", [True, False])
def test_layer_norm_with_and_without_weights(affine):
    norm = nn.LayerNorm(16, eps=1e-3, elementwise_affine=affine)
    assert check(Functions(norm), noise(2, 5, 16)).fuse.hits["layer_norm"] == 1


def test_a_norm_that_is_read_elsewhere_stays():
    class Model(Functions):
        def forward(self, x):
            y = F.layer_norm(x, (16,))
            return self.linear(y) + y.mean()

    backend = check(Model(), noise(2, 5, 16))
    assert backend.fuse.hits["layer_norm"] == 0 and backend.calls["layer_norm"] == 1


def add_in_place(x, y):
    x += y


def write_slice(x, y):
    x[:, 0] = y[:, 0]


WRITES = [
    torch.Tensor.add_,
    torch.Tensor.copy_,
    add_in_place,
    write_slice,
    lambda x, y: torch.add(x, y, out=x),
    lambda x, y: F.relu(x, inplace=True),
    lambda x, y: F.silu(x, True),
    lambda x, y: x[..., :3].zero_(),
]


@pytest.mark.parametrize("write", WRITES)
def test_nothing_is_shared_or_moved_over_a_write(write):
    """The same tensor holds other values before and after it."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = static(nn.Linear(16, 16)), static(nn.Linear(16, 16))
            self.a.weight.act_group = self.b.weight.act_group = 0

        def forward(self, x):
            x = x * 1.5
            y = F.layer_norm(x, (16,))
            first = self.a(x)
            write(x, first)
            return first + self.b(x) + self.a(y)

    hits = check(Model(), noise(2, 5, 16)).fuse.hits
    assert set(hits) == {"in_place", "layers"}


# --- attention --------------------------------------------------------------------------------------------------------


def qkv(*shape, dtype=torch.float32, seed=1) -> list[torch.Tensor]:
    return [noise(*shape, seed=seed + i, dtype=dtype) for i in range(3)]


class Attend(nn.Module):
    """Attention of 3 heads of 16 channels, and a layer that reads it; ``options`` are the layer's weight's."""

    def __init__(self, merge=lambda y: y.transpose(1, 2).reshape(2, -1, 48), after=lambda y, x: y, **options):
        super().__init__()
        torch.manual_seed(0)
        self.layer = static(nn.Linear(48, 16), **options)
        self.merge, self.after = merge, after

    def forward(self, q, k, v):
        x = self.merge(F.scaled_dot_product_attention(q, k, v))
        return self.after(self.layer(x), x)


def test_attention_of_a_block(block):
    """A named backend stands in for torch's, and quantizes its output: of self- and of cross-attention."""
    backend = check(block, *tokens(), attention="flash")
    hits = backend.fuse.hits
    assert hits["attention"] == hits["attention_quantize"] == backend.calls["attend_quantize"] == 2
    assert {name: hits[name] for name in BLOCK_HITS} == {**BLOCK_HITS, "opaque": 1}
    assert not backend.calls["attend"]


def test_attention_that_is_quantized_afterwards(block):
    passes = dataclasses.replace(Passes(), attention_quantize=False)
    backend = check(block, *tokens(), passes=passes, attention="flash")
    assert backend.calls["attend"] == backend.fuse.hits["attention"] == 2
    assert {name: backend.fuse.hits[name] for name in BLOCK_HITS} == BLOCK_HITS


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("act_bits", [8, 4])
def test_attention_rounds_before_it_quantizes(dtype, act_bits):
    backend = check(Attend(act_bits=act_bits).to(dtype), *qkv(2, 3, 7, 16, dtype=dtype), attention="flash")
    assert backend.fuse.hits["attention_quantize"] == 1 and backend.calls == {"attend_quantize": 1, "linear": 1}


NO_CODES = {
    "heads stay apart": {"merge": lambda y: y.flatten(1, 2).mT.reshape(2, 7, 48)},
    "tokens and heads mixed": {"merge": lambda y: y.reshape(2, 7, 48)},
    "two images in a row": {"merge": lambda y: y.transpose(1, 2).reshape(14, 48)},
    "changed": {"merge": lambda y: y.transpose(1, 2).reshape(2, 7, 48) + 1},
    "read": {"after": lambda y, x: y + x.mean()},
    "groups": {"input_groups": [20, 28], "act_scale": [0.05] * 2, "act_zero_point": [3.0] * 2},
    "a known first row": {"bos_output": noise(16)},
}


@pytest.mark.parametrize("options", NO_CODES.values(), ids=NO_CODES)
def test_attention_that_gives_no_codes(options):
    backend = check(Attend(**options), *qkv(2, 3, 7, 16), attention="flash")
    assert backend.fuse.hits["attention"] == 1 and not backend.fuse.hits["attention_quantize"]


def test_attention_of_two_readers_is_computed_once():
    """Equal parameters share its codes; others need its output."""

    class Model(Attend):
        def __init__(self):
            super().__init__()
            self.other = static(nn.Linear(48, 16))

        def forward(self, q, k, v):
            y = self.merge(F.scaled_dot_product_attention(q, k, v))
            return self.layer(y) + self.other(y)

    model, hits = Model(), []
    for group in (0, None):
        model.layer.weight.act_group = model.other.weight.act_group = group
        backend = check(model, *qkv(2, 3, 7, 16), attention="flash")
        hits.append((backend.fuse.hits["attention_quantize"], backend.calls["attend"]))
        torch._dynamo.reset()
    assert hits == [(1, 0), (0, 1)]


@pytest.mark.parametrize("attention", ["auto", None])
def test_attention_on_a_cpu_is_torchs(block, attention):
    backend = check(block, *tokens(), attention=attention)
    assert backend.calls["scaled_dot_product_attention"] == 2
    assert not backend.fuse.hits["attention"] and not backend.fuse.hits["attention_quantize"]


@pytest.mark.parametrize("device, hits", [("cuda", 1), ("cpu", 0)])
def test_attention_is_chosen_where_there_is_a_choice(device, hits):
    """On a GPU, which no test needs to have."""
    graph, fuse = torch.fx.Graph(), FuseQuantizers(Passes.none(), "auto")
    with FakeTensorMode():
        for name in "qkv":
            graph.placeholder(name).meta["example_value"] = torch.empty(2, 4, 64, 64, device=device)
        node = graph.call_function(F.scaled_dot_product_attention, tuple(graph.nodes), {"attn_mask": None})
        node.meta["example_value"] = torch.empty(2, 4, 64, 64, device=device)
    graph.output(node)
    fuse(graph)
    assert fuse.hits["attention"] == hits


ATTENTION = {
    "plain": ({}, 1),
    "scaled": ({"scale": 0.3}, 1),
    "switched off": ({"attn_mask": None, "dropout_p": 0.0, "is_causal": False}, 1),
    "masked": ({"attn_mask": torch.ones(7, 7).tril().bool()}, 0),
    "causal": ({"is_causal": True}, 0),
    "grouped": ({"enable_gqa": True}, 0),
}


@pytest.mark.parametrize("options, hits", ATTENTION.values(), ids=ATTENTION)
def test_attention_that_can_be_given_to_a_backend(options, hits):
    found = check(lambda *x: F.scaled_dot_product_attention(*x, **options), *qkv(2, 2, 7, 16), attention="flash")
    assert found.fuse.hits["attention"] == hits


@pytest.mark.parametrize(
    "q, k, v",
    [qkv(2, 7, 16), qkv(2, 2, 7, 12), [noise(2, 2, 7, 16), noise(1, 2, 7, 16), noise(1, 2, 7, 16)],
     [noise(2, 2, 7, 16), noise(2, 2, 7, 16), noise(2, 2, 7, 24)]],
    ids=["3 dimensions", "12 channels", "broadcast", "unequal channels"],
)  # fmt: skip
def test_odd_sizes_are_left_to_torch(q, k, v):
    assert not check(F.scaled_dot_product_attention, q, k, v, attention="flash").fuse.hits["attention"]


def test_attention_with_gradients_is_left_to_torch():
    fast, backend = compiled(F.scaled_dot_product_attention, attention="math")
    x = [t.requires_grad_() for t in qkv(2, 2, 7, 16)]
    fast(*x).sum().backward()
    assert not backend.fuse.hits["attention"] and all(t.grad is not None for t in x)


def test_attention_under_autocast_is_left_to_torch():
    """Which computes it in another dtype than its inputs have."""
    fast, backend = compiled(F.scaled_dot_product_attention, attention="math")
    x = qkv(2, 2, 7, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast(*x), F.scaled_dot_product_attention(*x))
    assert not backend.fuse.hits["attention"]


def test_attention_of_any_size_is_one_graph(block):
    backend = Backend(attention="flash")
    fast = torch.compile(block.attn1, fullgraph=True, backend=backend, dynamic=True)
    torch._dynamo.utils.counters.clear()
    for batch, length in ((2, 16), (3, 9)):
        x = noise(batch, length, 32)
        with torch.no_grad():
            assert torch.equal(fast(x), block.attn1(x))
    assert backend.fuse.hits["attention"] == 1 and torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_inputs_by_keyword():
    def run(x):
        a, b = torch.chunk(input=layer(F.layer_norm(input=x, normalized_shape=(16,))), chunks=2, dim=-1)
        return half(a * F.gelu(input=F.dropout(input=F.silu(input=b), p=0.0)))

    layer, half = static(nn.Linear(16, 16)), static(nn.Linear(8, 8))
    assert check(run, noise(2, 5, 16)).fuse.hits["layer_norm"] == 1


def test_errors_are_those_of_eager():
    with pytest.raises(Exception, match="must be 16"):
        compiled(static(nn.Linear(16, 8)))[0](noise(2, 15))


def test_dynamic_sizes(block):
    backend = Backend()
    fast = torch.compile(block, fullgraph=True, backend=backend, dynamic=True)
    for batch, length in ((2, 16), (3, 9), (4, 25)):
        x, text = noise(batch, length, 32), noise(batch, 7, 24)
        with torch.no_grad():
            assert torch.equal(fast(x, None, text), block(x, None, text))
    # A length that is computed from others is not known to be equal to them, and a residual then stays an addition.
    assert backend.fuse.hits["residual"] >= 1 and backend.fuse.hits["merge"] == 2


# --- whole models -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unet():
    unet = tiny_sdxl_unet(layers_per_block=1)
    with observe(unet) as recorder:
        run_unet(unet, **unet_inputs())
    quantize_(unet, MixDQConfig(recorder.params()))
    return unet.requires_grad_(False)


@pytest.mark.parametrize("attention, quantized", [(None, 0), ("flash", 2 * 11)])
def test_a_unet(unet, attention, quantized):
    """11 transformer blocks, 10 resnets. Two products for 22 keys and values of the text, one for the time."""
    fast, backend = compiled(unet, attention=attention)
    inputs = unet_inputs(batch=2)
    assert torch.equal(run_unet(fast, **inputs), run_unet(unet, **inputs))
    hits = backend.fuse.hits
    assert hits["layers"] == len(families.layers_of(unet)) == 174
    assert {name: hits[name] for name in REWRITES if name not in ("layers", "no_ops")} == {
        "share": 2 * 11 + 21 + 10,
        "merge": 11 + 2 + 1,
        "residual": 3 * 11 + 8 + 10 + 11 + 1,
        "layer_norm": 3 * 11,
        "geglu": 11,
        "geglu_product": 11,
        "attention_quantize": quantized,
        "group_norm": 2 * 10 + 8 + 1 + 1,
        "opaque": 34 - quantized,
    }


class Stop(Exception):
    pass


@pytest.mark.parametrize("attention, quantized", [(None, {}), ("mixdq", {"attention": 2 * 70})])
def test_sdxl(attention, quantized):
    """The true architecture, without memory: 70 transformer blocks, 11 transformers, 17 resnets."""
    unet = original.make_unet(original.SDXL_CONFIG, device="meta").half()
    for layer in families.layers_of(unet).values():
        static(layer)
    for layers in families.siblings_of(unet):
        for layer in layers.values():
            layer.weight.act_group = 0
    fuse = FuseQuantizers(backend=attention)

    def backend(gm, inputs):
        fuse(gm.graph)
        raise Stop

    half = {"device": "meta", "dtype": torch.float16}
    inputs = {
        "sample": torch.empty(1, 4, 64, 64, **half),
        "timestep": torch.empty((), device="meta"),
        "encoder_hidden_states": torch.empty(1, 77, 2048, **half),
        "added_cond_kwargs": {"text_embeds": torch.empty(1, 1280, **half), "time_ids": torch.empty(1, 6, **half)},
    }
    with pytest.raises(Exception, match="Stop"):
        run_unet(torch.compile(unet, fullgraph=True, dynamic=False, backend=backend), **inputs)
    assert dict(fuse.hits) == {
        **quantized,
        "no_ops": 541,
        "layers": 794,
        "share": 2 * 70 + 139 + 16,
        "merge": 70 + 7 + 1,
        "residual": 3 * 70 + 11 + 2 * 17 + 1,
        "layer_norm": 3 * 70,
        "geglu": 70,
        "geglu_product": 70,
        "attention_quantize": sum(quantized.values()),
        "group_norm": 2 * 17 + 11 + 1,
        "opaque": 157 - sum(quantized.values()),
    }


def test_the_uuid_knows_the_passes():
    assert FuseQuantizers().uuid() == FuseQuantizers(Passes()).uuid()
    assert len({FuseQuantizers(p).uuid() for p in (Passes(), Passes.none(), Passes(max_merged=3))}) == 3
    assert len({FuseQuantizers(backend=name).uuid() for name in (None, "auto", "flash")}) == 3
