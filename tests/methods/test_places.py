# SPDX-License-Identifier: Apache-2.0
"""Places of adapters in blocks, by what the block computes: which sums, which norms of these, and for which stream."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils._pytree import tree_map

import graft
from graft.core.errors import UnsupportedLayerError
from graft.methods.flow import UnfollowedError
from graft.methods.places import Block, chosen_blocks, find_blocks, walk
from tests.looks import layers
from tests.models import STD, checkpoint, inputs, make, seeded
from tests.raised import refuses

SIZES = dict(
    vocab_size=40, hidden_size=24, d_model=24, n_embd=24, num_hidden_layers=2, encoder_layers=2, decoder_layers=2,
    n_layer=2,
    num_attention_heads=3, encoder_attention_heads=3, decoder_attention_heads=3, n_head=3, num_key_value_heads=3,
    head_dim=8, intermediate_size=36, encoder_ffn_dim=36, decoder_ffn_dim=36, ffn_dim=36, n_inner=36,
    max_position_embeddings=32, n_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    decoder_start_token_id=1,
    initializer_range=STD, init_std=STD,
)  # fmt: skip
POST, PRE = "output.LayerNorm", None
FAMILIES = {  # name of the model, without its ending → the norm after its MLP's sum, and further sizes
    "MPNet": (POST, {}),
    "Longformer": (POST, dict(attention_window=4)),
    "BigBird": (POST, dict(attention_type="original_full")),
    "RoFormer": (POST, {}),
    "Luke": (POST, dict(entity_vocab_size=5, entity_emb_size=6)),
    "ConvBert": (POST, dict(num_attention_heads=4, embedding_size=24)),
    "RemBert": (POST, dict(input_embedding_size=6, output_embedding_size=6)),
    "Data2VecText": (POST, {}),
    "MarkupLM": (POST, {}),
    "Tapas": (POST, {}),
    "Marian": ("final_layer_norm", {}),
    "PLBart": ("final_layer_norm", {}),
    "OpenAIGPT": ("ln_2", {}),
    "OPT": ("final_layer_norm", dict(do_layer_norm_before=False, word_embed_proj_dim=24)),
    "MBart": (PRE, {}),
    "Gemma2": (PRE, {}),
    "Olmo2": (PRE, {}),
    "Qwen3": (PRE, {}),
    "RobertaPreLayerNorm": (PRE, {}),
    "JetMoe": (PRE, dict(num_local_experts=2, num_experts_per_tok=1, kv_channels=8)),  # also of its attention
}


def family(name):
    import transformers as t

    config = getattr(t, f"{name}Config")
    sizes = {k: v for k, v in SIZES.items() if k in dir(config()) or k in config.attribute_map}
    with seeded(0):
        return getattr(t, f"{name}Model")(config(**{**sizes, **FAMILIES[name][1]})).eval()


def batch_of(model):
    with seeded(7):
        ids = torch.randint(3, 40, (2, 8))
    return dict(input_ids=ids) | (dict(decoder_input_ids=ids) if model.config.is_encoder_decoder else {})


def first(y):
    return y[0] if isinstance(y, (tuple, list)) else y


@torch.no_grad()
def seen(model, batch, block):
    """Values in a block whose MLP adds nothing: of its output, and inputs and outputs of its norm and residual."""
    held, handles, modules = {}, [], dict(walk(model))

    def hold(name):
        def look(_module, args, kwargs, y):
            held[f"{name}.in"] = (args[0] if args else next(iter(kwargs.values()))).clone()
            held[f"{name}.out"] = first(y).clone()

        return look

    for name, path in (("block", block.path), ("norm", block.norm), ("residual", block.residual)):
        if path is not None:
            handles.append(modules[path].register_forward_hook(hold(name), with_kwargs=True))
    handles.append(modules[block.mlp].register_forward_hook(lambda _m, _a, y: tree_map(torch.zeros_like, y)))
    model(**batch)
    for handle in handles:
        handle.remove()
    return held


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_block_is_what_it_computes(name):
    """Without its MLP, the sum is the residual; a norm stands after the sum if its output is the block's."""
    model = family(name)
    batch, norm, modules = batch_of(model), FAMILIES[name][0], dict(walk(model))
    plain = model(**batch)[0]
    for block in find_blocks(model):
        block = block.follow(modules[block.path])
        assert block.norm == (norm and f"{block.path}.{norm}") and block.width == 24
        held = seen(model, batch, block)
        total = held["norm.in" if norm else "block.out"]
        assert_close(total.flatten(), held["residual.in"].flatten())
        if norm:
            assert torch.equal(held["norm.out"], held["block.out"])
    for preset in ("seq_bn", "double_seq_bn", "par_bn", "adapter_plus"):
        adapted = graft.get_peft_model(family(name), graft.BottleneckConfig.preset(preset, reduction_factor=4)).eval()
        for path, p in adapted.named_parameters():
            if "bottleneck_" in path:
                p.add_(torch.randn_like(p) * 0.3)
        assert (adapted(**batch)[0] - plain).abs().max() > 1e-3


def test_adapters_hooks_and_checkpoints_change_no_place():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    plain = find_blocks(make("bert"))[0].follow(make("bert").encoder.layer[0])
    model = make("bert")
    config = graft.BottleneckConfig(mh_adapter=True, original_ln_before=False, mlp_modules=["encoder.layer.0"])
    model = graft.get_peft_model(model, config, "a", mixed=True)
    model.add_adapter("b", graft.LoraConfig(target_modules=["query", "output.dense"]))
    block = model.get_base_model().encoder.layer[0]
    block.register_forward_pre_hook(lambda *_: pytest.fail("the block ran"))
    checkpoint(model)
    assert plain.follow(dict(walk(model.get_base_model()))["encoder.layer.0"]) == plain
    wrapped = make("bert")
    wrapped.encoder.layer[0] = checkpoint_wrapper(wrapped.encoder.layer[0])
    inner = "encoder.layer.0._checkpoint_wrapped_module"
    block = find_blocks(wrapped)[0]
    assert block.follow(wrapped.encoder.layer[0]).norm == f"{inner}.output.LayerNorm"


class Attention(nn.Module):
    def __init__(self, width, context=None):
        super().__init__()
        self.to_q, self.to_k = nn.Linear(width, width), nn.Linear(context or width, width)
        self.to_v = nn.Linear(context or width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Dropout(0.0)])

    def forward(self, hidden_states, encoder_hidden_states=None):
        other = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        y = nn.functional.scaled_dot_product_attention(self.to_q(hidden_states), self.to_k(other), self.to_v(other))
        return self.to_out[1](self.to_out[0](y))


class FeedForward(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.net = nn.ModuleList([nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width)])

    def forward(self, x):
        for layer in self.net:
            x = layer(x)
        return x


class Crossed(nn.Module):
    """A block as diffusers' UNet has it: attention to itself, to a text, and an MLP, by names without `mlp`."""

    def __init__(self, width, context):
        super().__init__()
        self.norm1, self.attn1 = nn.LayerNorm(width), Attention(width)
        self.norm2, self.attn2 = nn.LayerNorm(width), Attention(width, context)
        self.norm3, self.ff = nn.LayerNorm(width), FeedForward(width)

    def forward(self, hidden_states, attention_mask=None, encoder_hidden_states=None):
        hidden_states = self.attn1(self.norm1(hidden_states)) + hidden_states
        hidden_states = self.attn2(self.norm2(hidden_states), encoder_hidden_states) + hidden_states
        return self.ff(self.norm3(hidden_states)) + hidden_states


class Images(nn.Module):
    """Blocks around convolutions: in `attentions`, which are no attention themselves."""

    def __init__(self, width, context):
        super().__init__()
        self.norm, self.proj_in = nn.GroupNorm(2, width), nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList([Crossed(width, context)])
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x, text):
        y = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)
        for block in self.transformer_blocks:
            y = block(y, encoder_hidden_states=text)
        return x + self.proj_out(y.transpose(1, 2).unflatten(2, x.shape[2:]))


class Level(nn.Module):
    def __init__(self, fan_in, width, context):
        super().__init__()
        self.resnets = nn.ModuleList([nn.Conv2d(fan_in, width, 3, padding=1)])
        self.time_emb_proj = nn.Linear(6, width)
        self.attentions = nn.ModuleList([Images(width, context)])

    def forward(self, x, time, text):
        x = self.resnets[0](x) + self.time_emb_proj(time)[..., None, None]
        return self.attentions[0](x, text)


class UNet(nn.Module):
    """Blocks of several widths, on the way down and up."""

    def __init__(self):
        super().__init__()
        self.down_blocks = nn.ModuleList([Level(4, 8, 6), Level(8, 16, 6)])
        self.up_blocks = nn.ModuleList([Level(16, 8, 6)])

    def forward(self, x, time, text):
        for block in (*self.down_blocks, *self.up_blocks):
            x = block(x, time, text)
        return x


def unet():
    with seeded(0):
        return UNet().eval(), dict(x=torch.randn(2, 4, 6, 6), time=torch.randn(2, 6), text=torch.randn(2, 5, 6))


def test_blocks_within_attentions():
    model, _ = unet()
    blocks = [block.follow(model.get_submodule(block.path)) for block in find_blocks(model)]
    path = "down_blocks.1.attentions.0.transformer_blocks.0"
    assert [block.width for block in blocks] == [8, 16, 8]
    assert blocks[1] == Block(
        path,
        16,
        {f"{path}.attn{i}": f"{path}.attn{i}.to_out.0" for i in (1, 2)},
        frozenset([f"{path}.attn2"]),
        f"{path}.ff.net.2",
        None,
        f"{path}.norm3",
    )


@pytest.mark.parametrize(
    "config, per_block",
    [
        (graft.BottleneckConfig.preset("seq_bn", reduction_factor=2), 1),
        (graft.BottleneckConfig.preset("double_seq_bn", reduction_factor=2), 2),  # none at the text
        (graft.BottleneckConfig.preset("double_seq_bn", reduction_factor=2, cross_adapter=True), 3),
        (graft.BottleneckConfig.preset("par_bn"), 2),
        (graft.BottleneckConfig.preset("adapter_plus", reduction_factor=2), 1),
        (graft.SteeringConfig(), 1),
        (graft.ReftConfig(), 1),
    ],
    ids=str,
)
@torch.no_grad()
def test_adapters_of_blocks_within_attentions(config, per_block):
    model, batch = unet()
    plain = model(**batch)
    adapted = graft.get_peft_model(model, config).eval()
    for path, p in adapted.named_parameters():
        if any(part in path for part in ("bottleneck_", "steering_", "reft_")):
            p.add_(torch.randn_like(p) * 0.3)
    assert len(layers(adapted)) == 3 * per_block
    assert (adapted(**batch) - plain).abs().max() > 1e-3


class TwoStreams(nn.Module):
    """A block that returns its text first, as those of Flux."""

    def __init__(self):
        super().__init__()
        self.norm, self.attn, self.ff, self.ff_text = nn.LayerNorm(8), Attention(8), FeedForward(8), FeedForward(8)

    def forward(self, hidden_states, encoder_hidden_states):
        hidden_states = hidden_states + self.attn(self.norm(hidden_states), encoder_hidden_states)
        hidden_states = hidden_states + self.ff(hidden_states)
        return encoder_hidden_states + self.ff_text(encoder_hidden_states), hidden_states


class Counting(Crossed):
    """A block whose code asks for values."""

    def forward(self, hidden_states):
        for _ in range(int(hidden_states.abs().sum() > 0)):
            hidden_states = super().forward(hidden_states)
        return hidden_states


class Inner(Crossed):
    """A block whose MLP is narrower than its states, which another layer widens."""

    def __init__(self, width, context):
        super().__init__(width, context)
        self.wider = nn.Linear(width, 2 * width)

    def forward(self, hidden_states):
        h = hidden_states[..., :8]
        return hidden_states + self.wider(self.ff(h) + self.attn2(self.attn1(h)))


@pytest.mark.parametrize(
    "block, error, text",
    [
        (TwoStreams, UnsupportedLayerError, "'0' \\(TwoStreams\\): its first output is (one of several|no sum)"),
        (lambda: Inner(8, 8), UnsupportedLayerError, "no sum with the output of 'ff.net.2'"),
        (lambda: Counting(8, 8), UnfollowedError, "cannot be followed: TypeError.*block_modules"),
    ],
    ids=["streams", "inner", "values"],
)
def test_other_blocks_are_refused(block, error, text):
    model = nn.Sequential(block())
    names = [name for name, _ in model.named_modules()]
    for preset in ("seq_bn", "double_seq_bn", "par_bn"):
        refuses(error, text, graft.get_peft_model, model, graft.BottleneckConfig.preset(preset))
    for config in (graft.ReftConfig(), graft.SteeringConfig()):
        if error is UnfollowedError:  # they act on the block's output, whatever it computes
            assert layers(graft.get_peft_model(nn.Sequential(block()), config))
        else:
            refuses(error, text, graft.get_peft_model, model, config)
    assert [name for name, _ in model.named_modules()] == names


def test_a_model_of_images_and_text_has_the_blocks_of_its_text():
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    sizes = dict(hidden_size=16, intermediate_size=24, num_attention_heads=2, image_size=8, patch_size=4)
    vision = dict(sizes, model_type="clip_vision_model", num_hidden_layers=3, projection_dim=16)
    text = dict(vocab_size=40, hidden_size=24, intermediate_size=36, num_hidden_layers=2, num_attention_heads=3)
    text |= dict(model_type="llama", num_key_value_heads=3)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=39)
    model = LlavaForConditionalGeneration(config)
    assert [block.path for block in find_blocks(model)] == [f"model.language_model.layers.{i}" for i in range(2)]


def test_the_code_of_a_block_keeps_no_model():
    """Nor does that of one which cannot be followed, without a collection of garbage."""
    for make_one in (lambda: Crossed(8, 6), lambda: Counting(8, 6), lambda: make("llama").model.layers[0]):
        make_one()  # the first of a kind may be kept
        model = nn.Sequential(make_one())
        alive = [weakref.ref(p) for p in model.parameters()]
        enabled = gc.isenabled()
        gc.disable()
        try:
            chosen_blocks(model, "all")
            del model
            assert not any(p() is not None for p in alive)
        finally:
            (gc.enable if enabled else gc.disable)()


def test_the_code_of_a_block_leaves_nothing_behind():
    model = make("llama")
    before = {path: set(vars(module)) for path, module in model.named_modules()}
    graft.get_peft_model(model, graft.BottleneckConfig.preset("par_bn")).unload()
    assert {path: set(vars(module)) for path, module in model.named_modules()} == before
    assert torch.equal(model(**inputs("llama")).logits, make("llama")(**inputs("llama")).logits)
