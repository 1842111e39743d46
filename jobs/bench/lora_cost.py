"""What per-row LoRA adds to a denoising step: the transformer with no adapter, with one, with four.

    python jobs/bench/lora_cost.py [--width 1024] [--tokens 1024] [--rounds 12]

The programs take turns in one process, and the best round of each counts.
"""

from __future__ import annotations

import argparse
import time

import jax
import jax.numpy as jnp
from flax import nnx

from fluxbatch.models import attention
from fluxbatch.models.flux1.transformer import Flux, FluxConfig, rope_table
from fluxbatch.models.layers import Linear, LowRank, set_rows

HEAD, TEXT, ROWS = 128, 128, 2


def attach(model: Flux, ranks: tuple[int, ...]) -> None:
    """Adapters of these ranks beside every linear layer of the blocks."""
    for blocks in (model.double_blocks, model.single_blocks):
        for _, module in list(nnx.iter_modules(blocks)):
            if isinstance(module, Linear):
                layers, out, width = module.kernel.shape
                module.lora = LowRank(
                    jnp.zeros((layers, sum(ranks), width)), jnp.zeros((layers, out, sum(ranks))), ranks
                )


def program(width: int, tokens: int, ranks: tuple[int, ...]):
    config = FluxConfig(64, 64, 1, 2, width // HEAD, HEAD, 512, 256, True, (16, 56, 56))
    attend = attention.by_name("auto", jax.default_backend(), "float32")
    model = Flux(config, rngs=nnx.Rngs(0), attention=attend)
    if ranks:
        attach(model, ranks)
    graph, state = nnx.split(model)
    side = int(tokens**0.5)
    rope = rope_table(TEXT, side, side, config.axes_dims_rope)
    inputs = [jnp.ones(s) for s in ((ROWS, side * side, 64), (ROWS, TEXT, 512), (ROWS, 256), (ROWS,), (ROWS,))]
    scales = jnp.ones((ROWS, len(ranks)))

    @jax.jit
    def run(state, scales, *inputs):
        model = nnx.merge(graph, state)
        return (set_rows(model, scales) if ranks else model)(*inputs, rope)

    return lambda: run(state, scales, *inputs).block_until_ready()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=12)
    args = parser.parse_args()
    names = {"no adapter": (), "1 of rank 16": (16,), "4 of rank 16": (16,) * 4}
    programs = {name: program(args.width, args.tokens, ranks) for name, ranks in names.items()}
    best = dict.fromkeys(programs, float("inf"))
    for turn in range(args.rounds + 1):  # the first one compiles
        for name, run in programs.items():
            start = time.perf_counter()
            run()
            if turn:
                best[name] = min(best[name], time.perf_counter() - start)
    print(
        f"{jax.devices()[0].device_kind}, width {args.width}, {args.tokens} image tokens, {ROWS} rows, float32; "
        f"best of {args.rounds}"
    )
    for name, seconds in best.items():
        print(f"{name:14} {1000 * seconds:8.1f} ms  {100 * (seconds / best['no adapter'] - 1):+6.1f} %")


if __name__ == "__main__":
    main()
