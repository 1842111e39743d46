"""The dev-like variant: guidance distilled into the network, which reads its strength as FLUX.1 dev does."""

from __future__ import annotations

from typing import Any

import export
import flow
import jax
import jax.numpy as jnp
from flax import nnx
from loop import Work, matrices_by_muon, train

from fluxbatch.models.flux1.transformer import Flux, FluxConfig

FLUX = flow.FLUX | {"guidance_embeds": True}
SCHEDULER = export.SCHEDULER | {"shift": 3.0, "use_dynamic_shifting": True}
WEAK, STRONG = 1.0, 5.0  # the strengths that are learned


def student(teacher: Any) -> tuple[Any, Any]:
    """The teacher's network with an embedding of the guidance that says nothing yet."""
    network = Flux(FluxConfig.from_json(FLUX), rngs=nnx.Rngs(5))
    layer = network.guidance_in.out_layer
    layer.kernel[...], layer.bias[...] = jnp.zeros_like(layer.kernel[...]), jnp.zeros_like(layer.bias[...])
    graph, params = nnx.split(network)
    known = dict(nnx.to_flat_state(teacher))
    return graph, nnx.from_flat_state([(path, known.get(path, leaf)) for path, leaf in nnx.to_flat_state(params)])


def train_guidance(work: Work, steps: int, size: int = 32) -> None:
    """The student learns in one pass what the teacher says in two: with the caption, and away from
    what it says without one. The text encoders stay as they are."""
    shaped, stats = flow.pools(work)
    graphs, _ = flow.split(flow.modules(work.folder / "flux-mini"))
    teacher = work.result("flow")
    graph, params = student(teacher["flux"])
    silence = flow.tokens(work.folder / "flux-mini", [""])

    def batch(rng, step):
        pool = shaped[1 + step // flow.OTHER_SHAPES % 2 if step % flow.OTHER_SHAPES == 0 else 0]
        return flow.batch_of(pool, stats, rng.integers(0, len(pool["t5"]), size)), teacher

    def loss(params, batch, key):
        batch, teacher = batch
        where, strength = jax.random.split(key)
        t, mixed, _ = flow.noised(where, batch[0])
        guidance = jax.random.uniform(strength, t.shape, minval=WEAK, maxval=STRONG)
        said = flow.velocity(graphs, teacher, batch, t, mixed, guidance)
        nothing = (batch[0], *(jnp.repeat(silence[name], size, axis=0) for name in ("clip", "t5")), batch[3])
        unsaid = flow.velocity(graphs, teacher, nothing, t, mixed, guidance)
        wanted = unsaid + guidance[:, None, None] * (said - unsaid)
        seen = flow.velocity(graphs | {"flux": graph}, teacher | {"flux": params}, batch, t, mixed, guidance)
        error = ((seen - jax.lax.stop_gradient(wanted)) ** 2).mean()
        return error, error

    optimizer = matrices_by_muon(peak=4e-3, adam_peak=1e-3, steps=steps)
    trained = train(work, "guidance", params, optimizer, steps, batch, loss, decay=0.98)
    work.save("guidance-done", trained)


def networks(work: Work) -> dict[str, Any] | None:
    """The variant's parameters by network, if it was begun."""
    trained = work.result("guidance")
    return None if trained is None else work.result("flow") | {"flux": trained}
