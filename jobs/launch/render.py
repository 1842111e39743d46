"""A job's launch spec, from its own command line: where it runs, rendered from what it is.

    python jobs/launch/render.py kind=jobset target=v6e-8 replica_count=8 model=flux-dev sharding=fsdp \
        manifest=gs://bucket/prompts.jsonl output_dir=gs://bucket/out run_name=night container_image=…  | kubectl apply -f -

Everything besides ``kind``, ``target`` and the other keys of `Launch` goes to ``fluxbatch.run`` as it is. Machine,
chips, processes and the mesh all follow from the target, so they cannot disagree; a mesh that does not fit the
target's chips is refused. A replica is the hosts of one target; ``replica_count`` of them share the output place.
"""

from __future__ import annotations

import base64
import json
import math
import re
import shlex
import sys
from dataclasses import dataclass
from enum import Enum
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from fluxbatch.config import application, overrides
from fluxbatch.config.schema import Job, shown
from fluxbatch.distributed import chips
from fluxbatch.types import Exit, UserError

Kind = Enum("Kind", {name: name for name in ("slurm", "jobset", "cronjob", "batch", "scheduler")})


@dataclass
class Launch(Job):
    """The keys of a launch; the job's own stand beside them."""

    kind: Kind = Kind.jobset
    target: str = "v6e-8"  # the machines of a replica: v6e-8, v6e-16, h100-8, 2xh100-8, …
    container_image: str | None = (
        None  # built by the Dockerfile beside this file; without a tag it gets the flavor's that the target needs
    )
    hf_token_secret: str | None = (
        None  # of Kubernetes (its key is HF_TOKEN), or of the project's Secret Manager: for gated checkpoints
    )
    spot: bool = True  # of Kubernetes and Batch
    schedule: str = "0 3 * * *"  # of kind=cronjob and kind=scheduler
    project: str | None = None  # of kind=scheduler, with the two below, and of a secret for kind=batch
    location: str = "us-central1"  # of the scheduler and its jobs
    service_account: str | None = None  # null: fluxbatch@ the project
    partition: str | None = None  # of Slurm, and the two below; null: the cluster's own
    account: str | None = None  # that pays
    sbatch: list[str] | None = None  # further options, which win: "[--qos=high, -C ib]"
    time_limit: str | None = None  # as Slurm writes it: 90 (minutes), 2:00:00, 1-12; of a start, in Kubernetes of all


@dataclass(frozen=True)
class Target:
    """The hosts of one replica. One process a host; under Slurm one a GPU."""

    hardware: str
    hosts: int
    chips: int  # of a host
    machine: str  # Google Cloud's name for the host
    accelerator: str  # Kubernetes' label for the chip
    topology: str | None = None  # of a TPU slice

    @classmethod
    def of(cls, name: str, machine: str, accelerator: str) -> Target:
        known = chips.target(name)
        return cls(known.platform, known.hosts, known.chips // known.hosts, machine, accelerator, known.topology)


TARGETS = {
    name: Target.of(name, *words)
    for name, *words in (  # where Google Cloud has the machine
        ("v6e-1", "ct6e-standard-1t", "tpu-v6e-slice"),
        ("v6e-4", "ct6e-standard-4t", "tpu-v6e-slice"),
        ("v6e-8", "ct6e-standard-8t", "tpu-v6e-slice"),
        ("v6e-16", "ct6e-standard-4t", "tpu-v6e-slice"),
        ("v6e-64", "ct6e-standard-4t", "tpu-v6e-slice"),
        ("l4-1", "g2-standard-12", "nvidia-l4"),
        ("a100-1", "a2-ultragpu-1g", "nvidia-a100-80gb"),
        ("a100-8", "a2-ultragpu-8g", "nvidia-a100-80gb"),
        ("h100-1", "a3-highgpu-1g", "nvidia-h100-80gb"),  # to be had as spot only
        ("h100-8", "a3-highgpu-8g", "nvidia-h100-80gb"),
        ("2xh100-8", "a3-highgpu-8g", "nvidia-h100-80gb"),
    )
}
FLAVORS = {"cpu": "cpu", "gpu": "cuda", "tpu": "tpu"}  # of the image, by hardware: which JAX is in it
AGAIN = (Exit.PREEMPTED.value, Exit.PEER_LOST.value)  # run the same command again
UNFORESEEN = 1  # a full disk, say; worth a few more starts where the scheduler counts them
FINAL = (Exit.BAD_INPUT.value, Exit.REJECTED_ROWS.value)  # another start would end the same way
KILLED = (134, 137, 143)  # SIGABRT (JAX has lost a peer), SIGKILL, SIGTERM before there was anything to drain
SPOT_TAKEN = 50001  # Google Cloud Batch's code for it
DRAIN = 120  # seconds before Slurm's time limit at which a replica is asked to end
PORT = 8476  # of the processes' coordinator


def render(job: Launch) -> int:
    """Prints the spec."""
    target = _target(job)
    _check(job, target)
    words = _words(target)
    if job.kind.name in ("jobset", "cronjob"):
        words = [word.replace("$", "$$") for word in words]  # Kubernetes puts variables in place of $(NAME)
    if (
        job.model.pretrained_model_name_or_path.startswith("black-forest-labs/")
        and job.hf_token_secret is None
        and job.kind.name != "slurm"
    ):
        print(
            f"fluxbatch: {job.model.pretrained_model_name_or_path} is gated, and the hosts get no token: "
            "hf_token_secret=… names a secret",
            file=sys.stderr,
        )
    spec = {"slurm": slurm, "jobset": jobset, "cronjob": cronjob, "batch": batch, "scheduler": scheduler}[
        job.kind.name
    ](job, target, words)
    print(spec if isinstance(spec, str) else _written(spec, job.kind.name))
    return 0


def _written(spec: dict[str, Any], kind: str) -> str:
    if kind in ("batch", "scheduler"):
        return json.dumps(spec, indent=2, ensure_ascii=False)
    return yaml.safe_dump(spec, sort_keys=False, allow_unicode=True, width=math.inf)


def _target(job: Launch) -> Target:
    """The machine by the names that ``fluxbatch.plan`` takes: h100 is h100-1. Slurm's need not be Google's."""
    known = chips.target(job.target)
    for name, target in TARGETS.items():
        same = chips.target(name)
        if (same.chip, same.chips, same.hosts) == (known.chip, known.chips, known.hosts):
            return target
    if job.kind.name == "slurm" and known.platform == "gpu":
        return Target.of(job.target, "", "")
    raise UserError(f"target={job.target}: expected one of {', '.join(TARGETS)}; for kind=slurm any GPUs")


def _check(job: Launch, target: Target) -> None:
    """UserError where target, mesh, hardware, image and kind do not go together, or something is missing."""
    problems = []
    if job.hardware.platform.name not in ("auto", target.hardware):
        problems.append(
            f"hardware={job.hardware.platform.name}: expected {target.hardware}, as target={job.target} has"
        )
    flavor, kind = FLAVORS[target.hardware], job.kind.name
    tag = (job.container_image or "").rpartition("/")[2].partition(":")[2]
    if kind != "slurm" and (not job.container_image or (tag in FLAVORS.values() and tag != flavor)):
        wanted = f"REGION-docker.pkg.dev/PROJECT/fluxbatch/fluxbatch:{flavor}"
        problems.append(
            f"container_image={shown(job.container_image)}: expected an image for target={job.target}, such as {wanted} "
            f"(jobs/launch/Dockerfile, FLAVOR={flavor})"
        )
    if job.project is None and (kind == "scheduler" or (kind == "batch" and job.hf_token_secret)):
        what = "kind=scheduler" if kind == "scheduler" else "hf_token_secret"
        problems.append(f"project=null: expected the Google Cloud project, which {what} needs")
    if job.hf_token_secret is not None and (kind == "slurm" or not re.fullmatch(r"[\w.-]+", job.hf_token_secret)):
        wanted = (
            "null, as Slurm's jobs get HF_TOKEN from the environment of sbatch"
            if kind == "slurm"
            else "the name of a secret"
        )
        problems.append(f"hf_token_secret={shown(job.hf_token_secret)}: expected {wanted}")
    for key in ("partition", "account", "sbatch"):
        if (value := getattr(job, key)) is not None and kind != "slurm":
            problems.append(f"{key}={shown(value)}: expected null, as only kind=slurm has it")
    for option in job.sbatch or ():
        if not re.fullmatch(r"--?\w[^\r\n]*", option):
            problems.append(f"sbatch={shown(option)}: expected options of sbatch's, such as --qos=high")
    if job.time_limit is not None and not _seconds(job.time_limit):
        wanted = "minutes, or a time as Slurm writes it, such as 90, 2:00:00 (hours) or 1-12 (days and hours)"
        problems.append(f"time_limit={shown(job.time_limit)}: expected {wanted}")
    axes = {key: value for key, value in vars(job.sharding).items() if key.endswith("_parallelism")}
    chips, fixed = target.hosts * target.chips, math.prod(value for value in axes.values() if value > 0)
    grows = any(value == -1 and key.startswith("ici_") for key, value in axes.items())  # a target is one slice
    if chips % fixed or (fixed != chips and not grows):
        set_ones = {
            key: value for key, value in axes.items() if value != 1 and (key, value) != ("dcn_data_parallelism", -1)
        }
        got = ", ".join(f"{key}={value}" for key, value in set_ones.items()) or "sharding=single"
        way_out = "sharding=ddp (each has its own pictures) or sharding=fsdp (they divide the weights)"
        problems.append(f"{got}: expected all {chips} chips of target={job.target} in use: {way_out}")
    if job.kind.name in ("cronjob", "batch", "scheduler") and target.hosts > 1:
        problems.append(
            f"target={job.target}: expected a target of one host, as kind={job.kind.name} has no processes that "
            "find each other"
        )
    if job.kind.name in ("slurm", "batch", "scheduler") and target.hardware == "tpu":
        problems.append(f"target={job.target}: expected a GPU for kind={job.kind.name}")
    for key in ("manifest", "output_dir"):
        value = getattr(job, key)
        if job.kind.name != "slurm" and value is not None and not value.startswith("gs://"):
            problems.append(f"{key}={value}: expected gs://…, as the hosts of kind={job.kind.name} share no disk")
    if problems:
        raise UserError(*problems)


def _words(target: Target) -> list[str]:
    """What ``fluxbatch.run`` is told: the words of this command that are not about launching."""
    own = {*Launch.__annotations__, "replica_index", "replica_count"}
    given = HydraConfig.get().overrides.task
    raw = OmegaConf.to_container(given, resolve=False)  # a ${ is text in a prompt, elsewhere what it says here and now
    keys = [word.partition("=")[0].lstrip("+~") for word in raw]
    words = [_plain(raw[i] if key in overrides.PROMPTS else given[i]) for i, key in enumerate(keys) if key not in own]
    return words if any(word.startswith("hardware=") for word in words) else [f"hardware={target.hardware}", *words]


def _plain(word: str) -> str:
    """A word as people type it: without the quotes and escapes that the command line itself gives a text."""
    key, _, value = word.partition("=")
    if value.startswith("'"):
        text = OverridesParser.create().parse_override(word).value()
        for typed in (text, re.sub(r"(\\*)\$\{", lambda found: found[1][: len(found[1]) // 2] + "${", text)):
            if overrides.read([f"{key}={typed}"], Launch, {}, multirun=False)[0] == [word]:
                return f"{key}={typed}"
    return word


def _shell(word: str) -> str:
    """A word for the shell as people write it: quoted only if it must be, and then only what follows the ``=``."""
    if re.fullmatch(r"[\w@%+=:,./-]+", word, re.ASCII):
        return word
    head = re.match(r"[\w@%+:,./-]+=|", word, re.ASCII)[0]  # type: ignore[index]
    value = word.removeprefix(head)
    if re.search(r'["$`\\!]', value):  # which double quotes do not keep
        return head + shlex.quote(value)
    return f'{head}"{value}"'


def _option(line: str) -> str:
    """An option of sbatch's, which reads it as a shell does; what has quotes or is two words stays as it is."""
    return _shell(line) if re.match(r"--[\w-]+=[^\"]*$", line) else line


def _seconds(limit: str) -> int:
    """Of one of Slurm's six ways to write a time; 0 for anything else."""
    if found := re.fullmatch(r"(\d+)-(\d+)(?::(\d+))?(?::(\d+))?", limit, re.ASCII):
        days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    elif found := re.fullmatch(r"(?:(\d+):(?=\d+:))?(\d+)(?::(\d+))?", limit, re.ASCII):
        days, (hours, minutes, seconds) = 0, (int(part or 0) for part in found.groups())
    else:
        return 0
    return ((24 * days + hours) * 60 + minutes) * 60 + seconds


def slurm(job: Launch, target: Target, words: list[str]) -> str:
    """A job array with a task for each replica; one process a GPU, which JAX finds by itself."""
    command = " ".join(map(_shell, ["python", "-m", "fluxbatch.run", *words]))
    options = {
        "job-name": re.sub(r"[\r\n]+", " ", job.run_name or "fluxbatch"), "partition": job.partition,
        "account": job.account, "array": f"0-{_replicas(job) - 1}", "nodes": target.hosts,
        "ntasks-per-node": target.chips, "gpus-per-node": target.chips,
        "time": job.time_limit, "signal": f"TERM@{DRAIN}" if job.time_limit else None}  # fmt: skip
    lines = [f"--{key}={value}" for key, value in options.items() if value is not None]
    lines += ["--requeue", "--open-mode=append", *(job.sbatch or ())]
    directives = "\n".join(f"#SBATCH {_option(line)}" for line in lines)
    return f"""#!/bin/bash
{directives}
# Replica index and count come from the array. A drained or broken replica is put back into the queue.
srun --kill-on-bad-exit=0 {command}
code=$?
case $code in {"|".join(map(str, (*AGAIN, *KILLED[:1])))}) scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}" ;; esac
exit $code
"""


def jobset(job: Launch, target: Target, words: list[str]) -> dict[str, Any]:
    """A replicated job for each replica, a pod for each host; whatever can be run again is, replica by replica."""
    name = _name(job)
    index = {
        "name": "REPLICA_INDEX",
        "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['jobset.sigs.k8s.io/job-index']"}},
    }
    env = [index]
    if target.hosts > 1:
        process = {"fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
        env += [
            {"name": "JAX_COORDINATOR_ADDRESS", "value": f"{name}-replica-$(REPLICA_INDEX)-0.{name}:{PORT}"},
            {"name": "JAX_NUM_PROCESSES", "value": str(target.hosts)},
            {"name": "JAX_PROCESS_ID", "valueFrom": process},
        ]
    words = ["replica_index=$(REPLICA_INDEX)", f"replica_count={_replicas(job)}", *words]
    spec = _job_spec(job, target, words, env) | {
        "parallelism": target.hosts,
        "completions": target.hosts,
        "backoffLimit": 10,
    }
    metadata: dict[str, Any] = {"name": name}
    if target.topology and target.hosts > 1:  # the pods of a replica belong on one slice
        metadata["annotations"] = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "failurePolicy": {
                "maxRestarts": 0,
                "rules": [{"name": "final", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "network": {"enableDNSHostnames": True, "subdomain": name},
            "replicatedJobs": [{"name": "replica", "replicas": _replicas(job), "template": {"spec": spec}}],
        },
    }


def cronjob(job: Launch, target: Target, words: list[str]) -> dict[str, Any]:
    """An indexed job on a schedule: a pod for each replica, which its completion index numbers."""
    count = _replicas(job)
    words = [f"replica_count={count}", *words]
    spec = _job_spec(job, target, words, []) | {"parallelism": count, "completions": count, "backoffLimitPerIndex": 10}
    spec["podFailurePolicy"]["rules"][0]["action"] = "FailIndex"
    return {
        "apiVersion": "batch/v1",
        "kind": "CronJob",
        "metadata": {"name": _name(job)},
        "spec": {"schedule": job.schedule, "concurrencyPolicy": "Forbid", "jobTemplate": {"spec": spec}},
    }


def batch(job: Launch, target: Target, words: list[str]) -> dict[str, Any]:
    """A task group with a task for each replica, whose index and count Batch tells it."""
    count, again = _replicas(job), [UNFORESEEN, *AGAIN, *KILLED, SPOT_TAKEN]
    runnable: dict[str, Any] = {
        "container": {"imageUri": _image(job, target), "commands": words, "options": "--ipc=host"}
    }
    if job.hf_token_secret:
        secret = f"projects/{job.project}/secrets/{job.hf_token_secret}/versions/latest"
        runnable["environment"] = {"secretVariables": {"HF_TOKEN": secret}}
    return {
        "taskGroups": [
            {
                "taskCount": count,
                "parallelism": count,
                "taskCountPerNode": 1,
                "taskSpec": {
                    "runnables": [runnable],
                    "maxRetryCount": 10,
                    **({"maxRunDuration": f"{_seconds(job.time_limit)}s"} if job.time_limit else {}),
                    "lifecyclePolicies": [
                        {"action": "RETRY_TASK", "actionCondition": {"exitCodes": again}},
                        {"action": "FAIL_TASK", "actionCondition": {"exitCodes": list(FINAL)}},
                    ],
                },
            }
        ],
        "allocationPolicy": {
            "instances": [
                {
                    "installGpuDrivers": True,
                    "policy": {
                        "machineType": target.machine,
                        "provisioningModel": "SPOT" if job.spot else "STANDARD",
                        "bootDisk": {"sizeGb": 200},
                    },
                }
            ]
        },
        "logsPolicy": {"destination": "CLOUD_LOGGING"},
    }


def scheduler(job: Launch, target: Target, words: list[str]) -> dict[str, Any]:
    """A Cloud Scheduler job that submits `batch`'s at its hours."""
    place = f"projects/{job.project}/locations/{job.location}"
    account = job.service_account or f"fluxbatch@{job.project}.iam.gserviceaccount.com"
    return {
        "name": f"{place}/jobs/{_name(job)}",
        "schedule": job.schedule,
        "timeZone": "Etc/UTC",
        "httpTarget": {
            "uri": f"https://batch.googleapis.com/v1/{place}/jobs",
            "httpMethod": "POST",
            "headers": {"Content-Type": "application/json"},
            "body": base64.b64encode(json.dumps(batch(job, target, words)).encode()).decode(),
            "oauthToken": {"serviceAccountEmail": account, "scope": "https://www.googleapis.com/auth/cloud-platform"},
        },
    }


def _job_spec(job: Launch, target: Target, words: list[str], env: list[dict[str, Any]]) -> dict[str, Any]:
    """What the Kubernetes jobs have in common: a pod fills its host, and its exit code says what follows."""
    resource = {"google.com/tpu": target.chips} if target.hardware == "tpu" else {"nvidia.com/gpu": target.chips}
    selector = {
        "cloud.google.com/gke-tpu-accelerator": target.accelerator,
        "cloud.google.com/gke-tpu-topology": target.topology,
    }
    if target.hardware == "gpu":
        selector = {"cloud.google.com/gke-accelerator": target.accelerator}
    if job.spot:
        selector["cloud.google.com/gke-spot"] = "true"
    if job.hf_token_secret:
        env = [
            *env,
            {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": job.hf_token_secret, "key": "HF_TOKEN"}}},
        ]
    container = {
        "name": "fluxbatch",
        "image": _image(job, target),
        "args": words,
        "env": env,
        "resources": {"limits": resource},
    }
    return {
        "completionMode": "Indexed",
        **({"activeDeadlineSeconds": _seconds(job.time_limit)} if job.time_limit else {}),
        "podFailurePolicy": {"rules": [
            {"action": "FailJob", "onExitCodes": {"operator": "In", "values": sorted(FINAL)}},
            {"action": "Ignore", "onExitCodes": {"operator": "In", "values": sorted((*AGAIN, *KILLED))}},
            {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        ]},
        "template": {"spec": {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 60,
            "nodeSelector": selector,
            "containers": [container],
        }},
    }  # fmt: skip


def _image(job: Launch, target: Target) -> str:
    """With the tag of the flavor that the hardware needs, if it has none."""
    image = job.container_image or ""
    return image if {":", "@"} & {*image.rpartition("/")[2]} else f"{image}:{FLAVORS[target.hardware]}"


def _replicas(job: Launch) -> int:
    return job.replica_count or 1


def _name(job: Launch) -> str:
    """The run's, as a label of DNS: ASCII letters, digits and dashes, a letter first and no dash last."""
    name = re.sub("[^a-z0-9]+", "-", (job.run_name or "fluxbatch").lower()).strip("-")
    return (name if name[:1].isalpha() else f"fluxbatch-{name}")[:40].strip("-")


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    application.main(
        render,
        schema=Launch,
        about="render: a job's launch spec (kind=…, target=…, replica_count=…, then as for fluxbatch.run).",
    )
