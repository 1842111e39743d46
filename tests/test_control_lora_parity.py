"""Control LoRAs on a text-to-image checkpoint, against ``FluxControlPipeline.load_lora_weights``."""

from __future__ import annotations

import json

import lora_files as files
import pytest
import test_lora_parity as adapters
from conftest import images, psnr
from test_pictures_parity import LENGTH, loaded, louder, picture, reader, theirs

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="module")
def dev(tmp_path_factory):
    pipe = loaded("generate").pipeline(**loaded("generate").VARIANTS["dev"], seed=3)
    louder(pipe)
    folder = tmp_path_factory.mktemp("dev")
    pipe.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("mix", [{"depth": 1.0}, {"depth": 0.7}, {"depth": 0.85, "style": 0.5}])
def test_as_diffusers_does(dev, cli, tmp_path, monkeypatch, mix):
    """Alone, at another scale, and beside an adapter of the checkpoint's own size."""
    adapters.tell_converters(monkeypatch)
    pipe = diffusers.FluxControlPipeline.from_pretrained(dev)
    pipe.set_progress_bar_config(disable=True)
    maker = files.Maker(0, size=0.15)
    made = {
        "depth": files.control(adapters.SIZE, maker) | adapters.alike(maker),
        "style": maker.peft(files.dots("transformer.", files.diffusers(adapters.SIZE))),
    }
    group = tmp_path / "conf" / "lora"
    group.mkdir(parents=True)
    for name, scale in mix.items():
        file = files.save(tmp_path / f"{name}.safetensors", made[name])
        pipe.load_lora_weights(str(file), adapter_name=name)
        (group / f"{name}.yaml").write_text(f"{name}: {{path: {file}, scale: {scale}}}\n")
    pipe.set_adapters(list(mix), list(mix.values()))
    picture(1, 90, 70).save(tmp_path / "map.png")
    row = dict(id="a", prompt="a fox", num_inference_steps=3, guidance_scale=10.0, seed=5)
    row |= dict(control_image="map.png", height=64, width=48)
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    code, err = cli(
        f"pretrained_model_name_or_path={dev}", f"manifest={tmp_path}/rows.jsonl", "run_name=r", "hardware=cpu",
        f"max_sequence_length={LENGTH}", f"output_dir={tmp_path}", f"lora=[{','.join(mix)}]",
        "--config-dir", str(tmp_path / "conf"),
    )  # fmt: skip
    assert code == 0, err
    found = images(tmp_path / "r")["a"]
    assert psnr(found, theirs(pipe, row, control_image=picture(1, 90, 70))) >= 50
    assert psnr(found, theirs(pipe, row, control_image=picture(2, 90, 70))) < 30
    pipe.set_adapters(list(mix), [scale / 2 for scale in mix.values()])
    assert psnr(found, theirs(pipe, row, control_image=picture(1, 90, 70))) < 30


def test_a_plain_adapter_on_a_checkpoint_that_reads_maps(cli, tmp_path):
    """It changes what is read of the latents."""
    pipe = reader("FluxControlPipeline", 2 * adapters.SIZE.channels)
    pipe.save_pretrained(tmp_path / "model")
    maker = files.Maker(1, size=0.15)
    file = files.save(
        tmp_path / "s.safetensors", maker.peft(files.dots("transformer.", files.diffusers(adapters.SIZE)))
    )
    picture(1, 90, 70).save(tmp_path / "map.png")
    row = dict(id="a", prompt="a fox", num_inference_steps=3, guidance_scale=10.0, seed=5)
    row |= dict(control_image="map.png", height=64, width=48)
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    before = theirs(pipe, row, control_image=picture(1, 90, 70))
    pipe.load_lora_weights(str(file))
    code, err = cli(
        f"pretrained_model_name_or_path={tmp_path}/model", f"manifest={tmp_path}/rows.jsonl", "run_name=r",
        "hardware=cpu", f"max_sequence_length={LENGTH}", f"output_dir={tmp_path}", *files.arrays({"s": file}),
    )  # fmt: skip
    assert code == 0, err
    found = images(tmp_path / "r")["a"]
    assert psnr(found, theirs(pipe, row, control_image=picture(1, 90, 70))) >= 50
    assert psnr(found, before) < 30
