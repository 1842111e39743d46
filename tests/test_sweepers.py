"""Sweeps that the configuration asks for, sweepers of others, and config groups wherever Hydra finds them."""

import importlib
import sys

import pytest
from hydra.core.plugins import Plugins
from test_config import command  # noqa: F401

from fluxbatch.config import overrides
from fluxbatch.config.schema import Job
from fluxbatch.types import Exit, UserError

ASKS = "hydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n"


@pytest.fixture
def write(tmp_path):
    """Writes a file of the user's own configuration; returns the option that names its directory."""

    def write(name, text):
        path = tmp_path / "own" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return f"--config-dir={tmp_path / 'own'}"

    return write


def seeds(jobs):
    return [job.seed for job in jobs] if isinstance(jobs, list) else jobs.seed


# ---- who asks for a sweep


def test_a_configuration_asks_for_a_sweep(command, write):  # noqa: F811
    own = write("mine.yaml", f"defaults: [config, _self_]\n{ASKS}      seed: 1,2\n")
    jobs = command(own, "--config-name=mine", "prompt=x", "run_name=s")
    assert [(job.seed, job.sweep, job.run_name) for job in jobs] == [
        (1, {"seed": 1}, "s/seed=1"),
        (2, {"seed": 2}, "s/seed=2"),
    ]
    assert seeds(command(own, "--config-name=mine", "prompt=x", "-m")) == [1, 2]
    assert seeds(command(own, "--config-name=mine", "prompt=x", "seed=3,4,5")) == [3, 4, 5]  # the command line wins
    assert seeds(command(own, "--config-name=mine", "prompt=x", "hydra.mode=RUN")) == 0


def test_a_file_of_a_group_asks_for_a_sweep(command, write):  # noqa: F811
    own = write("experiment/go.yaml", f"# @package _global_\n{ASKS}      seed: range(3)\n")
    assert seeds(command(own, "prompt=x", "+experiment=go")) == [0, 1, 2]
    assert seeds(command(own, "prompt=x")) == 0


def test_a_word_asks_for_a_sweep(command):  # noqa: F811
    assert seeds(command("prompt=x", "seed=1,2", "hydra.mode=MULTIRUN")) == [1, 2]
    assert seeds(command("prompt=x", "seed=1,2", "hydra={mode: MULTIRUN}")) == [1, 2]
    assert seeds(command("prompt=x", "seed=1,2", "hydra.mode=RUN", "-m")) == [1, 2]  # as Hydra has it
    command("prompt=x", "seed=1,2", "hydra.mode=RUN", expect=2)
    assert "needs --multirun" in command.err
    command("prompt=x", "hydra.mode=multirun", expect=2)
    assert "expected one of [RUN, MULTIRUN]" in command.err and len(command.lines) == 1


def test_keys_of_a_configured_sweep_are_those_of_the_command_line(command, write):  # noqa: F811
    own = write(
        "mine.yaml",
        f"defaults: [config, _self_]\n{ASKS}      num_inference_steps: 2,3\n"
        "      prompt: \"'a, b','c'\"\n      height: 64\n",
    )
    jobs = command(own, "--config-name=mine")
    assert [(job.sampler.num_inference_steps, job.prompt, job.sampler.height) for job in jobs] == [
        (2, "a, b", 64), (2, "c", 64), (3, "a, b", 64), (3, "c", 64)]  # fmt: skip
    assert jobs[0].sweep == {"sampler.num_inference_steps": 2, "prompt": "a, b"}  # what holds still is no part of it
    jobs = command(own, "--config-name=mine", "sampler.num_inference_steps=8")
    assert [job.sweep for job in jobs] == [{"prompt": "a, b"}, {"prompt": "c"}]


def test_sweeps_by_configuration_are_named_by_their_content(command, write):  # noqa: F811
    names = set()
    for values in ("1,2", "1,3"):
        own = write("mine.yaml", f"defaults: [config, _self_]\n{ASKS}      seed: {values}\n")
        names |= {job.run_name.partition("/")[0] for job in command(own, "--config-name=mine", "prompt=x")}
    assert len(names) == 2


@pytest.mark.parametrize(
    ("params", "named"),
    [
        ("      seed: 1,x\n", "hydra.sweeper.params: seed=1,x: expected a whole number"),
        ("      sede: 1,2\n", "hydra.sweeper.params: sede=1,2: there is no key sede; did you mean seed?"),
        ("      {seed: 1,2}\n", 'a value with commas is quoted within braces: params: {seed: "1,2"}'),
        (
            "      seed: interval(1,2)\n",
            "interval(…) is for sweepers that propose values, as hydra/sweeper=optuna does",
        ),
    ],
)
def test_mistakes_in_a_configured_sweep_are_one_line(command, write, params, named):  # noqa: F811
    command(
        write("mine.yaml", f"defaults: [config, _self_]\n{ASKS}{params}"), "--config-name=mine", "prompt=x", expect=2
    )
    assert command.jobs == [] and len(command.lines) == 1 and named in command.err


# ---- sweepers of others

STEPPER = '''
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper


class Stepper(Sweeper):
    """Goes through intervals, one job after another; the next value depends on what the job before returned."""

    def __init__(self, params=None, fail_after=100):
        self.params, self.fail_after = params or {}, fail_after

    def setup(self, *, hydra_context, task_function, config):
        words = {"hydra_context": hydra_context, "task_function": task_function, "config": config}
        self.launcher = Plugins.instance().instantiate_launcher(**words)

    def sweep(self, arguments):
        words = OverridesParser.create().parse_overrides([f"{k}={v}" for k, v in self.params.items()] + arguments)
        [swept] = [word for word in words if isinstance(word.value(), IntervalSweep)]
        held = [word.input_line for word in words if word is not swept]
        value, job = swept.value().start, 0
        while value <= swept.value().end:
            if job == self.fail_after:
                raise ValueError("no further value is known")
            [result] = self.launcher.launch([[f"{swept.get_key_element()}={value}", *held]], initial_job_idx=job)
            value, job = value + 1 + result.return_value, job + 1


ConfigStore.instance().store(group="hydra/sweeper", name="stepper", provider="test",
                             node={"_target_": "hydra_plugins.stepper.Stepper", "params": None, "fail_after": 100})
'''  # fmt: skip


@pytest.fixture
def stepper(tmp_path, monkeypatch):
    folder = tmp_path / "plugins/hydra_plugins"
    folder.mkdir(parents=True)
    (folder / "stepper.py").write_text(STEPPER)
    import hydra_plugins

    monkeypatch.setattr(hydra_plugins, "__path__", [*hydra_plugins.__path__, str(folder)])
    module = importlib.import_module("hydra_plugins.stepper")
    Plugins.instance().register(module.Stepper)
    yield ("-m", "hydra/sweeper=stepper", "prompt=x")
    sys.modules.pop("hydra_plugins.stepper")


def test_a_sweeper_that_returns_nothing_and_proposes_one_value_after_another(command, stepper):  # noqa: F811
    def task(job):
        command.jobs.append(job)
        return 3 if job.sampler.guidance_scale == 2 else 0

    jobs = command(*stepper, "guidance_scale=interval(1,9)", "seed=4", "run_name=s", task=task, expect=3)
    assert [job.sampler.guidance_scale for job in jobs] == [1, 2, 6, 7, 8, 9]
    assert jobs[1].sweep == {"sampler.guidance_scale": 2.0} and jobs[1].run_name == "s/guidance_scale=2.0"


@pytest.mark.parametrize(("codes", "worst"), [([0, 0], 0), ([2, 0], 2), ([3, 2, 0], 2), ([0, 75, 0], 75), ([1, 3], 1)])
def test_the_exit_code_of_any_sweeper_is_the_worst_job_s(command, stepper, codes, worst):  # noqa: F811
    left = iter(codes + [0] * 20)
    command(*stepper, "guidance_scale=interval(1,20)", task=lambda job: next(left), expect=worst)


def test_a_sweeper_that_fails_after_jobs_were_made(command, stepper):  # noqa: F811
    command(
        *stepper,
        "guidance_scale=interval(1,9)",
        "hydra.sweeper.fail_after=1",
        task=lambda job: Exit.PREEMPTED,
        expect=75,
    )
    command(*stepper, "guidance_scale=interval(1,9)", "hydra.sweeper.fail_after=1", expect=2)
    assert command.lines[-1] == "fluxbatch: error: no further value is known" and "Traceback" not in command.err


def test_values_that_only_another_sweeper_knows_are_left_to_it(command, write, stepper):  # noqa: F811
    own = write("mine.yaml", f"defaults: [config, _self_]\n{ASKS}      guidance_scale: interval(1,2)\n      seed: 3\n")
    jobs = command(own, "--config-name=mine", *stepper[1:])
    assert [(job.sampler.guidance_scale, job.seed, job.sweep) for job in jobs] == [
        (n, 3, {"sampler.guidance_scale": n}) for n in (1, 2)
    ]


@pytest.mark.parametrize(
    "value",
    [
        "interval(1,4)",
        "tag(log,interval(1,4))",
        "int(interval(1,4))",
        "range(1,4)",
        "shuffle(range(1,4))",
        "choice(1,2)",
        "sort(2,1)",
        "shuffle(1,2,3)",
    ],
)
def test_what_sweepers_understand_is_taken(value):
    for key in ("guidance_scale", "num_inference_steps"):
        assert overrides.read([f"{key}={value}"], Job, {}, True)[0] == [f"sampler.{key}={value}"]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("num_inference_steps=interval(1.5,4)", "expected a whole number"),
        ("overwrite=interval(0,4)", "true or false"),
        ("seed=glob(*)", "for the choices of a group"),
        ("guidance_scale=choice(1,x)", "a number"),
    ],
)
def test_ends_and_values_of_another_type_are_not(word, said):
    with pytest.raises(UserError, match=said):
        overrides.read([word], Job, {}, True)
    with pytest.raises(UserError):
        overrides.read([word], Job, {}, False)


def test_a_sweeper_that_is_not_installed_is_named(command):  # noqa: F811
    if "ax" in sys.modules:
        pytest.skip("it is installed")
    command("-m", "prompt=x", "hydra/sweeper=ax", expect=2)
    assert len(command.lines) == 1 and "hydra/sweeper=ax: expected one of basic" in command.err
    assert command.err.endswith("; pip install hydra-ax-sweeper\n")


def test_optuna(command):  # noqa: F811
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    codes = iter([0, 3, 0])
    words = (
        "-m",
        "hydra/sweeper=optuna",
        "hydra.sweeper.n_trials=3",
        "guidance_scale=interval(1,4)",
        "prompt='a, b','c'",
    )
    command(*words, task=lambda job: command.jobs.append(job) or next(codes), expect=3)
    assert len(command.jobs) == 3 and all(
        1 <= job.sampler.guidance_scale <= 4 and job.prompt in ("a, b", "c") for job in command.jobs
    )


# ---- groups

GLOBAL = "# @package _global_\n"


@pytest.fixture
def nested(write):
    write("experiment/final/a.yaml", GLOBAL + "seed: 7")
    write("experiment/final/b.yaml", GLOBAL + "seed: 8")
    write("nest/deep/one.yaml", GLOBAL + "seed: 9")
    write("nest/deep/er/two.yaml", GLOBAL + "seed: 10")
    write("lora/styles/ink.yaml", "ink: {path: /x}")
    return write("outputs/picture.txt", "no configuration")


@pytest.mark.parametrize(
    ("words", "seed"),
    [
        (["+experiment/final=a"], 7),
        (["+experiment=final/a"], 7),
        (["+experiment/final=a.yaml"], 7),
        (["+experiment/final=[a,b]"], 8),
        (["+nest/deep=one"], 9),
        (["+nest=deep/one"], 9),
        (["+nest=deep/er/two"], 10),
        (["+nest/deep/er=two"], 10),
        (["+experiment/final=a", "~experiment/final"], 0),
        (["+experiment/final=a", "~experiment/final=a"], 0),
        (["sampler={num_inference_steps: 3}", "+experiment/final=a"], 7),
    ],
)
def test_groups_within_groups(command, nested, words, seed):  # noqa: F811
    assert command(nested, "prompt=x", *words).seed == seed


def test_a_group_goes_into_the_package_that_is_named(command, nested):  # noqa: F811
    assert command(nested, "prompt=x", "+lora/styles@lora=ink", "lora.ink.scale=0.5").lora["ink"].scale == 0.5
    assert command("prompt=x", "sampler={num_inference_steps: 3}").sampler.num_inference_steps == 3
    assert command("prompt=x", "+lora={ink: {path: /x}}").lora["ink"].path == "/x"


def test_groups_of_a_package_on_the_search_path(command, tmp_path, monkeypatch, write):  # noqa: F811
    folder = tmp_path / "packages/their_configs/experiment/final"
    folder.mkdir(parents=True)
    (folder / "p.yaml").write_text(GLOBAL + "seed: 3")
    for package in ("", "/experiment", "/experiment/final"):
        (tmp_path / f"packages/their_configs{package}/__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "packages")
    own = write("mine.yaml", "defaults: [config, _self_]\nhydra: {searchpath: [pkg://their_configs]}")
    assert command("prompt=x", "hydra.searchpath=[pkg://their_configs]", "+experiment/final=p").seed == 3
    assert command(own, "--config-name=mine", "prompt=x", "+experiment=final/p").seed == 3
    command(own, "--config-name=mine", "prompt=x", "+experiment/final=q", expect=2)
    assert command.lines == ["fluxbatch: error: experiment/final=q: expected one of p"]


@pytest.mark.parametrize(
    ("word", "named"),
    [
        ("+experiment/final=c", "experiment/final=c: expected one of a, b"),
        ("+experiment=final/aa", "experiment=final/aa: expected one of final/a, final/b; did you mean final/a?"),
        ("+experiment/finale=a", "there is no key or group experiment/finale; did you mean experiment/final?"),
        ("experiment/final=a", "use +experiment/final=a"),
        ("~experiment/final", "Could not delete 'experiment/final'"),
        ("+outputs=a", "there is no key outputs; did you mean output_dir?"),
        ("+nest/deep=glob(*)", "nest/deep=glob(*): glob(…) asks for a sweep, which needs --multirun"),
    ],
)
def test_mistakes_about_groups_are_one_line(command, nested, word, named):  # noqa: F811
    command(nested, "prompt=x", word, expect=2)
    assert len(command.lines) == 1 and named in command.err


def test_a_sweep_over_groups_within_groups(command, nested):  # noqa: F811
    jobs = command(nested, "-m", "prompt=x", "run_name=s", "+experiment/final=a,b")
    assert [(job.seed, job.sweep, job.run_name) for job in jobs] == [
        (7, {"experiment/final": "a"}, "s/final=a"), (8, {"experiment/final": "b"}, "s/final=b")]  # fmt: skip
    assert seeds(command(nested, "-m", "prompt=x", "+experiment/final=glob(*)")) == [7, 8]
    assert (
        seeds(command(nested, "-m", "prompt=x", "+nest=deep/one,deep/er/two", "experiment/final=null", expect=2)) == []
    )
    jobs = command(
        nested,
        "-m",
        "prompt=x",
        "run_name=s",
        "+experiment/final=a,b",
        "+nest/deep=one",
        "+lora/styles@lora=ink",
        "seed=1,2",
    )
    assert {job.run_name for job in jobs} == {f"s/final={option},seed={n}" for option in "ab" for n in (1, 2)}
