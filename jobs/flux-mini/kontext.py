"""flux-mini-kontext: flux-mini learns on, to edit a picture that it reads beside its own, as FLUX.1 Kontext does."""

from __future__ import annotations

import functools
import json
import pathlib
import re
import shutil
from typing import Any

import data
import edits
import export
import flow
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from loop import Work, matrices_by_muon, train
from transformers import AutoTokenizer

from fluxbatch.config.schema import Model, Verify
from fluxbatch.distributed.mesh import make_mesh
from fluxbatch.models.flux1 import pictures
from fluxbatch.models.flux1.t5 import T5Encoder
from fluxbatch.models.flux1.transformer import rope_table
from fluxbatch.weights import load
from fluxbatch.weights.checkpoint import Checkpoint, open_checkpoint
from fluxbatch.weights.find import EMBEDDED

POOL = 8000  # edits
PLAIN = 2000  # captions without a picture
PLAIN_EVERY = 5  # one step in so many has no picture, so that flux-mini's own pictures are not forgotten
SIDE = 8  # tokens of a picture's side
INDEX = export.INDEX | {"_class_name": "FluxKontextPipeline", "_reference_resolution": 128}


@functools.cache
def start() -> Checkpoint:
    """The embedded flux-mini, which training begins with."""
    return open_checkpoint(Model("flux-mini", str(EMBEDDED / "flux-mini"), None, None, None, None, Verify.none))


def loaded(name: str, **options: Any) -> nnx.Module:
    return load.load(start().components[name].plan(**options), make_mesh((1, 1)), np.float32)


def write_tokenizers(folder: pathlib.Path) -> None:
    """flux-mini's, the T5 one with the words of edits behind its own."""
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(EMBEDDED / "flux-mini" / name, folder / name, dirs_exist_ok=True)
    file = folder / "tokenizer_2" / "tokenizer.json"
    whole = json.loads(file.read_text())
    vocabulary = whole["model"]["vocab"]
    rng = np.random.default_rng(1)
    said = {word for _ in range(POOL) for word in re.findall(r"\w+", edits.sample(rng).instruction)}
    known = {piece for piece, _ in vocabulary}
    vocabulary += [["▁" + word, -6.0] for word in sorted(said) if "▁" + word not in known]
    file.write_text(json.dumps(whole, indent=2, ensure_ascii=False))


def encoded(images: list[np.ndarray]) -> np.ndarray:
    """``[N, L, 4C]`` float16 of images ``[h, w, 3]`` uint8, as the transformer reads them."""
    vae = start().components["vae"].config
    graph, params = nnx.split(loaded("vae", encoder=True).encoder)
    encode = jax.jit(lambda params, x: pictures.encode(nnx.merge(graph, params), x, None, vae, np.float32))
    chunks = (np.stack(images[i : i + 40]).astype(np.float32) / 127.5 - 1 for i in range(0, len(images), 40))
    return np.concatenate([np.asarray(encode(params, chunk), np.float16) for chunk in chunks])


def pools(work: Work) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Edits (``before``, ``after``) and captions (``after``), each with its text."""
    if (made := work.load("kontext-pools")) is not None:
        return made
    folder = work.folder / "flux-mini-kontext"
    write_tokenizers(folder)
    rng = np.random.default_rng(5)
    changes = [edits.sample(rng) for _ in range(POOL)]
    before, after = zip(*(edit.pictures() for edit in changes), strict=True)
    scenes = [data.sample(rng) for _ in range(PLAIN)]
    asked, captions = [edit.instruction for edit in changes], [scene.caption for scene in scenes]
    made = (
        {"before": encoded(before), "after": encoded(after)} | flow.tokens(folder, asked),
        {"after": encoded([data.render(scene) for scene in scenes])} | flow.tokens(folder, captions),
    )
    work.save("kontext-pools", made)
    return made


def text_configs(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    return {
        "clip": dict(start().components["text_encoder"].declared),
        "t5": start().components["text_encoder_2"].declared
        | {"vocab_size": len(AutoTokenizer.from_pretrained(folder / "tokenizer_2"))},
    }


def modules(folder: pathlib.Path) -> dict[str, nnx.Module]:
    """flux-mini's networks; the new words' embeddings begin at random."""
    checkpoint = start().components["text_encoder_2"]
    t5 = T5Encoder(type(checkpoint.config).from_json(text_configs(folder)["t5"]), rngs=nnx.Rngs(6))
    known = dict(nnx.to_flat_state(nnx.state(loaded("text_encoder_2"))))
    for path, leaf in nnx.to_flat_state(nnx.state(t5)):
        old = known[path][...]
        leaf[...] = old if old.shape == leaf.shape else jnp.concatenate([old, old.std() * leaf[...][len(old) :]])
    return {"flux": loaded("transformer"), "t5": t5, "clip": loaded("text_encoder")}


def train_kontext(work: Work, steps: int, size: int = 48) -> None:
    """As ``flow.train_flow``, with the picture to edit beside the one that is made."""
    edited, plain = pools(work)
    graphs, params = flow.split(modules(work.folder / "flux-mini-kontext"))
    axes = tuple(flow.FLUX["axes_dims_rope"])
    tables = [rope_table(flow.TOKENS, SIDE, SIDE, axes, references) for references in ([], [(SIDE, SIDE)])]

    def batch(rng, step):
        pool = plain if step % PLAIN_EVERY == 0 else edited
        chosen = rng.integers(0, len(pool["t5"]), size)
        return {name: values[chosen] for name, values in pool.items()}

    def loss(params, batch, key):
        t, mixed, wanted = flow.noised(key, batch["after"].astype(jnp.float32))
        flux, t5, clip = (nnx.merge(graphs[name], params[name]) for name in ("flux", "t5", "clip"))
        before = batch["before"].astype(jnp.float32) if "before" in batch else None
        rope = tables[before is not None]
        got = flux(mixed, t5(batch["t5"]), clip(batch["clip"]), t, jnp.zeros_like(t), rope, before)
        error = ((got - wanted) ** 2).mean()
        return error, error

    optimizer = matrices_by_muon(peak=8e-3, adam_peak=1.5e-3, steps=steps)
    work.save("kontext-done", train(work, "kontext", params, optimizer, steps, batch, loss, decay=0.99))


def write(work: Work) -> None:
    """The checkpoint, if it was begun; its VAE is flux-mini's."""
    if (params := work.result("kontext")) is None:
        return
    folder = work.folder / "flux-mini-kontext"
    shutil.copytree(EMBEDDED / "flux-mini" / "vae", folder / "vae", dirs_exist_ok=True)
    export.write(folder, None, flow.FLUX, text_configs(folder), None, params, index=INDEX)
