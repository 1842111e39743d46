"""Launch specs: what the judges of their formats accept, in ranges that make sense, and no wrong field passes."""

from __future__ import annotations

import base64
import copy
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib

import pytest
import yaml
from conftest import GOLDEN, metadata, xla_flags
from test_hosts import ROWS, long_manifest, pictures

from fluxbatch.types import Exit

ROOT = GOLDEN.parent.parent
LAUNCH = ROOT / "jobs" / "launch"
_spec = importlib.util.spec_from_file_location("render", LAUNCH / "render.py")
module = importlib.util.module_from_spec(_spec)
sys.modules["render"] = module  # its dataclasses ask for it
_spec.loader.exec_module(module)

WORDS = [
    "model=flux-dev",
    "sharding=fsdp",
    "manifest=gs://bucket/prompts.jsonl",
    "output_dir=gs://bucket/out",
    "run_name=night",
    "replica_count=6",
    "container_image=eu.pkg.dev/p/fluxbatch",
    "project=p",
    "hf_token_secret=hf",
]

FLAVOR = {"gpu": "cuda", "tpu": "tpu"}  # of the image


@pytest.fixture
def render(capsys):
    def call(*words, defaults=WORDS):
        with pytest.raises(SystemExit) as stop:
            module.application.main(module.render, schema=module.Launch, argv=[*defaults, *words])
        out, err = capsys.readouterr()
        return (out if stop.value.code == 0 else err), stop.value.code

    return call


def at(spec, *path):
    for key in path:
        spec = spec[key]
    return spec


JOBSET = {
    "type": "object",
    "additionalProperties": False,
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
        "kind": {"const": "JobSet"},
        "metadata": {
            "type": "object",
            "required": ["name"],
            "additionalProperties": False,
            "properties": {
                "name": {"type": "string", "pattern": "^[a-z]([a-z0-9-]{0,40}[a-z0-9])?$"},
                "annotations": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "alpha.jobset.sigs.k8s.io/exclusive-topology": {"const": "cloud.google.com/gke-nodepool"}
                    },
                },
            },
        },
        "spec": {
            "type": "object",
            "additionalProperties": False,
            "required": ["replicatedJobs", "network", "failurePolicy"],
            "properties": {
                "network": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {"enableDNSHostnames": {"type": "boolean"}, "subdomain": {"type": "string"}},
                },
                "failurePolicy": {
                    "type": "object",
                    "additionalProperties": False,
                    "required": ["maxRestarts"],
                    "properties": {
                        "maxRestarts": {"type": "integer", "minimum": 0},
                        "rules": {
                            "type": "array",
                            "items": {
                                "type": "object",
                                "additionalProperties": False,
                                "required": ["name", "action"],
                                "properties": {
                                    "name": {"type": "string"},
                                    "action": {
                                        "enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]
                                    },
                                    "targetReplicatedJobs": {"type": "array"},
                                    "onJobFailureReasons": {
                                        "type": "array",
                                        "items": {
                                            "enum": [
                                                "BackoffLimitExceeded",
                                                "DeadlineExceeded",
                                                "FailedIndexes",
                                                "MaxFailedIndexesExceeded",
                                                "PodFailurePolicy",
                                            ]
                                        },
                                    },
                                },
                            },
                        },
                    },
                },
                "replicatedJobs": {
                    "type": "array",
                    "minItems": 1,
                    "maxItems": 1,
                    "items": {
                        "type": "object",
                        "additionalProperties": False,
                        "required": ["name", "replicas", "template"],
                        "properties": {
                            "name": {"type": "string"},
                            "replicas": {"type": "integer", "minimum": 1},
                            "template": {
                                "type": "object",
                                "additionalProperties": False,
                                "required": ["spec"],
                                "properties": {"spec": {"type": "object"}},
                            },
                        },
                    },
                },
            },
        },
    },
}


def check(kind, text, target, replicas=6):
    """AssertionError, or the judge's own, unless ``text`` is a sound spec of ``kind`` for ``target``."""
    if kind in ("jobset", "cronjob"):
        judge = pytest.importorskip("kubernetes_validate")
        spec = yaml.safe_load(text)
        if kind == "jobset":
            pytest.importorskip("jsonschema").validate(spec, JOBSET)
            job, size, restarts = (
                at(spec, "spec", "replicatedJobs", 0, "template", "spec"),
                target.hosts,
                "backoffLimit",
            )
            assert at(spec, "spec", "replicatedJobs", 0, "replicas") == replicas
            assert spec["metadata"]["name"] == at(spec, "spec", "network", "subdomain")
            judge.validate(
                {"apiVersion": "batch/v1", "kind": "Job", "metadata": spec["metadata"], "spec": job},
                "1.32",
                strict=True,
            )
        else:
            judge.validate(spec, "1.32", strict=True)
            job, size, restarts = at(spec, "spec", "jobTemplate", "spec"), replicas, "backoffLimitPerIndex"
            check_schedule(spec["spec"]["schedule"])
            assert spec["spec"]["concurrencyPolicy"] == "Forbid"  # the job would meet itself
        check_job(spec["metadata"]["name"], job, target, size, restarts, replicas, kind)
    else:
        protobuf = pytest.importorskip("google.protobuf.json_format")
        batch_v1 = pytest.importorskip("google.cloud.batch_v1")
        spec = json.loads(text)
        if kind == "scheduler":
            scheduler_v1 = pytest.importorskip("google.cloud.scheduler_v1")
            protobuf.ParseDict(spec, scheduler_v1.Job.pb(scheduler_v1.Job()))
            check_schedule(spec["schedule"])
            place = r"projects/[\w-]+/locations/[\w-]+"
            assert re.fullmatch(rf"https://batch\.googleapis\.com/v1/{place}/jobs", at(spec, "httpTarget", "uri"))
            assert at(spec, "httpTarget", "httpMethod") == "POST" and re.fullmatch(
                rf"{place}/jobs/[a-z0-9-]+", spec["name"]
            )
            assert at(spec, "httpTarget", "oauthToken", "serviceAccountEmail") == "fluxbatch@p.iam.gserviceaccount.com"
            spec = json.loads(base64.b64decode(at(spec, "httpTarget", "body"), validate=True))
        protobuf.ParseDict(spec, batch_v1.Job.pb(batch_v1.Job()))
        check_batch(spec, target, replicas)


def check_schedule(text):
    limits = ((0, 59), (0, 23), (1, 31), (1, 12), (0, 7))
    for field, (low, high) in zip(text.split(" "), limits, strict=True):
        assert field == "*" or low <= int(field) <= high


def check_job(name, job, target, size, restarts, replicas, kind):
    pod = at(job, "template", "spec")
    (container,) = pod["containers"]
    assert (job["parallelism"], job["completions"], job["completionMode"]) == (size, size, "Indexed")
    assert (
        1 <= job[restarts] <= 100
        and pod["restartPolicy"] == "Never"
        and 30 <= pod["terminationGracePeriodSeconds"] <= 600
    )
    (final, again, lost) = at(job, "podFailurePolicy", "rules")
    assert (
        final["action"] == {"jobset": "FailJob", "cronjob": "FailIndex"}[kind]
        and again["action"] == lost["action"] == "Ignore"
    )
    assert at(final, "onExitCodes", "values") == [2, 3]
    codes = at(again, "onExitCodes", "values")
    assert (
        {75, 76, 134} <= {*codes}
        and not {0, 1, 2, 3} & {*codes}
        and at(lost, "onPodConditions", 0, "type") == "DisruptionTarget"
    )
    (limit,) = container["resources"]["limits"].items()
    assert limit == ({"tpu": "google.com/tpu", "gpu": "nvidia.com/gpu"}[target.hardware], target.chips)
    selector = pod["nodeSelector"]
    if target.hardware == "tpu":
        width, height = map(int, selector["cloud.google.com/gke-tpu-topology"].split("x"))
        assert (
            width * height == target.hosts * target.chips
            and selector["cloud.google.com/gke-tpu-accelerator"] == "tpu-v6e-slice"
        )
    else:
        assert selector["cloud.google.com/gke-accelerator"] == target.accelerator
    args = container["args"]
    assert f"hardware={target.hardware}" in args and f"replica_count={replicas}" in args
    assert container["image"] == f"eu.pkg.dev/p/fluxbatch:{FLAVOR[target.hardware]}"
    env = {entry["name"]: entry for entry in container["env"]}
    assert at(env, "HF_TOKEN", "valueFrom", "secretKeyRef") == {"name": "hf", "key": "HF_TOKEN"}
    if kind == "jobset":
        assert "replica_index=$(REPLICA_INDEX)" in args and "job-index'" in at(
            env, "REPLICA_INDEX", "valueFrom", "fieldRef", "fieldPath"
        )
    if target.hosts > 1:
        assert env["JAX_NUM_PROCESSES"]["value"] == str(target.hosts)
        assert re.fullmatch(
            rf"{name}-replica-\$\(REPLICA_INDEX\)-0\.{name}:\d{{4,5}}", env["JAX_COORDINATOR_ADDRESS"]["value"]
        )
        assert "job-completion-index'" in at(env, "JAX_PROCESS_ID", "valueFrom", "fieldRef", "fieldPath")
        assert list(env).index("REPLICA_INDEX") < list(env).index(
            "JAX_COORDINATOR_ADDRESS"
        )  # defined before it is used
    else:
        assert not any(name.startswith("JAX_") for name in env)


def check_batch(spec, target, replicas):
    (group,) = spec["taskGroups"]
    assert group["taskCount"] == group["parallelism"] == replicas <= 10_000 and group["taskCountPerNode"] == 1
    task = group["taskSpec"]
    assert 1 <= task["maxRetryCount"] <= 10
    retry, fail = task["lifecyclePolicies"]
    assert retry["action"] == "RETRY_TASK" and {1, 75, 76, 134, 50001} <= {*at(retry, "actionCondition", "exitCodes")}
    assert fail["action"] == "FAIL_TASK" and at(fail, "actionCondition", "exitCodes") == [2, 3]
    (instance,) = at(spec, "allocationPolicy", "instances")
    assert instance["installGpuDrivers"] is True and instance["policy"]["machineType"] == target.machine
    assert (
        instance["policy"]["provisioningModel"] in ("SPOT", "STANDARD")
        and 50 <= at(instance, "policy", "bootDisk", "sizeGb") <= 65_536
    )
    container = at(task, "runnables", 0, "container")
    assert container["imageUri"] == f"eu.pkg.dev/p/fluxbatch:{FLAVOR[target.hardware]}"
    assert at(task, "runnables", 0, "environment", "secretVariables") == {
        "HF_TOKEN": "projects/p/secrets/hf/versions/latest"
    }
    assert f"hardware={target.hardware}" in container["commands"]
    assert not any(word.startswith("replica_") for word in container["commands"])  # Batch says it


FITS = [(kind, name) for kind in ("jobset", "cronjob", "batch", "scheduler") for name, target in module.TARGETS.items()
        if kind == "jobset" or (target.hosts == 1 and (kind == "cronjob" or target.hardware == "gpu"))]  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), FITS)
def test_every_spec_is_sound(render, kind, name):
    text, code = render(f"kind={kind}", f"target={name}")
    assert code == 0, text
    check(kind, text, module.TARGETS[name])


@pytest.mark.parametrize("name", ["日本語", "___", "Nacht_ünï", "2024 night", f"{'a' * 39}-b", "Night/run.2", "it's"])
def test_a_spec_is_sound_whatever_the_run_is_called(render, name):
    words = [word for word in WORDS if not word.startswith("run_name=")] + [f'run_name="{name}"']
    for kind in ("jobset", "cronjob", "scheduler"):
        text, code = render(f"kind={kind}", "target=h100-8", defaults=words)
        assert code == 0, text
        check(kind, text, module.TARGETS["h100-8"])
    slurm = [word for word in words if "secret" not in word and "project" not in word]
    text, _ = render("kind=slurm", "target=h100-8", defaults=slurm)
    (line,) = re.findall("^#SBATCH (--job-name=.*)$", text, re.MULTILINE)
    assert shlex.split(line, comments=True) == [f"--job-name={name}"]  # as sbatch reads it


WRONG = [
    ("jobset", ("spec", "replicatedJobs", 0, "replicas"), 5),
    ("jobset", ("spec", "replicatedJobs", 0, "replica"), 6),
    ("jobset", ("spec", "failurePolicy", "rules", 0, "action"), "Fail"),
    ("jobset", ("kind",), "Jobset"),
    ("jobset", ("spec", "replicatedJobs", 0, "template", "spec", "completions"), 3),
    ("jobset", ("spec", "replicatedJobs", 0, "template", "spec", "backofLimit"), 3),
    (
        "jobset",
        ("spec", "replicatedJobs", 0, "template", "spec", "podFailurePolicy", "rules", 1, "onExitCodes", "values"),
        [76],
    ),
    (
        "jobset",
        (
            "spec",
            "replicatedJobs",
            0,
            "template",
            "spec",
            "template",
            "spec",
            "nodeSelector",
            "cloud.google.com/gke-tpu-topology",
        ),
        "2x4",
    ),
    (
        "jobset",
        (
            "spec",
            "replicatedJobs",
            0,
            "template",
            "spec",
            "template",
            "spec",
            "containers",
            0,
            "resources",
            "limits",
            "google.com/tpu",
        ),
        8,
    ),
    (
        "jobset",
        ("spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "containers", 0, "env", 2, "value"),
        "8",
    ),
    ("jobset", ("spec", "network", "subdomain"), "other"),
    ("cronjob", ("spec", "schedule"), "0 25 * * *"),
    ("cronjob", ("spec", "concurrencyPolicy"), "Never"),
    ("cronjob", ("spec", "shedule"), "* * * * *"),
    ("cronjob", ("spec", "jobTemplate", "spec", "parallelism"), 1),
    ("batch", ("taskGroups", 0, "taskSpec", "maxRetryCount"), 11),
    ("batch", ("taskGroups", 0, "taskCounts"), 6),
    ("batch", ("taskGroups", 0, "taskSpec", "lifecyclePolicies", 0, "action"), "RETRY"),
    ("batch", ("taskGroups", 0, "taskSpec", "lifecyclePolicies", 0, "actionCondition", "exitCodes"), [75, 76]),
    ("batch", ("allocationPolicy", "instances", 0, "policy", "provisioningModel"), "PREEMPTED"),
    ("batch", ("allocationPolicy", "instances", 0, "policy", "machineType"), "a2-highgpu-1g"),
    ("batch", ("taskGroups", 0, "taskCount"), "six"),
    ("scheduler", ("schedule",), "0 3 * *"),
    ("scheduler", ("httpTarget", "httpMethod"), "PUSH"),
    ("scheduler", ("httpTarget", "uri"), "https://batch"),
    ("scheduler", ("httpTarget", "oauth"), {}),
]


@pytest.mark.parametrize(("kind", "path", "value"), WRONG, ids=lambda value: str(value)[-40:])
def test_a_wrong_field_is_noticed(render, kind, path, value):
    name = "v6e-16" if kind == "jobset" else "h100-8"
    text, _ = render(f"kind={kind}", f"target={name}")
    check(kind, text, module.TARGETS[name])
    spec = yaml.safe_load(text)
    at(wrong := copy.deepcopy(spec), *path[:-1])[path[-1]] = value
    assert wrong != spec
    with pytest.raises(Exception) as caught:  # noqa: PT011 (each judge has its own)
        check(kind, json.dumps(wrong), module.TARGETS[name])
    assert not isinstance(caught.value, KeyError), "the path is not in the spec"


@pytest.mark.parametrize("name", module.TARGETS)
def test_the_targets_agree_with_themselves(name):
    target = module.TARGETS[name]
    assert math_of(name) == target.hosts * target.chips
    machine = re.search(r"-(\d+)[tg]$", target.machine)
    assert machine is None or int(machine[1]) == target.chips


def math_of(name):
    """Chips by a target's name: v6e-16 has sixteen, 2xh100-8 twice eight."""
    times, chips = re.fullmatch(r"(?:(\d+)x)?\w+-(\d+)", name).groups()
    return int(times or 1) * int(chips)


@pytest.mark.parametrize(("words", "named"), [
    (["target=v6e-9"], "v6e-16"),
    (["target=v6e-8", "sharding=single"], "sharding=single: expected all 8 chips of target=v6e-8 in use: sharding=ddp (each has its own pictures) or sharding=fsdp"),
    (["target=h100-8", "kind=slurm", "sharding=single"], "sharding=single: expected all 8 chips of target=h100-8 in use: sharding=ddp"),
    (["target=v6e-8", "ici_fsdp_parallelism=16"], "ici_fsdp_parallelism=16: expected all 8 chips"),
    (["target=v6e-8", "sharding=single", "ici_tensor_parallelism=3"], "ici_tensor_parallelism=3: expected all 8 chips of target=v6e-8 in use: sharding=ddp"),
    (["target=v6e-8", "hardware=gpu"], "hardware=gpu: expected tpu"),
    (["target=v6e-16", "kind=cronjob"], "one host"), (["target=v6e-4", "kind=batch"], "expected a GPU"),
    (["target=v6e-8", "output_dir=outputs"], "output_dir=outputs: expected gs://"),
    (["target=v6e-8", "no_such_key=1"], "no_such_key"),
    (["target=h100-8", "container_image=null"], "container_image=null: expected an image for target=h100-8, such as REGION-docker.pkg.dev/PROJECT/fluxbatch/fluxbatch:cuda"),
    (["target=h100-8", "container_image=eu.pkg.dev/p/fluxbatch:tpu"], "container_image=eu.pkg.dev/p/fluxbatch:tpu: expected"),
    (["target=h100-8", "kind=scheduler", "project=null", "hf_token_secret=null"], "project=null: expected"),
    (["target=h100-8", "kind=batch", "project=null"], "which hf_token_secret needs"),
    (["target=h100-8", "kind=slurm"], "hf_token_secret=hf: expected null"), (["target=h100-8", "hf_token_secret=a/b"], "hf_token_secret=a/b: expected"),
    (["target=4090"], "target=4090: expected one of v6e-1"),
])  # fmt: skip
def test_what_cannot_work_is_not_rendered(render, words, named):
    text, code = render(*words)
    assert code == Exit.BAD_INPUT and named in text and "Traceback" not in text


def test_targets_have_the_names_of_the_plan(render):
    for name, other in (("h100", "h100-1"), ("L4", "l4-1"), ("1xa100-8", "a100-8")):
        text, code = render(f"target={name}")
        assert code == 0, text
        assert text == render(f"target={other}")[0]
    text, code = render(
        "kind=slurm",
        "target=2x4090-4",
        "hf_token_secret=null",
        "container_image=null",
        "manifest=rows.jsonl",
        "output_dir=out",
    )
    assert (
        code == 0 and "#SBATCH --nodes=2\n" in text and "#SBATCH --gpus-per-node=4\n" in text
    )  # a cluster has what it has


def test_an_image_with_a_tag_or_digest_is_taken_as_it_is(render):
    for image in ("localhost:5000/fluxbatch:v2", "p/fluxbatch@sha256:abc"):
        assert f"image: {image}\n" in render(f"container_image={image}")[0]
    assert "image: localhost:5000/fluxbatch:tpu\n" in render("container_image=localhost:5000/fluxbatch")[0]


def test_a_gated_checkpoint_without_a_token_is_remarked_on(capsys):
    for words, remarked in (
        ([], False),
        (["hf_token_secret=null"], True),
        (["hf_token_secret=null", "pretrained_model_name_or_path=gs://b/dev"], False),
    ):
        with pytest.raises(SystemExit) as stop:
            module.application.main(module.render, schema=module.Launch, argv=[*WORDS, *words])
        assert not stop.value.code and ("black-forest-labs/FLUX.1-dev is gated" in capsys.readouterr().err) == remarked


def test_slurm_has_a_task_for_each_gpu_and_an_array_of_replicas(render, tmp_path):
    text, code = render(
        "kind=slurm", "target=2xh100-8", "hf_token_secret=null", "prompt='a fox, it''s red'", "manifest=null"
    )
    assert code == 0
    for line in ("--array=0-5", "--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--requeue"):
        assert f"#SBATCH {line}\n" in text
    # It runs what it should, and puts back into the queue what wants another start.
    for name, body in {
        "srun": 'printf "%s\\n" "$@" >> said; exit $CODE',
        "scontrol": 'echo "scontrol $*" >> said',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    env = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_ARRAY_JOB_ID": "9",
        "SLURM_ARRAY_TASK_ID": "3",
    }
    for code, requeued in ((0, False), (3, False), (75, True), (76, True), (134, True)):
        (tmp_path / "said").unlink(missing_ok=True)
        done = subprocess.run(["bash"], input=text, text=True, cwd=tmp_path, env=env | {"CODE": str(code)})
        said = (tmp_path / "said").read_text().splitlines()
        assert done.returncode == code and ("scontrol requeue 9_3" in said) == requeued
        assert said[1:4] == ["python", "-m", "fluxbatch.run"] and "hardware=gpu" in said


def test_words_are_written_as_people_write_them(render):
    words = [
        "model=flux-dev",
        "manifest=/data/p.jsonl",
        "output_dir=/data/out put",
        "run_name=it's",
        "lora=[]",
        "seed=8",
        "prompt_2=",
    ]
    text, code = render("kind=slurm", "target=h100", defaults=words)
    assert code == 0, text
    assert ("python -m fluxbatch.run hardware=gpu model=flux-dev manifest=/data/p.jsonl output_dir=\"/data/out put\" "
            "run_name=\"it's\" lora=\"[]\" seed=8 prompt_2=\n") in text  # fmt: skip
    assert '#SBATCH --job-name="it\'s"\n' in text
    text, _ = render("prompt=a fox, (red)", "manifest=null")
    assert "- prompt=a fox, (red)\n" in text and "- output_dir=gs://bucket/out\n" in text


# As they are typed, and what a run reads there.
NASTY = [
    (text, text)
    for text in (
        "a fox, sitting",
        "it's",
        'a "fox"',
        """both ' and \"""",
        "$HOME costs $5",
        "${HOME} ${oc.env:HOME} \\\\${x}",
        "`id` $(id)",
        "a\\b \\",
        "!! wow!",
        "it's!",
        "{a: 1}",
        "[a, b]",
        "*?~ #1 & | ; < >",
        "line\nbreak",
        "tab\there",
        "日本語　fox",
        "a=b",
        "--flag",
        "$(REPLICA_INDEX) $$",
    )
]
NASTY += [("'quoted'", "quoted"), ('"a, b"', "a, b"), ("'null'", "null")]


@pytest.mark.parametrize(("first", "second"), zip(NASTY[::2], NASTY[1::2], strict=True), ids=lambda pair: pair[1][:12])
def test_a_text_goes_through_the_shell_and_through_kubernetes_as_it_is(render, tmp_path, first, second):
    words = [f"prompt={first[0]}", f"prompt_2={second[0]}", "target=h100-1"]
    script, code = render("kind=slurm", "output_dir=out", defaults=words)
    assert code == 0, script
    srun = tmp_path / "srun"
    srun.write_text("#!/bin/sh\nprintf '%s\\0' \"$@\" > said\n")
    srun.chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    assert subprocess.run(["bash"], input=script, text=True, cwd=tmp_path, env=env).returncode == 0
    said = (tmp_path / "said").read_text().split("\0")[4:-1]
    assert said[0] == "hardware=gpu" and job_of(said) == (first[1], second[1])
    spec = yaml.safe_load(render("kind=jobset", "container_image=a/b", "output_dir=gs://b/o", defaults=words)[0])
    args = at(spec, "spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "containers", 0, "args")
    assert args[0] == "replica_index=$(REPLICA_INDEX)"
    known = {"$": "$", "(REPLICA_INDEX)": "3"}
    read = [re.sub(r"\$(\$|\(REPLICA_INDEX\))", lambda found: known[found[1]], arg) for arg in args]
    assert read[2:5] == said[:3] and read[0] == "replica_index=3"  # as the kubelet puts variables into it


def job_of(words):
    """What a run would draw, of these words."""
    found = []
    with pytest.raises(SystemExit) as stop:
        module.application.main(lambda job: found.append(job) or 0, argv=[*words])
    assert stop.value.code == 0
    return found[0].prompt, found[0].prompt_2


def test_slurms_own_options(render, tmp_path):
    words = ["hf_token_secret=null", "kind=slurm", "target=h100-8", "partition=gpu,low", "account=lab",
             "time_limit=1-12:30", 'sbatch=[--qos=high, -C ib, "--comment=two words"]']  # fmt: skip
    text, code = render(*words)
    assert code == 0, text
    head = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]
    assert {"--partition=gpu,low", "--account=lab", "--time=1-12:30", "--signal=TERM@120"} <= {*head}
    assert head[-3:] == ["--qos=high", "-C ib", '--comment="two words"']  # the last one of an option wins
    assert not any(word in text for word in (" partition=", " account=", "time_limit", "sbatch="))  # not the run's
    plain, _ = render(*words[:3])
    assert not re.search("--(partition|account|time|signal)=", plain)


def test_a_time_limit_is_of_every_kind(render):
    for kind in ("jobset", "cronjob"):
        text, code = render(f"kind={kind}", "target=h100-1", "time_limit=2:00:00")
        assert code == 0 and "activeDeadlineSeconds: 7200\n" in text
        check(kind, text, module.TARGETS["h100-1"])
    text, _ = render("kind=batch", "target=h100-1", "time_limit=2:00:00")
    assert '"maxRunDuration": "7200s"' in text
    check("batch", text, module.TARGETS["h100-1"])
    limits = {"90": 5400, "2:30": 150, "1-12": 129_600, "1-12:30": 131_400, "1-0:0:1": 86_401, "1:1:1:1": 0}
    assert {limit: module._seconds(limit) for limit in limits} == limits


def test_what_is_slurms_alone_is_refused_elsewhere(render):
    text, code = render("partition=gpu", "account=a", "sbatch=[--qos=high]", "time_limit=1-")
    assert code == Exit.BAD_INPUT
    for named in ("partition=gpu: expected null, as only kind=slurm has it", "account=a: expected null",
                  "sbatch=['--qos=high']: expected null", "time_limit=1-: expected minutes"):  # fmt: skip
        assert named in text
    text, code = render("kind=slurm", "target=h100", "hf_token_secret=null", "sbatch=[qos]", "time_limit=0")
    assert code == Exit.BAD_INPUT and "time_limit=0: expected" in text
    assert "sbatch=qos: expected options of sbatch's" in text


def test_help_names_the_script_and_all_its_keys():
    done = subprocess.run(
        [sys.executable, "jobs/launch/render.py", "--help"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "Usage: python jobs/launch/render.py " in done.stdout
    assert all(f"\n  {key}=" in done.stdout for key in module.Launch.__annotations__)
    assert "\n  schedule=0 3 * * *        of kind=cronjob" in done.stdout  # with its comment


def test_the_image_is_of_what_is_there():
    text = (LAUNCH / "Dockerfile").read_text()
    for sources in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE):
        assert all((ROOT / source).exists() for source in sources.split())
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {"cuda", "tpu"} <= extras.keys() and "ARG FLAVOR=cpu" in text
    assert json.loads(re.search(r"^ENTRYPOINT (.+)$", text, re.MULTILINE)[1]) == ["python", "-m", "fluxbatch.run"]


def test_a_signal_reaches_processes_that_are_just_being_started(monkeypatch):
    spec = importlib.util.spec_from_file_location("local", LAUNCH / "local.py")
    local = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(local)
    got = []

    class Process:
        def __init__(self, *_, **__):
            local.stop(signal.SIGTERM, None)  # nobody is known yet

        def send_signal(self, number):
            got.append(number)

        def wait(self):
            return Exit.PREEMPTED

    monkeypatch.setattr(subprocess, "Popen", Process)
    assert local.replica(0, 1, 2, []) == Exit.PREEMPTED and got == [signal.SIGTERM] * 2


@pytest.mark.slow
def test_replicas_on_this_machine_survive_a_kill(tmp_path):
    """Two replicas of two processes; one process is killed, its replica is started again, all rows are there."""
    words = [
        f"pretrained_model_name_or_path={GOLDEN / 'dev'}",
        "max_sequence_length=24",
        "hardware=cpu",
        f"output_dir={tmp_path}",
        "run_name=run",
        f"jax_cache_dir={tmp_path / 'xla'}",
        "text_cache_dir=null",
        "sharding=ddp",
        "output.gallery=false",
        "resolution=16",
        "shard_size=16",
        "replica_expiry=3",
        f"manifest={long_manifest(tmp_path)}",
    ]
    env = os.environ | {"XLA_FLAGS": xla_flags(1), "PYTHONPATH": str(ROOT)}
    with open(tmp_path / "log", "w") as log:
        local = subprocess.Popen(
            [sys.executable, LAUNCH / "local.py", "2", "2", *words], env=env, stdout=log, stderr=log
        )
    end = time.monotonic() + 250
    while pictures(tmp_path / "run") < 20:
        assert time.monotonic() < end and local.poll() is None, (tmp_path / "log").read_text()[-2000:]
        time.sleep(0.01)
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(local.pid)], capture_output=True, text=True
    ).stdout.split()
    assert len(children) == 4
    os.kill(int(children[-1]), signal.SIGKILL)
    assert local.wait(timeout=300) == 0, (tmp_path / "log").read_text()[-2000:]
    assert sorted(r["id"] for r in metadata(tmp_path / "run")) == sorted(f"r{i}" for i in range(ROWS))
