"""Names of the weights in checkpoints, one table per component and naming.

Targets are the attribute paths of ``models/``; ``name[{0}]`` is a layer of a stack.
"""

from __future__ import annotations

from fluxbatch.models.key_tables import SWAP_HALVES, Rule, Table, linear, norm


def _diffusers_stream(
    stream: str, q: str, k: str, v: str, norms: tuple[str, str], proj: str, mod: str, ff: str
) -> tuple[Rule, ...]:
    src, dst = r"transformer_blocks\.(\d+)\.", f"double_blocks[{{0}}].{stream}."
    return (
        *linear(src + rf"{mod}\.linear", dst + "mod"),
        *linear(src + rf"attn\.{q}", dst + "qkv.q"),
        *linear(src + rf"attn\.{k}", dst + "qkv.k"),
        *linear(src + rf"attn\.{v}", dst + "qkv.v"),
        *norm(src + rf"attn\.{norms[0]}", dst + "qkv.query_norm", bias=False),
        *norm(src + rf"attn\.{norms[1]}", dst + "qkv.key_norm", bias=False),
        *linear(src + rf"attn\.{proj}", dst + "proj"),
        *linear(src + rf"{ff}\.net\.0\.proj", dst + "mlp_in"),
        *linear(src + rf"{ff}\.net\.2", dst + "mlp_out"),
    )


_SINGLE, _SINGLE_TO = r"single_transformer_blocks\.(\d+)\.", "single_blocks[{0}]."

FLUX_DIFFUSERS = Table(
    (
        *linear("x_embedder", "img_in"),
        *linear("context_embedder", "txt_in"),
        *linear(r"time_text_embed\.timestep_embedder\.linear_1", "time_in.in_layer"),
        *linear(r"time_text_embed\.timestep_embedder\.linear_2", "time_in.out_layer"),
        *linear(r"time_text_embed\.text_embedder\.linear_1", "vector_in.in_layer"),
        *linear(r"time_text_embed\.text_embedder\.linear_2", "vector_in.out_layer"),
        *linear(r"time_text_embed\.guidance_embedder\.linear_1", "guidance_in.in_layer"),
        *linear(r"time_text_embed\.guidance_embedder\.linear_2", "guidance_in.out_layer"),
        *_diffusers_stream("img", "to_q", "to_k", "to_v", ("norm_q", "norm_k"), r"to_out\.0", "norm1", "ff"),
        *_diffusers_stream("txt", "add_q_proj", "add_k_proj", "add_v_proj", ("norm_added_q", "norm_added_k"),
                           "to_add_out", "norm1_context", "ff_context"),
        *linear(_SINGLE + r"norm\.linear", _SINGLE_TO + "mod"),
        *linear(_SINGLE + r"attn\.to_q", _SINGLE_TO + "qkv.q"),
        *linear(_SINGLE + r"attn\.to_k", _SINGLE_TO + "qkv.k"),
        *linear(_SINGLE + r"attn\.to_v", _SINGLE_TO + "qkv.v"),
        *norm(_SINGLE + r"attn\.norm_q", _SINGLE_TO + "qkv.query_norm", bias=False),
        *norm(_SINGLE + r"attn\.norm_k", _SINGLE_TO + "qkv.key_norm", bias=False),
        *linear(_SINGLE + "proj_mlp", _SINGLE_TO + "mlp_in"),
        *linear(_SINGLE + "proj_out", _SINGLE_TO + "out"),
        # diffusers stores scale, shift; the model (like BFL) has shift, scale
        *linear(r"norm_out\.linear", "final_mod", SWAP_HALVES),
        *linear("proj_out", "final_out"),
    )
)  # fmt: skip


def _bfl_norm(pattern: str, target: str) -> Rule:
    return Rule(rf"{pattern}\.(?:scale|weight)", f"{target}.scale")


def _bfl_stream(stream: str) -> tuple[Rule, ...]:
    src, dst = rf"double_blocks\.(\d+)\.{stream}_", f"double_blocks[{{0}}].{stream}."
    return (
        *linear(src + r"mod\.lin", dst + "mod"),
        *(r for i, n in enumerate("qkv") for r in linear(src + r"attn\.qkv", dst + f"qkv.{n}", ((i, i + 1, 3),))),
        _bfl_norm(src + r"attn\.norm\.query_norm", dst + "qkv.query_norm"),
        _bfl_norm(src + r"attn\.norm\.key_norm", dst + "qkv.key_norm"),
        *linear(src + r"attn\.proj", dst + "proj"),
        *linear(src + r"mlp\.0", dst + "mlp_in"),
        *linear(src + r"mlp\.2", dst + "mlp_out"),
    )


_BFL_SINGLE = r"single_blocks\.(\d+)\."

# Black Forest Labs' own files, and ComfyUI's: the model is named after them.
FLUX_BFL = Table(
    (
        *(r for n in ("img_in", "txt_in") for r in linear(n, n)),
        *(
            r
            for n in ("time_in", "vector_in", "guidance_in")
            for part in ("in_layer", "out_layer")
            for r in linear(rf"{n}\.{part}", f"{n}.{part}")
        ),
        *_bfl_stream("img"),
        *_bfl_stream("txt"),
        *linear(_BFL_SINGLE + r"modulation\.lin", _SINGLE_TO + "mod"),
        # linear1 is q, k, v and the MLP's first layer (4 × as wide) in one
        *(
            r
            for i, n in enumerate("qkv")
            for r in linear(_BFL_SINGLE + "linear1", _SINGLE_TO + f"qkv.{n}", ((i, i + 1, 7),))
        ),
        *linear(_BFL_SINGLE + "linear1", _SINGLE_TO + "mlp_in", ((3, 7, 7),)),
        *linear(_BFL_SINGLE + "linear2", _SINGLE_TO + "out"),
        _bfl_norm(_BFL_SINGLE + r"norm\.query_norm", _SINGLE_TO + "qkv.query_norm"),
        _bfl_norm(_BFL_SINGLE + r"norm\.key_norm", _SINGLE_TO + "qkv.key_norm"),
        *linear(r"final_layer\.adaLN_modulation\.1", "final_mod"),
        *linear(r"final_layer\.linear", "final_out"),
    )
)

_T5, _T5_TO = r"encoder\.block\.(\d+)\.layer\.", "blocks[{0}]."

T5 = Table(
    (
        Rule(r"shared\.weight", "embed.table"),
        Rule(r"encoder\.block\.0\.layer\.0\.SelfAttention\.relative_attention_bias\.weight", "relative_bias"),
        *norm(_T5 + r"0\.layer_norm", _T5_TO + "norm1", bias=False),
        *(r for n in "qkvo" for r in linear(_T5 + rf"0\.SelfAttention\.{n}", _T5_TO + n, bias=False)),
        *norm(_T5 + r"1\.layer_norm", _T5_TO + "norm2", bias=False),
        *(r for n in ("wi_0", "wi_1", "wo") for r in linear(_T5 + rf"1\.DenseReluDense\.{n}", _T5_TO + n, bias=False)),
        *norm(r"encoder\.final_layer_norm", "final_norm", bias=False),
    ),
    # the input embedding a second time; the decoder of a whole T5
    ignored=(r"encoder\.embed_tokens\.weight", r"decoder\..*", r"lm_head\.weight"),
)

# transformers 5 writes a text model without the prefix it has inside a whole CLIP
_TEXT = r"(?:text_model\.)?"
_CLIP, _CLIP_TO = _TEXT + r"encoder\.layers\.(\d+)\.", "blocks[{0}]."

CLIP = Table(
    (
        Rule(_TEXT + r"embeddings\.token_embedding\.weight", "embed.table"),
        Rule(_TEXT + r"embeddings\.position_embedding\.weight", "positions"),
        *norm(_CLIP + "layer_norm1", _CLIP_TO + "norm1"),
        *(r for n in "qkv" for r in linear(_CLIP + rf"self_attn\.{n}_proj", _CLIP_TO + n)),
        *linear(_CLIP + r"self_attn\.out_proj", _CLIP_TO + "out"),
        *norm(_CLIP + "layer_norm2", _CLIP_TO + "norm2"),
        *linear(_CLIP + r"mlp\.fc1", _CLIP_TO + "fc1"),
        *linear(_CLIP + r"mlp\.fc2", _CLIP_TO + "fc2"),
        *norm(_TEXT + "final_layer_norm", "final_norm"),
    ),
    # the other half of a whole CLIP, and buffers of old checkpoints
    ignored=(
        r"vision_model\..*",
        r"(visual|text)_projection\.weight",
        "logit_scale",
        _TEXT + r"embeddings\.position_ids",
    ),
)
