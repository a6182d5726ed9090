"""support/classifier.py: it learns, it is kept and found again, a damaged file is named."""
import os
import pickle

import pytest
import torch

import metrics
from support import classifier, runs


def bars(n, seed=0):
    """Two classes: a bright bar standing or lying."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 40, (n, 1, 28, 28), generator=generator, dtype=torch.uint8)
    labels = torch.arange(n) % 2
    images[labels == 0, :, :, 12:16] = 220
    images[labels == 1, :, 12:16, :] = 220
    return images, labels


@pytest.fixture(scope="module")
def trained():
    before = torch.random.get_rng_state()
    model = classifier.train(*bars(400), steps=25, batch=32)
    assert torch.equal(before, torch.random.get_rng_state())
    return model


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A repository without classifiers, an empty working folder, no caches from anywhere else."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(runs, "HERE", str(tmp_path))
    return tmp_path


class Bomb:
    """Writes a file where it is unpickled by somebody who lets it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_it_learns_two_classes(trained):
    test, truth = bars(100, seed=1)
    feats, logits = metrics.features(trained, test, batch=7, logits=True)
    assert feats.shape == (100, 64) and logits.shape == (100, 2) and not trained.training
    assert (logits.argmax(1) == truth).double().mean() > 0.95
    assert torch.allclose(feats, metrics.features(trained, test, batch=100), atol=1e-4)


def test_the_same_seed_gives_the_same_weights(trained):
    again, other = (classifier.train(*bars(400), seed=seed, steps=25, batch=32) for seed in (0, 1))
    assert runs.weights_hash(again) == runs.weights_hash(trained) != runs.weights_hash(other)


def test_without_a_file_it_is_trained_once_and_cached(elsewhere, trained, monkeypatch, capsys):
    images, labels = bars(400)
    with pytest.raises(ValueError, match="images and labels"):
        metrics.load_classifier("bars")
    options = dict(cache=[str(elsewhere / "cache")], steps=25, batch=32)
    made = metrics.load_classifier("bars", images, labels, **options)
    assert runs.weights_hash(made) == runs.weights_hash(trained)
    monkeypatch.setattr(classifier, "train", None)  # a second training run would fail
    found = metrics.load_classifier("bars", images, labels, **options)
    assert runs.weights_hash(found) == runs.weights_hash(trained) and not found.training
    for changed in (dict(steps=26), dict(seed=1)):  # trained otherwise: another classifier
        with pytest.raises(TypeError):
            metrics.load_classifier("bars", images, labels, **options | changed)
    with pytest.raises(TypeError):
        metrics.load_classifier("bars", images.flip(3), labels, **options)


def test_it_is_cached_in_the_working_folder(elsewhere):
    metrics.load_classifier("bars", *bars(64), steps=2)
    assert [path.name.split("-")[:2] for path in (elsewhere / "cwd" / "runs" / "cache").iterdir()] == [
        ["classifier", "bars"]]


def test_a_committed_file_comes_first_and_a_damaged_one_is_named(elsewhere, trained):
    path = elsewhere / "results" / "classifiers" / "bars.pt"
    path.parent.mkdir(parents=True)
    torch.save(classifier.half_state(trained), path)
    assert path.stat().st_size < 400_000
    assert runs.weights_hash(metrics.load_classifier("bars")) == runs.weights_hash(trained)
    for damage in (path.read_bytes()[:5000], pickle.dumps(Bomb(str(elsewhere / "ran")), 2)):
        path.write_bytes(damage)
        with pytest.raises(OSError, match="bars.pt") as caught:
            metrics.load_classifier("bars")
        assert "\n" not in str(caught.value)
    assert not (elsewhere / "ran").exists()


def test_committed_classifiers():
    folder = os.path.join(runs.HERE, "results", "classifiers")
    for name in os.listdir(folder):
        assert os.path.getsize(os.path.join(folder, name)) < 400_000
        model = metrics.load_classifier(os.path.splitext(name)[0])
        channels = model.body[0].in_channels
        size = 28 if channels == 1 else 32
        feats, logits = model(torch.zeros(2, channels, size, size, dtype=torch.uint8))
        assert feats.shape == (2, 64) and logits.shape == (2, 10)
