"""JAX on this machine: its settings before it starts, and its start."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence

import jax

from fluxbatch.distributed import join
from fluxbatch.distributed.chips import GPU_SHARES, gpu_share
from fluxbatch.types import UserError

PLATFORMS = {"cpu": "cpu", "gpu": "cuda", "tpu": "tpu"}
REMOTE = {"gs": "gcsfs", "s3": "s3fs"}  # through what JAX writes its cache where
XLA_TUNING = "xla_gpu_per_fusion_autotune_cache_dir"  # XLA's own cache within JAX's
HEARTBEAT, SHUTDOWN = 30, 15  # seconds until a silent peer counts as lost, and that an exit waits for peers


def set_compiler_flags(xla: Sequence[str], libtpu: Sequence[str]) -> None:
    """Adds flags to XLA_FLAGS and LIBTPU_INIT_ARGS, and the share of a GPU, before JAX starts; what is there already
    wins."""
    for variable, flags in (("XLA_FLAGS", xla), ("LIBTPU_INIT_ARGS", libtpu)):
        given = os.environ.get(variable, "").split()
        names = {flag.partition("=")[0] for flag in given}
        if added := [flag for flag in flags if flag.partition("=")[0] not in names]:
            os.environ[variable] = " ".join([*added, *given])
    if not any(map(os.environ.get, GPU_SHARES)):
        os.environ[GPU_SHARES[0]] = str(gpu_share())


def start(platform: str, cache_dir: str | None, writable: bool = True) -> str:
    """Brings JAX up on ``platform`` (``auto``: the best there is) and returns its name: cpu, gpu or tpu.
    ``writable``: whether compiled programs may be added to ``cache_dir``.

    UserError when this machine does not have it, or JAX cannot write to ``cache_dir`` from here.
    """
    scheme, remote, _ = (cache_dir or "").partition("://")
    if remote and not (scheme in REMOTE and importlib.util.find_spec(REMOTE[scheme])):
        wanted = "a local directory, null, or gs://bucket/prefix where gcsfs is installed"
        raise UserError(f"jax_cache_dir={cache_dir}: expected {wanted}")
    asked, instead = f"hardware={platform}", ""
    if platform != "auto":
        jax.config.update("jax_platforms", PLATFORMS[platform])
    elif variable := next((name for name in ("JAX_PLATFORMS", "JAX_PLATFORM_NAME") if os.environ.get(name)), None):
        asked = f"{variable}={os.environ[variable]}"
        instead = f"; expected a platform of this machine, or {variable} unset for the best there is"
    if cache_dir:
        jax.config.update("jax_compilation_cache_dir", cache_dir)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2 if writable else 1e9)
    join.join(HEARTBEAT, SHUTDOWN)
    try:
        found = jax.default_backend()
    except (RuntimeError, AssertionError) as error:  # of a missing cuda jax 0.10 has nothing to say but that
        reason = next(iter(str(error).splitlines()), "no such device is visible")
        raise UserError(f"{asked}: JAX finds none here: {reason}{instead}") from error
    if platform not in ("auto", found):
        raise UserError(f"{asked}: this process already runs on {found}")
    if found == "gpu" and cache_dir and not remote:
        tuning = os.path.join(cache_dir, XLA_TUNING)
        if not (writable and (os.access(tuning, os.W_OK) or not os.path.exists(tuning))):
            # a write that fails would end XLA's compiling
            jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    return found
