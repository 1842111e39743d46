"""The configuration and the command line: what people type reaches the right key, or one clear line."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import MISSING, OmegaConf

from fluxbatch.config import application, overrides, schema
from fluxbatch.config.schema import Job
from fluxbatch.convert import Convert, convert
from fluxbatch.types import UserError

GROUPS = {d.name: sorted(f.stem for f in d.glob("*.yaml")) for d in application.CONF.iterdir() if d.is_dir()}

# The parameters people know from MaxDiffusion: bare name → (full key, a value as typed, what it means).
SEED = {
    "pretrained_model_name_or_path": ("model.pretrained_model_name_or_path", "gs://b/x,(1)", "gs://b/x,(1)"),
    "clip_model_name_or_path": ("model.clip_model_name_or_path", "openai/clip", "openai/clip"),
    "t5xxl_model_name_or_path": ("model.t5xxl_model_name_or_path", "~/t5 v1.1", "~/t5 v1.1"),
    "flux_name": ("model.flux_name", "flux-schnell", "flux-schnell"),
    "prompt": ("prompt", "a cat", "a cat"),
    "prompt_2": ("prompt_2", "null", None),
    "num_inference_steps": ("sampler.num_inference_steps", "8", 8),
    "guidance_scale": ("sampler.guidance_scale", "3.5", 3.5),
    "resolution": ("sampler.resolution", "512", 512),
    "height": ("sampler.height", "64", 64),
    "width": ("sampler.width", "96", 96),
    "max_sequence_length": ("sampler.max_sequence_length", "256", 256),
    "time_shift": ("sampler.time_shift", "true", True),
    "base_shift": ("sampler.base_shift", "0.5", 0.5),
    "max_shift": ("sampler.max_shift", "1.15", 1.15),
    "weights_dtype": ("hardware.weights_dtype", "bfloat16", schema.WeightsDType.bfloat16),
    "activations_dtype": ("hardware.activations_dtype", "float32", schema.DType.float32),
    "attention": ("hardware.attention", "cudnn_flash_te", schema.Attention.cudnn_flash_te),
    "split_head_dim": ("hardware.split_head_dim", "False", False),
    "offload_encoders": ("hardware.offload_encoders", "false", False),
    "flash_block_sizes": ("hardware.flash_block_sizes", '{"block_q": 2176}', {"block_q": 2176}),
    "lora_model_name_or_path": ("lora_config.lora_model_name_or_path", "[a/b]", ["a/b"]),
    "weight_name": ("lora_config.weight_name", "[x.safetensors]", ["x.safetensors"]),
    "adapter_name": ("lora_config.adapter_name", '["anime"]', ["anime"]),
    "scale": ("lora_config.scale", "[0.8]", [0.8]),
    "from_pt": ("lora_config.from_pt", "[true]", [True]),
    "ici_data_parallelism": ("sharding.ici_data_parallelism", "2", 2),
    "ici_fsdp_parallelism": ("sharding.ici_fsdp_parallelism", "-1", -1),
    "per_device_batch_size": ("sharding.per_device_batch_size", "4", 4),
    "run_name": ("run_name", "2024", "2024"),
    "output_dir": ("output_dir", "gs://bucket/a b", "gs://bucket/a b"),
    "seed": ("seed", "7", 7),
    "jax_cache_dir": ("jax_cache_dir", "/c", "/c"),
    "hardware": ("hardware.platform", "cpu", schema.Platform.cpu),
}
ADAPTER = ["lora_model_name_or_path=[a]", "weight_name=[w]", "adapter_name=[n]", "scale=[1]", "from_pt=[true]"]


class Command:
    """Runs the command line in this process, collecting the jobs of the task."""

    def __init__(self, capsys):
        self.capsys, self.jobs, self.code = capsys, [], 0

    def __call__(self, *argv, expect=0, schema=Job, rows=True, task=None):
        self.jobs = []
        with pytest.raises(SystemExit) as exit:
            application.main(task or self.task, schema=schema, rows=rows, argv=argv)
        self.out, self.err = self.capsys.readouterr()
        assert exit.value.code == expect, self.err
        return self.jobs[0] if len(self.jobs) == 1 else self.jobs

    def task(self, job):
        self.jobs.append(job)
        return self.code

    @property
    def lines(self):
        return self.err.splitlines()


@pytest.fixture
def command(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    return Command(capsys)


def value_at(job, key):
    for part in key.split("."):
        job = getattr(job, part)
    return job


# ---- what is in conf/


@pytest.mark.parametrize("turn", range(max(map(len, GROUPS.values()))))
def test_every_option_composes(command, turn):
    job = command("prompt=x", *(f"{group}={names[turn % len(names)]}" for group, names in GROUPS.items()))
    assert type(job) is Job and type(job.sampler) is schema.Sampler
    assert MISSING not in OmegaConf.to_yaml(OmegaConf.structured(job))


@pytest.mark.parametrize(
    ("model", "steps", "guidance", "resolution", "tokens"),
    [
        ("flux-mini", 4, 0.0, 128, 32),
        ("flux-mini-dev", 20, 2.5, 128, 32),
        ("flux-schnell", 4, 0.0, 1024, 256),
        ("flux-dev", 28, 3.5, 1024, 512),
        ("flux-krea-dev", 28, 4.5, 1024, 512),
        ("shuttle-3-diffusion", 4, 0.0, 1024, 256),
        ("flex-1-alpha", 25, 4.0, 1024, 512),
        ("flux-lite-8b", 28, 3.5, 1024, 512),
    ],
)
def test_model_brings_its_sampler(command, model, steps, guidance, resolution, tokens):
    s = command("prompt=x", f"model={model}").sampler
    assert (s.num_inference_steps, s.guidance_scale, s.resolution, s.max_sequence_length) == (
        steps, guidance, resolution, tokens,
    )  # fmt: skip
    assert command("prompt=x", f"flux_name={model}").sampler == s


def test_a_sampler_on_the_command_line_wins(command):
    assert command("prompt=x", "sampler=schnell").sampler.resolution == 1024


def test_fsdp_keeps_the_encoders_in_place(command):
    assert command("prompt=x", "hardware=tpu").hardware.offload_encoders
    assert not command("prompt=x", "hardware=tpu", "sharding=fsdp").hardware.offload_encoders
    assert command("prompt=x", "hardware=tpu", "sharding=fsdp", "offload_encoders=true").hardware.offload_encoders


def test_every_default_has_a_comment():
    values = application.CONF.joinpath("config.yaml").read_text().partition("\nhydra:")[0].partition("_self_\n")[2]
    texts = [path.read_text() for path in application.CONF.glob("*/*.yaml")]
    for text in [values, *(text for text in texts if "_self_" not in text)]:  # the others only say what differs
        keys = [line for line in text.splitlines() if re.match(r" *[a-z]\w*: .", line)]
        assert [line for line in keys if "#" not in line] == []


def test_every_key_is_read():
    assert unread_keys() == []


def unread_keys():
    """Leaf keys that no code below the command line mentions."""
    package = Path(schema.__file__).parents[1]
    own = {"schema.py", "checks.py", "overrides.py"}
    code = "\n".join(p.read_text() for p in package.rglob("*.py") if p.name not in own)
    return [key for key in overrides.leaves(Job) if not re.search(rf"\b{key.rpartition('.')[2]}\b", code)]


# ---- names and values


def test_seed_parameters_by_bare_name(command):
    others = [f"{name}={typed}" for name, (_, typed, _) in SEED.items()]
    job = command(*others)
    assert {name: value_at(job, key) for name, (key, _, _) in SEED.items()} == {n: v for n, (_, _, v) in SEED.items()}


def test_seed_parameters_by_full_name(command):
    job = command(*(f"{key}={typed}" for key, typed, _ in SEED.values()))
    assert {name: value_at(job, key) for name, (key, _, _) in SEED.items()} == {n: v for n, (_, _, v) in SEED.items()}


def test_headings_prefixes_and_maxdiffusion_lora(command):
    job = command("generation.prompt=x", "performance.attention=flash", "++num_inference_steps=9", "system.seed=3")
    assert (job.prompt, job.hardware.attention.name, job.sampler.num_inference_steps, job.seed) == ("x", "flash", 9, 3)
    pasted = (
        '{"lora_model_name_or_path" : ["/x/anime.safetensors"], "weight_name" : ["anime.safetensors"], '
        '"adapter_name" : ["anime"], "scale": [0.8], "from_pt": ["true"]}'
    )
    lora = command("prompt=x", f"lora_config={pasted}").lora_config
    assert (lora.lora_model_name_or_path, lora.scale, lora.from_pt) == (["/x/anime.safetensors"], [0.8], [True])


TEXTS = [
    "a cat, sitting (on a mat) = 3: 'x'",
    'say "hi" & {braces} [brackets] ${oc.env:HOME} $HOME',
    "it's; 100% #1 @home ~ +1 !",
    "back\\slash\\ and \\' and \\${x} and \\\\${y}",
    "two\nlines\tand a tab",
    "'half quoted",
    "'a' and 'b'",
    "choice(a,b)",
    "ends with \\",
    "猫 🐈 à la carte",
    "-1",
    "true",
]


@pytest.mark.parametrize("text", TEXTS)
def test_free_text_as_a_stranger_types_it(command, text):
    assert command(f"prompt={text}").prompt == text


def test_free_text_in_a_sweep(command):
    text = "".join(TEXTS)
    assert [job.prompt for job in command("-m", f"prompt={text}", "seed=0,1")] == [text, text]


TYPEABLE = st.characters(blacklist_categories=("Cs",), blacklist_characters="\0")


@settings(deadline=None)
@given(st.text(TYPEABLE, min_size=1) | st.text("\\'\"${}, :a", min_size=1))
def test_any_text_survives_the_grammar(text):
    if text == "null" or re.fullmatch(overrides.QUOTED, text, re.DOTALL) or text == MISSING:
        return
    [override], _ = overrides.read([f"prompt={text}"], Job, GROUPS, False)
    parsed = OverridesParser.create().parse_override(override)
    again = OverridesParser.create().parse_override(f"prompt={parsed.get_value_element_as_str()}")  # as sweepers do
    for value in (parsed.value(), again.value()):
        assert OmegaConf.create({"prompt": value}).prompt == text


def test_quoted_text_is_unquoted_and_paths_may_interpolate(command, monkeypatch):
    monkeypatch.setenv("WHERE", "/data")
    job = command("prompt='a, b'", "output_dir=${oc.env:WHERE}/out (1)", "filename={id}-{seed:08}")
    assert (job.prompt, job.output_dir, job.output.filename) == ("a, b", "/data/out (1)", "{id}-{seed:08}")


def test_home_is_expanded_and_buckets_are_left_alone(command, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    job = command("manifest=gs://bucket/dir/my prompts.v2.jsonl", "output_dir=~/out")
    assert (job.manifest, job.output_dir) == ("gs://bucket/dir/my prompts.v2.jsonl", "/home/me/out")
    assert re.fullmatch("my-prompts-v2-[0-9a-f]{6}", job.run_name)


def test_run_name_of_a_manifest_tells_its_place_apart_and_nothing_else(command, tmp_path, monkeypatch):
    for name in "ab":
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("a")
    name_of = lambda manifest: command(f"manifest={manifest}", f"seed={len(manifest)}").run_name  # noqa: E731
    monkeypatch.chdir(tmp_path)
    other, name = name_of("b/rows.jsonl"), name_of("a/rows.jsonl")
    assert re.fullmatch("rows-[0-9a-f]{6}", name) and other != name
    (tmp_path / "a/rows.jsonl").write_text("grown")
    ways = ("./a/rows.jsonl", "b/../a/rows.jsonl", "link/rows.jsonl", f"{tmp_path}/a/rows.jsonl")
    assert {name_of(each) for each in ways} == {name}
    monkeypatch.chdir(tmp_path / "a")
    assert name_of("rows.jsonl") == name
    monkeypatch.chdir(tmp_path / "b")
    assert name_of("rows.jsonl") == other
    (tmp_path / "b/rows.jsonl").symlink_to("1.jsonl")
    assert name_of("rows.jsonl") == other
    assert len({name_of(each) for each in ("gs://a/rows.jsonl", "gs://b/rows.jsonl", "rows.csv", "rows.jsonl")}) == 4


@pytest.mark.parametrize("key", ["output_dir", "manifest", "text_cache_dir", "jax_cache_dir", "to"])
def test_no_directory_is_called_tilde(command, monkeypatch, tmp_path, key):
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    more, options = {"to": ([], {"task": convert, "schema": Convert, "rows": False}), "manifest": ([], {})}.get(
        key, (["prompt=x"], {})
    )
    for word, expected in (
        ("~/x", "no home directory is known (HOME is not set): expected a path without ~"),
        (
            "~nobody-here/x",
            "no user nobody-here is known: expected another path, or ./~nobody-here/x for what is called so",
        ),
    ):
        command(*more, f"{key}={word}", expect=2, **options)
        assert command.lines == [f"fluxbatch: error: {key}={word}: {expected}"]
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_without_a_home_makes_no_tilde_either(command, monkeypatch, tmp_path):
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    command("-m", "prompt=x", "seed=0,1", "output_dir=~/out", expect=2)
    assert len(command.lines) == 2 and list(tmp_path.iterdir()) == []
    (tmp_path / "~old").mkdir()
    assert command("prompt=x", "output_dir=~old/x").output_dir == "~old/x"


def test_a_time_of_day_is_a_run_name_where_the_system_takes_colons(command, tmp_path, monkeypatch):
    name = "2026-11-28_18:50:14"
    assert command(f"run_name={name}", "prompt=x").run_name == name
    command("-m", f"run_name={name}", "prompt=x", "seed=1,2", "output_dir=out")
    assert (tmp_path / "out" / name / "multirun.yaml").exists()
    monkeypatch.setattr("fluxbatch.config.checks.COLONS", False)
    command(f"run_name={name}", "prompt=x", expect=2)
    assert "and without colons" in command.err


def test_run_name_of_a_prompt_tells_settings_apart(command):
    names = [
        command("prompt=A red apple!", *more).run_name
        for more in ([], ["seed=1"], ["sampler.resolution=64"], ["weights_dtype=float32"], ADAPTER)
    ]
    assert len(set(names)) == 5 and all(re.fullmatch(r"a-red-apple-[0-9a-f]{6}", name) for name in names)
    same = ["overwrite=true", "per_device_batch_size=4", "output_dir=elsewhere", "sharding=ddp", "debug=true"]
    assert command("prompt=A red apple!", *same).run_name == names[0]
    assert len(command("prompt=" + "long " * 50).run_name) < 60
    assert command("run_name=a/b", "prompt=x").run_name == "a/b"


# ---- a user's own directory, other commands


@pytest.fixture
def own(tmp_path):
    for name, text in {
        "lora/anime.yaml": "anime: {path: /x/anime.safetensors, scale: 0.8}",
        "lora/realistic.yaml": "realistic: {path: me/realistic}",
        "lora/typo.yaml": "ink: {path: /x, scal: 1}",
        "lora/wrong.yaml": "ink: {path: /x, scale: big}",
        "lora/broken.yaml": "ink: {path: /x",
        "lora/pathless.yaml": "ink: {scale: 1}",
        "model/mine.yaml": "defaults: [flux-dev, _self_]\nflux_name: mine\npretrained_model_name_or_path: /m",
        "model/bare.yaml": "flux_name: bare\npretrained_model_name_or_path: /m",
        "nightly.yaml": "defaults: [config, _self_]\nseed: 5\nprompt: night\nsampler: {resolution: 64}",
        "extra.yaml": "defaults: [config, _self_]\nresolutoin: 5",
        "short.yaml": "defaults: [config, _self_]\nsteps: 5",
        "inner.yaml": "defaults: [config, _self_]\nsampler: {cfg: 5}",
        "choice.yaml": "defaults: [config, _self_]\nmodel: flux-dev",
        "number.yaml": "defaults: [config, _self_]\nlora_config: 3",
        "latin.yaml": "defaults: [config, _self_]\nprompt: café",
    }.items():
        path = tmp_path / "own" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "latin-1")
    return f"--config-dir={tmp_path / 'own'}"


def test_own_config_directory(command, own):
    job = command(own, "prompt=x", "lora=[anime,realistic]", "lora.anime.scale=0.3", "model=mine")
    assert job.lora["anime"] == schema.LoraAdapter("/x/anime.safetensors", None, 0.3, True)
    assert list(job.lora) == ["anime", "realistic"]
    assert (job.model.pretrained_model_name_or_path, job.sampler.num_inference_steps) == ("/m", 28)
    job = command(own, "--config-name=nightly", "hardware=cpu")
    assert (job.seed, job.prompt, job.sampler.resolution, job.hardware.platform.name) == (5, "night", 64, "cpu")


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["lora=typo"], ["lora.ink.scal", "lora/typo"]),
        (["lora=wrong"], ["lora.ink.scale", "big", "a number"]),
        (["lora=broken"], ["broken.yaml", "line 1"]),
        (["lora=pathless"], ["lora.ink.path", "missing"]),
        (["lora=animee"], ["lora=animee", "did you mean anime?"]),
        (["model=bare"], ["sampler"]),
        (["--config-name=extra"], ["resolutoin", "extra", "did you mean sampler.resolution?"]),
        (["--config-name=short"], ["steps", "short", "did you mean sampler.num_inference_steps?"]),
        (["--config-name=inner"], ["sampler.cfg", "inner", "did you mean sampler.guidance_scale?"]),
        (["--config-name=nothing"], ["nothing"]),
        (
            ["--config-name=choice"],
            ["model: In 'choice'", "got flux-dev, expected {flux_name, ", "defaults: override model"],
        ),
        (["--config-name=latin"], ["own/latin.yaml: not UTF-8: byte 0xe9 at 39"]),
        (["--config-name=number"], ["lora_config: In 'number'", "got 3, expected {lora_model_name_or_path, "]),
    ],
)
def test_mistakes_in_own_files(command, own, argv, named):
    command(own, "prompt=x", *argv, expect=2)
    assert len(command.lines) == 1 and all(word in command.err for word in ["fluxbatch: error: ", *named])


@dataclasses.dataclass
class ReplayJob(Job):
    id: str = MISSING
    limit: int = 3


def test_a_sibling_command_adds_keys_and_needs_no_rows(command):
    job = command("id=a, b", "output_dir=out", schema=ReplayJob, rows=False)
    assert (type(job), job.id, job.limit, job.run_name) == (ReplayJob, "a, b", 3, None)
    command("output_dir=out", schema=ReplayJob, rows=False, expect=2)
    assert command.lines == ["fluxbatch: error: id: a value is missing; expected text"]


def test_flags_of_compilers_need_no_quotes(command):
    job = command("prompt=x", "xla_flags=[--xla_a=b,--xla_c]", 'libtpu_init_args=["--d=1"]')
    assert job.hardware.xla_flags == ["--xla_a=b", "--xla_c"] and job.hardware.libtpu_init_args == ["--d=1"]


# ---- mistakes


WRONG = [
    ("resoluton=3", "resoluton", "did you mean resolution?"),
    ("sampler.num_steps=4", "sampler.num_steps", "sampler.num_inference_steps"),
    ("num_inference_step=4", "num_inference_step", "did you mean num_inference_steps?"),
    ("+unknown=1", "unknown", "no key"),
    ("++output.unknown=1", "output.unknown", "format, filename"),
    ("~nothing", "nothing", "no key"),
    ("~seed", "seed", "missing"),
    ("~output_dir", "output_dir", "missing"),
    ("+seed=3", "seed", "already"),
    ("sweep.x=1", "sweep.x", "no key"),
    ("flux-schnell", "flux-schnell", "did you mean model=flux-schnell?"),
    ("--seed=3", "--seed=3", "no dashes, as in seed=…"),
    ("--steps=8", "--steps=8", "no dashes, as in num_inference_steps=…"),
    ("--batch-size=8", "--batch-size=8", "no dashes, as in per_device_batch_size=…"),
    ("--nothing=8", "--nothing=8", "no dashes, as in seed=3"),
    ("steps=8", "steps", "did you mean num_inference_steps?"),
    ("guidance=3", "guidance", "did you mean guidance_scale?"),
    ("cfg=3", "cfg", "did you mean guidance_scale?"),
    ("size=512", "size", "did you mean resolution?"),
    ("batch_size=4", "batch_size", "did you mean per_device_batch_size?"),
    ("out=x", "out", "did you mean output_dir?"),
    ("n=4", "n", "did you mean num_images?"),
    ("N=4", "N", "did you mean num_images?"),
    ("sampler.steps=8", "sampler.steps", "did you mean sampler.num_inference_steps?"),
    ("gudance=8", "gudance", "did you mean guidance_scale?"),
    ("dtype=bfloat16", "dtype", "did you mean weights_dtype?"),
    ("device=gpu", "device", "did you mean hardware?"),
    ("name=first", "name", "did you mean run_name?"),
    ("prompts=a.jsonl", "prompts", "did you mean manifest?"),
    ("checkpoint=/m", "checkpoint", "did you mean pretrained_model_name_or_path?"),
    ("gpus=8", "gpus", "did you mean sharding?"),
    ("sharding.tp=8", "sharding.tp", "did you mean sharding.ici_tensor_parallelism?"),
    ("model=flux-shnell", "model=flux-shnell", "did you mean flux-schnell?"),
    ("flux_name=flux2", "model=flux2", "one of chroma, flex-1-alpha, flux-canny"),
    ("hardware=npu", "hardware=npu", "auto, cpu, gpu, tpu"),
    ("num_inference_steps=abc", "num_inference_steps=abc", "a whole number"),
    ("seed=1.5", "seed=1.5", "a whole number"),
    ("seed=null", "seed=null", "a whole number"),
    ("guidance_scale=high", "sampler.guidance_scale", "a number"),
    ("attention=flashh", "hardware.attention", "one of auto, dot_product, flash, cudnn_flash_te"),
    ("weights_dtype=int4", "weights_dtype=int4", "one of auto, float32"),
    ("overwrite=maybe", "overwrite=maybe", "true or false"),
    ("time_shift=3", "sampler.time_shift=3", "true or false or null"),
    ("scale=[big]", "scale=[big]", "a list"),
    ("seed=1,2", "seed=1,2", "--multirun"),
    ("lora=a,b", "lora=a,b", "brackets"),
    ("guidance_scale=[1", "guidance_scale=[1", "Hydra"),
    ("lora.anime.scale=1", "lora.anime", "lora=NAME"),
    ("+lora.anime.path=a.safetensors", "anime", "lora=NAME"),
    ("output_dir=${nope}", "output_dir", "nope"),
    ("hydra.unknown=1", "hydra.unknown", "not in"),
    ("num_inference_steps=0", "sampler.num_inference_steps=0", "from 1"),
    ("height=-16", "sampler.height=-16", "from 1"),
    ("seed=-1", "seed=-1", "from 0"),
    ("per_device_batch_size=0", "sharding.per_device_batch_size=0", "from 1"),
    ("ici_fsdp_parallelism=0", "sharding.ici_fsdp_parallelism=0", "-1"),
    ("guidance_scale=nan", "sampler.guidance_scale=nan", "a number"),
    ("quality=101", "output.quality=101", "1 to 100"),
    ("png_level=10", "output.png_level=10", "0 to 9"),
    ("filename=picture", "output.filename=picture", "{i} or {id}"),
    ("filename={index}", "output.filename={index}", "{seed}"),
    ("filename={i.real}", "output.filename={i.real}", "{seed}"),
    ("filename={id:.1}", "output.filename={id:.1}", "{seed}"),
    ("filename={i", "output.filename={i", "{seed}"),
    ("filename=../{i}", "output.filename=../{i}", "relative"),
    ("filename=/abs/{id}", "output.filename=/abs/{id}", "relative"),
    ("filename=.fluxbatch/{id}", "output.filename=.fluxbatch/{id}", "hidden"),
    ("run_name=../x", "run_name=../x", "relative"),
    ("run_name=", "run_name=", "a name"),
    (r"run_name='a\b'", "run_name=a\\b", "backslashes"),
    ("filename={i}:x", "output.filename={i}:x", "without colons"),
    ("output_dir=", "output_dir=", "a path"),
    ("output_dir=gs:/bucket/out", "output_dir=gs:/bucket/out", "expected gs://bucket/out"),
    ("pretrained_model_name_or_path=gs:/b/m", "model.pretrained_model_name_or_path=gs:/b/m", "expected gs://b/m"),
    ("vae_model_name_or_path=https:/h/ae.safetensors", "model.vae_model_name_or_path=https:/h/", "expected https://h/"),
    ("manifest=rows.jsonl", "prompt=x", "manifest=rows.jsonl"),
    ("flash_block_sizes={block_p: 1}", "hardware.flash_block_sizes.block_p=1", "block_q"),
    ("flash_block_sizes={block_q: 0}", "hardware.flash_block_sizes.block_q=0", "a multiple of 128"),
    (
        "flash_block_sizes={block_kv_compute: 200}",
        "hardware.flash_block_sizes.block_kv_compute=200",
        "a multiple of 128",
    ),
    (
        "flash_block_sizes={block_kv: 256, block_kv_compute: 384}",
        "hardware.flash_block_sizes.block_kv=256",
        "a multiple of block_kv_compute=384",
    ),
    ("xla_flags=[fast]", "hardware.xla_flags=fast", "--name=value"),
    ("xla_flags=${seed}", "hardware.xla_flags=0", "a list"),
    ("flash_block_sizes=${seed}", "hardware.flash_block_sizes=0", "{name: a whole number"),
    ("flash_block_sizes=${lora_config}", "hardware.flash_block_sizes=", "{name: a whole number"),
    ("weight_name=${seed}", "lora_config.weight_name=0", "a list"),
    ("scale=${hardware.xla_flags}", "lora_config.scale[0]=--xla", "a number"),
    ("max_failures=-1", "max_failures=-1", "from 0"),
    ("num_images=0", "num_images=0", "from 1"),
    ("max_sequence_length=1000000", "sampler.max_sequence_length=1000000", "from 1 to 8,192"),
    ("per_device_batch_size=10000000000000", "sharding.per_device_batch_size=10000000000000", "from 1 to 4,096"),
    ("base_shift=1000", "sampler.base_shift=1000", "from -20 to 20"),
    ("text_cache_gigabytes=1e300", "text_cache_gigabytes=1e+300", "above 0"),
    ("text_cache_dir=/dev/null", "text_cache_dir=/dev/null", "a directory, found a file"),
    ("jax_cache_dir=/dev/null", "jax_cache_dir=/dev/null", "a directory, found a file"),
    ("clip_model_name_or_path=", "model.clip_model_name_or_path=", "a path or name"),
    ("+sampler/num_inference_steps=8", "sampler/num_inference_steps", "no key"),
    ("lora=null", "lora=null", "expected one of flux-canny, flux-depth, none, outline, pixel-art"),
    ("sampler=1", "sampler=1", "expected one of canny"),
    ("lora=[outline,outlin]", "lora=outlin", "did you mean outline?"),
    ("adapter_name=[a,b]", "lora_config.lora_model_name_or_path", "equal length"),
]


def test_usual_names_lead_to_keys_that_are_there():
    known = {*GROUPS, *(key.rpartition(".")[2] for key in overrides.leaves(Job))}
    assert {*overrides.USUAL.values()} <= known
    assert not {*overrides.USUAL} & known  # a name that is a key is none for another


@pytest.mark.parametrize(("word", "named", "hint"), WRONG, ids=[w[0] for w in WRONG])
def test_a_wrong_word_is_one_line(command, word, named, hint):
    command("prompt=x", word, expect=2)
    assert command.jobs == [] and command.out == ""
    [line] = command.lines
    assert line.startswith("fluxbatch: error: ") and named in line and hint in line


def test_an_address_that_has_lost_a_slash_makes_no_directory(command, tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(application, "_scratch", application._scratch.__wrapped__)
    command("manifest=gs:/bucket/a.jsonl", expect=2)
    assert command.lines == ["fluxbatch: error: manifest=gs:/bucket/a.jsonl: expected gs://bucket/a.jsonl"]
    command("to=gs:/bucket/copy", schema=Convert, rows=False, expect=2)
    assert command.lines == ["fluxbatch: error: to=gs:/bucket/copy: expected gs://bucket/copy"]
    command("-m", "prompt=x", "seed=0,1", "output_dir=gs:/bucket/out", expect=2)
    assert command.jobs == [] and [p.name for p in tmp_path.iterdir()] == ["temporary"]
    assert command("prompt=x", "output_dir=a:b").output_dir == "a:b"


def test_all_mistakes_at_once(command):
    command("prompt=x", "seed=a", "attention=b", "foo=1", expect=2)
    assert [line.split()[2] for line in command.lines] == ["seed=a:", "attention=b", "foo=1:"]
    command("seed=-1", "quality=0", expect=2)
    assert [line.split()[2] for line in command.lines] == ["prompt=null:", "seed=-1:", "output.quality=0:"]


def test_two_automatic_axes_and_same_adapter_names(command):
    command("prompt=x", "ici_data_parallelism=-1", "ici_fsdp_parallelism=-1", expect=2)
    assert "sharding.ici_fsdp_parallelism=-1" in command.err and len(command.lines) == 1
    twice = [re.sub(r"\[(\w+)\]", r"[\1,\1]", word) for word in ADAPTER]
    command("prompt=x", *twice, expect=2)
    assert "lora_config.adapter_name[1]=n" in command.err and len(command.lines) == 1
    command("prompt=x", *ADAPTER, "lora_config.weight_name=[5]", "lora_config.scale=[1e30]", expect=2)
    assert "lora_config.weight_name[0]=5: expected a file's name, or null" in command.lines[0]
    assert "lora_config.scale[0]=1e+30: expected a number, usually 0.0 to 1.0" in command.lines[1]


def test_debug_shows_the_trace(command):
    command("prompt=x", "hardware=npu", "debug=true", expect=2)
    assert "Traceback" in command.err and command.lines[-1].startswith("fluxbatch: error: hardware=npu")


# ---- exit codes


def test_exit_code_is_the_task_s(command):
    for code in (0, 3, 75):
        command.code = code
        command("prompt=x", expect=code)


def test_what_a_task_raises(command):
    def mistaken(job):
        raise UserError("rows.jsonl:1: bad", "rows.jsonl:7: worse")

    command("prompt=x", task=mistaken, expect=2)
    assert command.lines == ["fluxbatch: error: rows.jsonl:1: bad", "fluxbatch: error: rows.jsonl:7: worse"]

    def interrupted(job):
        raise KeyboardInterrupt

    command("prompt=x", task=interrupted, expect=130)
    assert command.lines == ["fluxbatch: interrupted"]

    def broken(job):
        raise ZeroDivisionError("ours, not the user's")

    command("prompt=x", task=broken, expect=1)
    assert "Traceback" in command.err and "in broken" in command.err


# ---- as a process


@pytest.mark.parametrize(
    ("argv", "code", "stdout"),
    [
        (["--help"], 0, "Groups (name=choice)"),
        (["--cfg", "job", "num_inference_steps=9", "hardware=cpu"], 0, "num_inference_steps: 9"),
        (["--info", "defaults"], 0, "sampler/mini"),
        (["--version"], 0, "fluxbatch "),
        (["prompt=x"], 0, "ran"),
        (["prompt=x", "sharding=fsdpp"], 2, ""),
    ],
)
def test_as_a_process(tmp_path, argv, code, stdout):
    """Hydra leaves no file behind, and nothing imports jax."""
    (tmp_path / "work").mkdir()
    entry = tmp_path / "entry.py"
    entry.write_text(
        "import atexit, sys\n"
        "from fluxbatch.config import application as cli\n"
        "atexit.register(lambda: print('jax imported', file=sys.stderr) if 'jax' in sys.modules else None)\n"
        "cli.main(lambda job: print('ran') or 0)\n"
    )
    root = str(Path(schema.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, entry, *argv], cwd=tmp_path / "work", env={"PYTHONPATH": root}, capture_output=True, text=True
    )
    assert done.returncode == code and stdout in done.stdout
    assert len(done.stderr.splitlines()) == (code != 0), done.stderr
    assert list((tmp_path / "work").iterdir()) == []


@pytest.fixture
def printing(tmp_path):
    """Starts a command that prints so many lines, in a process of its own."""
    entry = tmp_path / "entry.py"
    entry.write_text(
        "import os, sys\n"
        "from fluxbatch.config import application as cli\n"
        "def task(job):\n"
        "    for n in range(job.seed):\n"
        "        print('größer' * 100, flush=job.overwrite)\n"
        "        print('schöner' * 100, file=sys.stderr)\n"
        "    return 3\n"
        "cli.main(task)\n"
    )
    root = str(Path(schema.__file__).parents[2])

    def start(*words, env=None, by=(), **streams):
        return subprocess.Popen(
            [*by, sys.executable, entry, "prompt=x", *words], env={"PYTHONPATH": root, **(env or {})}, **streams
        )

    return start


@pytest.mark.parametrize("words", [["seed=1"], ["seed=1", "overwrite=true"], ["seed=1000", "overwrite=true"]], ids=str)
def test_a_reader_that_has_left_costs_nothing(printing, words):
    """Neither at a print nor at the end, when Python writes what is left."""
    reader, writer = os.pipe()
    os.close(reader)
    process = printing(*words, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    said = process.communicate()[1].decode()
    assert process.returncode == 3 and "Error" not in said and said.count("\n") == int(words[0][5:])
    reader, writer = os.pipe()
    os.close(reader)
    process = printing(*words, stdout=writer, stderr=writer)
    os.close(writer)
    assert process.wait() == 3


def test_what_a_terminal_cannot_show_is_spelt_out(printing):
    process = printing("seed=1", env={"PYTHONIOENCODING": "ascii"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate()
    assert process.returncode == 3 and out.startswith(b"gr\\xf6") and b"Traceback" not in err


def test_a_closed_output_is_no_mistake(printing):
    closing = [
        "/bin/sh",
        "-c",
        'exec "$@" >&-',
        "sh",
    ]  # not by a preexec_fn: JAX warns of the fork that this needs, if a test before has started it
    process = printing("seed=2", stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, by=closing)
    assert process.wait() == 3


@pytest.mark.parametrize("closed", [(2,), (0, 2), (1, 2), (0, 1, 2)], ids=str)
def test_closed_streams_can_be_written_to_and_no_file_gets_their_numbers(tmp_path, closed):
    entry = tmp_path / "opening.py"
    entry.write_text(
        "import os, sys\nfrom fluxbatch.config import application as cli\ndef task(job):\n    sys.stderr.write('a "
        "bar')\n    return os.open(os.devnull, os.O_RDONLY)\n"
        "cli.main(task)\n"
    )
    closing = ["/bin/sh", "-c", f'exec "$@" {" ".join(f"{number}>&-" for number in closed)}', "sh"]
    root = str(Path(schema.__file__).parents[2])
    assert subprocess.run([*closing, sys.executable, entry, "prompt=x"], env={"PYTHONPATH": root}).returncode == 3


def test_the_environment_s_flags_win(monkeypatch):
    from fluxbatch.distributed.backend import set_compiler_flags

    monkeypatch.setenv("XLA_FLAGS", "--a=1 --b")
    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
    set_compiler_flags(["--b=2", "--c=3", "--ab=4"], [])
    assert os.environ["XLA_FLAGS"] == "--c=3 --ab=4 --a=1 --b" and "LIBTPU_INIT_ARGS" not in os.environ


@pytest.mark.parametrize("given", [{}, {"XLA_CLIENT_MEM_FRACTION": "0.3"}, {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.3"}])
def test_the_share_of_a_gpu_is_told_once(monkeypatch, given):
    """JAX knows it by two names, and does not start if it is told both."""
    from fluxbatch.distributed import backend, chips

    for name in (*chips.GPU_SHARES, "XLA_FLAGS", "LIBTPU_INIT_ARGS"):
        monkeypatch.setenv(name, "")
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    backend.set_compiler_flags([], [])
    assert [os.environ[name] for name in chips.GPU_SHARES if os.environ[name]] == list(given.values() or ["0.9"])
    assert chips.gpu_share() == (0.3 if given else 0.9)
