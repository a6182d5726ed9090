"""ddpm.py --from FILE: what it draws, from which files, and what it leaves alone."""
import argparse
import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import ddpm
import lth_diffusion as lth
from prune import apply_masks, dense_masks, load_ticket, prune_magnitude, save_ticket
from support import draw, report, runs

N = 5  # samples of the runs below


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with run/, of the main job, and one/, of ddpm.py."""
    root, patch = tmp_path_factory.mktemp("made"), pytest.MonkeyPatch()
    for presets in (lth.PRESETS, ddpm.PRESETS):
        patch.setitem(presets, "tiny", dict(base=16, mults=(1,), patch=4))
    patch.setattr(report, "draw_run", lambda *_: None)
    patch.setattr(report, "measure_speed", lambda *_: (0.0, 0.0))
    flags = f"--steps 6 --batch 4 --nfe 4 --samples {N} --precision fp32".split()
    lth.main([*flags, *"--rounds 1 --final-sparsity 0.9 --score magnitude --controls --seeds 3 --out".split(), str(root / "run")])
    ddpm.main([*flags, "--out", str(root / "one")])
    patch.undo()
    return root


def files(made):
    seed = made / "run" / "seed3"
    return dict(state=seed / "round01_ticket.pt", ticket=seed / "round01_ticket.ticket",
                dense=seed / "round00_dense.pt", model=made / "one" / "model.pt")


def command(source, out, *flags):
    ddpm.main(["--from", str(source), "--out", str(out), "--precision", "fp32", *map(str, flags)])


def refusal(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        ddpm.main(list(map(str, argv)))
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1, said
    return said


def images_of(out):
    with np.load(out / "samples.npz") as file:
        assert file.files == ["images"]
        return file["images"]


def listing(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ----------------------------------------------------------------------------------- what is drawn

@pytest.mark.parametrize("kind", ["state", "ticket", "dense", "model"])
def test_every_kind_of_file(made, tmp_path, capsys, kind):
    """PNGs, grid and array of the same images; said: how they were drawn, by the file's own facts."""
    out = tmp_path / "a b"
    command(files(made)[kind], out, "--samples", 3)
    said, pixels = capsys.readouterr().out, images_of(out)
    assert pixels.shape == (3, 28, 28, 1) and pixels.dtype == np.uint8
    for i, image in enumerate(pixels):
        with Image.open(out / f"{i:05d}.png") as png:
            assert png.mode == "L" and np.array_equal(np.array(png), image[..., 0])
    assert Image.open(out / "samples.png").size == (3 * 57 + 1, 58)
    assert len(list(out.iterdir())) == 3 + 3
    assert re.search(r"drew 3 images of digits: sampler ddpm, 4 evaluations, seed (0|3), schedule linear, "
                     r"prediction v, fp32", said)
    record = json.loads((out / "drawn.json").read_text("utf-8"))
    assert record["samples"] == 3 and record["source"] == str(files(made)[kind]) and record["sampler"] == "ddpm"


def test_they_are_the_images_that_the_run_measured(made, tmp_path):
    """With as many samples: the noise and the weights are the same; so is what ddpm.py draws by itself."""
    command(files(made)["state"], tmp_path / "state", "--samples", N)
    command(files(made)["ticket"], tmp_path / "ticket", "--samples", N)
    pictures = runs.load_state(files(made)["state"])["pictures"]
    assert len(pictures) == N
    for name in ("state", "ticket"):
        found = torch.from_numpy(images_of(tmp_path / name)).permute(0, 3, 1, 2)
        assert torch.equal(found, pictures)
    command(files(made)["model"], tmp_path / "model", "--samples", N)
    assert (tmp_path / "model" / "samples.png").read_bytes() == (made / "one" / "samples.png").read_bytes()


def test_flags_change_how_it_is_drawn(made, tmp_path, capsys):
    source = files(made)["state"]
    command(source, tmp_path / "a", "--samples", 2)
    command(source, tmp_path / "b", "--samples", 2, "--sampler", "ddim", "--nfe", 5, "--seed", 4)
    said = capsys.readouterr().out.splitlines()[-1]
    assert "sampler ddim, 5 evaluations, seed 4 (measured with sampler ddpm, nfe 4, seed 3)" in said
    state = runs.load_state(source)
    model = ddpm.UNet(**state["config"])
    model.load_state_dict(state["ema"])
    noise = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(lth.X_T_SEED + 4))
    diffusion = ddpm.Diffusion(prediction="v")
    expected = ddpm.draw_samples(model, diffusion, noise, sampler="ddim", steps=5, seed=4)
    assert np.array_equal(images_of(tmp_path / "b"), expected.permute(0, 2, 3, 1).numpy())
    assert not np.array_equal(images_of(tmp_path / "a"), images_of(tmp_path / "b"))


def test_colour(tmp_path):
    model = ddpm.UNet(channels=3, base=8, mults=(1,), image_size=8)
    facts = dict(schedule="linear", prediction="eps", sampler="ddim", nfe=4)
    save_ticket(tmp_path / "c.ticket", model, dense_masks(model), facts)
    command(tmp_path / "c.ticket", tmp_path / "out", "--samples", 2)
    with Image.open(tmp_path / "out" / "00001.png") as png:
        assert np.array_equal(np.array(png), images_of(tmp_path / "out")[1]) and png.mode == "RGB"


def test_sparsity_by_layer_with_its_marks(made, tmp_path, capsys):
    command(files(made)["state"], tmp_path / "out", "--samples", 1)
    said = capsys.readouterr().out
    state = runs.load_state(files(made)["state"])
    marked = [line.split()[0] for line in said.splitlines() if line.endswith("minimum")]
    assert marked == state["row"]["at_minimum"] and marked
    total = re.search(r"all layers +(\d+) +(\d+) +([\d.]+)%", said)
    assert [int(n) for n in total.groups()[:2]] == [state["row"][k] for k in ("total_weights", "live_weights")]
    assert total[3] == "90.00" and said.count(".weight") == len(state["masks"])
    command(files(made)["model"], tmp_path / "dense", "--samples", 1)
    assert "dense: no weight is pruned" in capsys.readouterr().out


# ----------------------------------------------------------------------------------- what files say

def test_facts_lie_in_every_file(made):
    facts = {kind: torch.load(path, weights_only=True)["facts"] for kind, path in files(made).items()}
    known = dict(dataset="digits", T=1000, schedule="linear", prediction="v", sampler="ddpm", nfe=4, latent=False)
    assert facts["state"] == facts["ticket"] == facts["dense"] == known | dict(seed=3, x_T_seed=lth.X_T_SEED)
    assert facts["model"] == known | dict(seed=0, x_T_seed=0)


def test_facts_of_latents_and_of_other_noise_levels():
    """Both come from the experiment as it is at the end, not from its flags."""
    flags = argparse.Namespace(dataset="digits", schedule="linear", prediction="v", sampler="ddim", nfe=50)
    for decode, latent in (None, False), (torch.neg, True):
        exp = argparse.Namespace(args=flags, diffusion=ddpm.Diffusion(500, "cosine", "eps"), decode=decode)
        facts = lth.Experiment.facts(exp, lth.Job(2, 1, "ticket"))
        assert facts == dict(dataset="digits", T=500, schedule="cosine", prediction="eps", sampler="ddim", nfe=50,
                             seed=2, x_T_seed=lth.X_T_SEED, latent=latent)


def changed(path, target, **changes):
    torch.save(torch.load(path, weights_only=True) | changes, target)
    return target


@pytest.mark.parametrize("kind", ["state", "ticket"])
def test_a_file_without_facts_asks_for_flags(made, tmp_path, capsys, kind):
    """Those of earlier versions, and tickets saved by hand; the flags then do."""
    old = changed(files(made)[kind], tmp_path / "old", facts=None)
    said = refusal(capsys, "--from", old, "--out", tmp_path / "out", "--nfe", 4)
    assert str(old) in said and "--schedule --prediction --sampler" in said and "--nfe" not in said
    assert not (tmp_path / "out").exists()
    flags = "--schedule linear --prediction v --sampler ddpm --nfe 4 --samples 2".split()
    command(old, tmp_path / "out", *flags)
    assert "drew 2 images: sampler ddpm" in capsys.readouterr().out


@pytest.mark.parametrize("facts, named", [
    (dict(latent=True), "codes, not images"), (dict(schedule="sigma"), "schedule='sigma'"),
    (dict(nfe="many"), "--nfe"), (dict(nfe=2000), "--nfe"), (dict(sampler="DDIM"), "choose from ddpm, ddim, dpm"),
    (dict(T="x"), "cannot be drawn from"),
])
def test_facts_that_cannot_be_drawn_from(made, tmp_path, capsys, facts, named):
    whole = torch.load(files(made)["ticket"], weights_only=True)["facts"]
    path = changed(files(made)["ticket"], tmp_path / "x.ticket", facts=whole | facts)
    assert named in refusal(capsys, "--from", path, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------- bad input

@pytest.mark.parametrize("flags, named", [
    ("--steps 5", "--steps"), ("--lr 0.1", "--lr"), ("--dataset digits", "--dataset"), ("--batch 4", "--batch"),
    ("--lr-schedule cosine", "--lr-schedule"), ("--data-dir data", "--data-dir"), ("--ema 0.9", "--ema"),
    ("--prediction eps", "--prediction"), ("--schedule cosine", "--schedule"), ("--nfe 3", "--nfe"),
    ("--nfe 600", "--nfe"), ("--samples 0", "--samples"), ("--samples 99999999999", "--samples"),
    ("--sampler x", "--sampler"), ("--device tpu", "--device"), ("--seed 1000", "--seed"),
])
def test_flags_are_refused_by_name(made, tmp_path, capsys, flags, named):
    said = refusal(capsys, "--from", files(made)["state"], "--out", tmp_path / "out", *flags.split())
    assert f"argument {named}" in said and not (tmp_path / "out").exists()


def test_out_is_needed_and_from_is_no_empty_path(made, capsys):
    assert "--out" in refusal(capsys, "--from", files(made)["state"])
    assert "--from" in refusal(capsys, "--from", "")


class Linear(nn.Module):
    """A network that is no U-Net."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 4)


@pytest.mark.parametrize("bad", ["missing", "folder", "text", "empty", "half", "flipped", "step k", "classifier",
                                 "list", "version", "config", "masks", "weights", "linear", "facts", "values"])
def test_files_that_are_no_finished_network(made, tmp_path, capsys, bad):
    source, path = files(made)["state"], tmp_path / "bad file.pt"
    blob, whole = bytearray(source.read_bytes()), torch.load(source, weights_only=True)
    blob[blob.find(whole["ema"]["conv_in.weight"].numpy().tobytes()) + 2] ^= 1  # not in the padding
    if bad == "folder":
        path.mkdir()
    elif bad in ("text", "empty", "half", "flipped"):
        half = bytes(blob[:len(blob) // 3])
        path.write_bytes(dict(text=b"no network\n", empty=b"", half=half, flipped=bytes(blob))[bad])
    elif bad in ("step k", "classifier"):
        shutil.copy(made / "run" / "seed3" / "round00_dense.step_k.pt" if bad == "step k" else
                    os.path.join(runs.HERE, "results", "classifiers", "digits.pt"), path)
    elif bad == "linear":
        model = Linear()
        save_ticket(path, model, dense_masks(model))
    elif bad == "values":
        changed(files(made)["ticket"], path, values={})
    elif bad != "missing":
        torch.save({"list": [1, 2], "version": whole | dict(format=3), "config": whole | dict(config=dict(a=1)),
                    "masks": whole | dict(masks={}), "weights": whole | dict(ema={}),
                    "facts": whole | dict(facts=[1])}[bad], path)
    said = refusal(capsys, "--from", path, "--out", tmp_path / "out")
    assert str(path) in said and not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------- the folder

@pytest.mark.parametrize("name, content", [
    ("00001.png", b"mine"), ("samples.png", b"mine"), ("samples.npz", b"mine"), ("drawn.json", b"mine"),
    ("drawn.json", b'{"a": 1}'), ("drawn.json", b"[]")])
def test_others_files_are_not_overwritten(made, tmp_path, capsys, name, content):
    (tmp_path / name).write_bytes(content)
    said = refusal(capsys, "--from", files(made)["state"], "--samples", 2, "--out", tmp_path)
    assert name in said and "--out" in said and listing(tmp_path) == {name: content}


def test_a_run_s_pictures_and_a_file_are_not_overwritten(made, tmp_path, capsys):
    before = listing(made / "one")
    said = refusal(capsys, "--from", files(made)["model"], "--out", made / "one")
    assert "samples.png" in said and listing(made / "one") == before
    (tmp_path / "file").write_text("mine")
    assert "--out" in refusal(capsys, "--from", files(made)["model"], "--out", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_second_call_replaces_its_own_files_alone(made, tmp_path, capsys):
    """Fewer images: none of the first call is left among them; other people's files stay."""
    source = files(made)["state"]
    command(source, tmp_path, "--samples", 4)
    first = listing(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "00007.png").write_text("mine")
    left = tmp_path / "00001.png.0123456789abcdef.part"  # of a call that was killed
    left.write_text("")
    command(source, tmp_path, "--samples", 2, "--seed", 1)
    now = listing(tmp_path)
    assert set(now) == {"00000.png", "00001.png", "samples.png", "samples.npz", "drawn.json", "notes.txt",
                        "00007.png"}
    assert now["00007.png"] == now["notes.txt"] == b"mine" and now["00000.png"] != first["00000.png"]
    said = refusal(capsys, "--from", source, "--samples", 8, "--out", tmp_path)
    assert "00007.png" in said and listing(tmp_path) == now


def test_a_call_that_breaks_off_can_be_repeated(made, tmp_path, monkeypatch):
    source = files(made)["state"]
    command(source, tmp_path, "--samples", 2)

    def full(*_):
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(draw.charts, "save_grid", full)
        command(source, tmp_path, "--samples", 4)
    assert stop.value.code == 2
    command(source, tmp_path, "--samples", 3)
    assert sorted(listing(tmp_path)) == sorted([*draw.names(3), "drawn.json"])
    assert len(images_of(tmp_path)) == 3


# ----------------------------------------------------------------------------------- tickets of others

def test_a_config_of_another_library_stays_out_of_the_ticket(tmp_path):
    """An object could not be read back with weights_only; a dict that is no U-Net's asks for the network."""
    for config in (object(), dict(width=4)):
        model, path = Linear(), tmp_path / "linear.ticket"
        model.config = config
        masks = prune_magnitude(model, dense_masks(model), 0.5)
        apply_masks(model, masks)
        save_ticket(path, model, masks, facts=dict(task="any", rounds=3))
        again, _ = load_ticket(path, Linear())
        assert torch.equal(again.layer.weight, model.layer.weight)
        assert torch.load(path, weights_only=True)["facts"] == dict(task="any", rounds=3)
        with pytest.raises(OSError, match="pass the network as model"):
            load_ticket(path)


def test_a_folder_of_other_peoples_images_is_left_alone(tmp_path, capsys):
    """Drawn images beside photographs would be trained on by the next --images."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "cat.JPG").write_bytes(b"")
    with pytest.raises(OSError, match="--out: .*mine holds images of another source .cat.JPG."):
        draw.check_folder(str(tmp_path / "mine"), 4)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("")
    draw.check_folder(str(tmp_path / "notes"), 4)
