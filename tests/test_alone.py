"""What can be copied alone works alone: in an empty folder, in a process that sees nothing else of ours."""
import os
import pathlib
import shutil
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parents[1]

PRUNE = """
import torch
from prune import dense_masks, density, mask_hooks, prune_magnitude, rewind
model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
theta, x = {k: v.clone() for k, v in model.state_dict().items()}, torch.randn(64, 8)
masks = dense_masks(model)
for r in range(2):
    opt, hooks = torch.optim.SGD(model.parameters(), 0.1), mask_hooks(model, masks)
    for step in range(20):
        opt.zero_grad(), (model(x) - x[:, :1]).square().mean().backward()
        hooks["after_backward"](step, model), opt.step(), hooks["after_step"](step, model, opt, None)
    masks = prune_magnitude(model, masks, 0.5)
    rewind(model, masks, theta)
    print(density(masks), all(torch.equal(model.state_dict()[k], m * theta[k]) for k, m in masks.items()))
"""

DDPM = """
import torch
from ddpm import Diffusion, draw_samples, sample, train
from unet import UNet
images = torch.randint(0, 256, (16, 1, 8, 8), dtype=torch.uint8)
model = UNet(channels=1, base=8, mults=(1, 2), image_size=8)
ema, losses = train(model, Diffusion(), images, steps=5, batch=4)
x = sample(ema.model, Diffusion(), torch.randn(3, 1, 8, 8), "ddim", steps=5)
drawn = draw_samples(ema.model, Diffusion(prediction="v"), torch.randn(3, 1, 8, 8), steps=5)
print(len(losses), tuple(x.shape), bool(x.isfinite().all()), drawn.dtype, tuple(drawn.shape))
"""

METRICS = """
import torch
from metrics import features, fid, precision_recall
class Extractor(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 64, 6))
    def forward(self, x):
        feats = self.body(x.float() / 255)
        return feats, feats
x, y = torch.randn(100, 5), torch.randn(80, 5) + 3
print(30 < fid(x, y) < 60, fid(x, x) < 1e-9)
a, b = (torch.randint(low, 256, (40, 3, 8, 8), dtype=torch.uint8) for low in (0, 200))
model = Extractor()
a, b = features(model, a), features(model, b)
print(tuple(a.shape), fid(a, a) < 1e-6 < fid(b, a), precision_recall(a, a))
"""


def alone(folder, script, *files):
    """What a script prints that lies in an empty folder beside copies of these files."""
    for name in files:
        shutil.copy(HERE / name, folder)
    (folder / "script.py").write_text(script, encoding="utf-8")
    hidden = "PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "LTH_DATA"
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run([sys.executable, "script.py"], cwd=folder, env=environment, timeout=300,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    left = {path.name for path in folder.iterdir()} - {"__pycache__"}
    assert left == {*files, "script.py"}  # it writes nothing beside itself
    return done.stdout.splitlines()


def test_prune_alone(tmp_path):
    assert alone(tmp_path, PRUNE, "prune.py") == ["0.5 True", "0.25 True"]


def test_unet_and_ddpm_alone(tmp_path):
    assert alone(tmp_path, DDPM, "unet.py", "ddpm.py") == ["5 (3, 1, 8, 8) True torch.uint8 (3, 1, 8, 8)"]


def test_metrics_alone(tmp_path):
    assert alone(tmp_path, METRICS, "metrics.py") == ["True True", "(40, 6) True (1.0, 1.0)"]
