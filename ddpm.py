"""One dense DDPM: noise schedule, loss, samplers, EMA, training loop (Ho, Jain and Abbeel,
Denoising Diffusion Probabilistic Models, 2020, arXiv 2006.11239).

    python ddpm.py --dataset mnist --data-dir data      # trains, writes runs/ddpm_mnist/
    python ddpm.py --from runs/mnist/seed0/round10_ticket.pt --samples 64 --out drawn

    ema, losses = train(model, Diffusion(), images, steps=2000)     # images uint8 (N, C, H, W)
    x = sample(ema.model, Diffusion(), torch.randn(16, 1, 28, 28), "ddim", steps=50)

This file and unet.py can be copied alone; only the command line needs prune.py and support/.
"""
if __name__ == "__main__":  # before torch is imported
    from support import early

import copy
import math
import sys

import torch
import torch.nn.functional as F
from tqdm import tqdm

from unet import PRESETS, UNet

LAST = torch.channels_last  # the memory format in which CPUs and GPUs convolve fastest

# --------------------------------------------------------------------------- diffusion
class Diffusion:
    """q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I); x at t = 0 has one step of noise already.

    schedule: "linear", betas from 1e-4 to 0.02 (2006.11239, section 4), or "cosine" (Nichol and
    Dhariwal 2021, 2102.09672, section 3.2). prediction: what the network predicts, "eps" or
    "v" = sqrt(abar) eps - sqrt(1 - abar) x_0 (Salimans and Ho 2022, 2202.00512, appendix D).
    weighting: of the loss by t, "plain" (2006.11239, eq. 14) or "min-snr" (Hang et al. 2023,
    2303.09556, gamma = 5), so that images of little noise do not take up most of the training.
    betas, alphas_bar, posterior_variance: float64 (T,), CPU. ValueError for an unknown name.
    """

    def __init__(self, T=1000, schedule="linear", prediction="eps", weighting="plain"):
        if prediction not in ("eps", "v"):
            raise ValueError(f"prediction={prediction!r}: choose eps or v")
        if weighting not in ("plain", "min-snr"):
            raise ValueError(f"weighting={weighting!r}: choose plain or min-snr")
        self.T, self.prediction, self.schedule = T, prediction, schedule
        self.weighting = weighting
        self.betas = self.make_betas(T, schedule)
        if not bool((self.betas < 1).all()):
            raise ValueError(f"T={T} is too short for the {schedule} schedule: a beta reaches 1")
        self.alphas_bar = torch.cumprod(1 - self.betas, dim=0)
        before = F.pad(self.alphas_bar[:-1], (1, 0), value=1.0)
        self.posterior_variance = self.betas * (1 - before) / (1 - self.alphas_bar)
        self._tables = {}

    @staticmethod
    def make_betas(T, schedule):
        """The noise added per step, float64 (T,)."""
        if schedule == "linear":  # scaled so that a shorter chain destroys as much signal
            return torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * (1000 / T)
        if schedule == "cosine":
            angle = (torch.arange(T + 1, dtype=torch.float64) / T + 0.008) / 1.008 * math.pi / 2
            return (1 - (angle[1:].cos() / angle[:-1].cos()) ** 2).clamp(max=0.999)
        raise ValueError(f"schedule={schedule!r}: choose linear or cosine")

    def scales(self, t, like):
        """sqrt(abar_t) and sqrt(1 - abar_t), each (B, 1, 1, 1) in like's dtype, on its device."""
        key = like.device, like.dtype
        if key not in self._tables:
            both = torch.stack([self.alphas_bar.sqrt(), (1 - self.alphas_bar).sqrt()])  # (2, T)
            self._tables[key] = both.to(like.dtype).to(like.device)
        return self._tables[key][:, t].reshape(2, -1, *[1] * (like.dim() - 1))

    def q_sample(self, x0, t, noise):
        """x_t for x0 (B, C, H, W) in [-1, 1], t (B,) int64, noise like x0 (2006.11239, eq. 4)."""
        signal, sigma = self.scales(t, x0)
        return signal * x0 + sigma * noise

    def predict(self, model, x_t, t):
        """The noise eps (B, C, H, W) that the network predicts in x_t."""
        out = model(x_t, t).to(x_t.dtype)
        if self.prediction == "eps":
            return out
        signal, sigma = self.scales(t, x_t)
        return signal * out + sigma * x_t

    def loss(self, model, x0, t, noise):
        """Mean squared error on eps or v, weighted by t, a scalar."""
        signal, sigma = self.scales(t, x0)
        target = noise if self.prediction == "eps" else signal * noise - sigma * x0
        out = model(self.q_sample(x0, t, noise), t).float()
        if self.weighting == "plain":
            return F.mse_loss(out, target)
        snr = (signal / sigma).square()  # (B, 1, 1, 1)
        weight = snr.clamp(max=5) / (snr + (self.prediction == "v"))
        return (weight * (out - target).square()).mean()


def to_float(images):
    """uint8 in 0..255 -> float32 in [-1, 1], any shape: the range the diffusion works in."""
    if images.dtype != torch.uint8:
        raise ValueError(f"to_float needs uint8 images, not {images.dtype}")
    return images.float() / 127.5 - 1


def as_input(images):
    """uint8 images as floats in [-1, 1]; latents, which are floats already, as they are."""
    return to_float(images) if images.dtype == torch.uint8 else images


def to_uint8(x):
    """Floats in [-1, 1], any shape -> uint8, rounded and clamped: the exact inverse of to_float."""
    if not x.is_floating_point():
        raise ValueError(f"to_uint8 needs floats in [-1, 1], not {x.dtype}")
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


# --------------------------------------------------------------------------- samplers
# One step each, from noise level abar_from to abar_to (floats; 1.0 = clean), so that they can be
# checked on any grid, in continuous time too. x = sqrt(abar) x0 + sqrt(1 - abar) eps throughout.

def predict_x0(x, eps, abar, clip):
    """(x0, eps) implied by the predicted eps; with clip, x0 is cut to [-1, 1] and eps derived from
    it again, so that both agree (the authors of DDIM leave eps as it was)."""
    x0 = (x - math.sqrt(1 - abar) * eps) / math.sqrt(abar)
    if clip:
        x0 = x0.clamp(-1, 1)
        eps = (x - math.sqrt(abar) * x0) / math.sqrt(1 - abar)
    return x0, eps


def ddpm_step(x, eps, abar_from, abar_to, noise=None, clip=False):
    """The posterior q(x_s | x_t, x0) at the predicted x0, small variance (2006.11239, eq. 6-7)."""
    (x0, _), alpha = predict_x0(x, eps, abar_from, clip), abar_from / abar_to
    mean = math.sqrt(abar_to) * (1 - alpha) * x0 + math.sqrt(alpha) * (1 - abar_to) * x
    mean = mean / (1 - abar_from)
    variance = (1 - abar_to) / (1 - abar_from) * (1 - alpha)
    return mean + math.sqrt(variance) * noise if variance > 0 else mean


def ddim_step(x, eps, abar_from, abar_to, eta=0.0, noise=None, clip=False):
    """DDIM (Song et al. 2020, 2010.02502, eq. 12, 16); eta=0 is deterministic, eta=1 ancestral."""
    x0, eps = predict_x0(x, eps, abar_from, clip)
    sigma = eta * math.sqrt((1 - abar_to) / (1 - abar_from) * (1 - abar_from / abar_to))
    x = math.sqrt(abar_to) * x0 + math.sqrt(max(1 - abar_to - sigma ** 2, 0.0)) * eps
    return x + sigma * noise if sigma > 0 else x


def dpm_step(x, x0, abar_from, abar_to, x0_before=None, abar_before=None):
    """DPM-Solver++(2M) (Lu et al. 2022, 2211.01095, algorithm 2): x0 is extrapolated in log-SNR
    from the prediction one step earlier; without it, and at the last step, DDIM with eta = 0."""
    if abar_to >= 1:
        return x0
    def half_log_snr(abar):
        return 0.5 * math.log(abar / (1 - abar))
    h = half_log_snr(abar_to) - half_log_snr(abar_from)
    if x0_before is not None:
        r = (half_log_snr(abar_from) - half_log_snr(abar_before)) / h
        x0 = (1 + 0.5 / r) * x0 - 0.5 / r * x0_before
    shrunk = math.sqrt((1 - abar_to) / (1 - abar_from)) * x
    return shrunk - math.sqrt(abar_to) * math.expm1(-h) * x0


NOISE = 0.01  # the largest alphas_bar at the first evaluation: above it x_T is no sample of q(x_t)


def sampling_times(diffusion, steps):
    """The time steps of `steps` evaluations, t = i * (T // steps), descending; ValueError,
    with the next number of steps that works, unless the first one is at noise."""
    T, abar = diffusion.T, diffusion.alphas_bar.tolist()
    if not 1 <= steps <= T:
        raise ValueError(f"steps={steps} must lie between 1 and T={T}")
    start = (steps - 1) * (T // steps)
    if abar[start] > NOISE:
        enough = [n for n in range(steps + 1, T) if abar[(n - 1) * (T // n)] <= NOISE] + [T]
        raise ValueError(f"{steps} evaluation{'s' * (steps > 1)} would start at t={start}, where "
                         f"alphas_bar is {abar[start]:.3f}: not noise; choose at least {enough[0]}")
    return [i * (T // steps) for i in reversed(range(steps))]


@torch.no_grad()
def sample(model, diffusion, x_T, method="ddpm", steps=50, eta=0.0, clip=True, generator=None):
    """Images (N, C, H, W) from noise x_T, in its dtype; model: any callable (x, t) -> eps or v.

    method: "ddpm" (ancestral), "ddim" (with eta) or "dpm" (DPM-Solver++ 2M). steps: network
    evaluations. generator: of a stochastic sampler's noise. ValueError: see sampling_times.
    """
    if method not in ("ddpm", "ddim", "dpm"):
        raise ValueError(f"method={method!r}: choose ddpm, ddim or dpm")
    times, abar = sampling_times(diffusion, steps), diffusion.alphas_bar.tolist()
    x, before = x_T, (None, None)
    for i, t in enumerate(times):
        abar_from, abar_to = abar[t], abar[times[i + 1]] if t else 1.0
        eps = diffusion.predict(model, x, torch.full((len(x),), t, device=x.device))
        if method == "dpm":
            x0, _ = predict_x0(x, eps, abar_from, clip)
            x = dpm_step(x, x0, abar_from, abar_to, *before)
            before = x0, abar_from
            continue
        noise = None
        if t and (method == "ddpm" or eta > 0):
            where = x.device if generator is None else generator.device
            noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=where)
            noise = noise.to(x.device)
        x = (ddpm_step(x, eps, abar_from, abar_to, noise, clip) if method == "ddpm" else
             ddim_step(x, eps, abar_from, abar_to, eta, noise, clip))
    return x


# --------------------------------------------------------------------------- training
class EMA:
    """Exponential moving average of a model's weights, `.model`: the network that is sampled.

    decay: 0.9999 in 2006.11239. With warmup it is at most (1 + n) / (10 + n) at update n, so that a
    short run does not sample its own initialisation. A weight that is always 0 stays 0.
    """

    def __init__(self, model, decay, warmup=False):
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self.decay, self.warmup, self.updates = decay, warmup, 0

    @torch.no_grad()
    def update(self, model):
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates) if self.warmup else 1)
        self.updates += 1
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - decay)


def learning_rate(step, steps, lr, schedule, warmup, start=0):
    """The rate at `step` of `steps`: a linear warm-up over `warmup` steps from `start` on, when the
    optimizer is new, times "constant", "linear" or "cosine" decay."""
    done = step / steps
    decay = dict(constant=1.0, linear=1 - done, cosine=0.5 * (1 + math.cos(math.pi * done)))
    return lr * min(1.0, (step - start + 1) / max(warmup, 1)) * decay[schedule]


def make_optimizer(name, parameters, lr, beta2=0.999):
    """"adam" (2006.11239) or "sgd" (momentum 0.9, as in most lottery-ticket work)."""
    if name == "adam":
        return torch.optim.Adam(parameters, lr=lr, betas=(0.9, beta2), fused=True)
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=lr, momentum=0.9, fused=True)
    raise ValueError(f"optimizer={name!r}: choose adam or sgd")


def batch_at(images, step, seed, batch, flip, T, generator, rank=0, world=1):
    """(x0, t, noise) of one step, a pure function of (seed, step); this rank's share of them.

    So runs resume, arms share their data and ranks agree, without any generator's state. Dropout,
    which draws from torch's global generator, is seeded too. images: (N, C, H, W), on the device.
    """
    torch.manual_seed(-1 - seed * 1_000_003 - step - 4_100_000_000 * rank)
    generator.manual_seed(seed * 1_000_003 + step)
    device = images.device
    index = torch.randint(len(images), (batch,), generator=generator, device=device)
    x0 = as_input(images[index])  # (B, C, H, W) in [-1, 1]
    if flip:
        left = torch.rand(batch, generator=generator, device=device) < 0.5
        x0 = torch.where(left[:, None, None, None], x0.flip(3), x0)
    # One t in each of `batch` equal parts of 0..T-1: all are equally likely, the mean is steadier.
    t = torch.arange(batch, device=device) + torch.rand(batch, generator=generator, device=device)
    t = (t * T / batch).long().clamp(max=T - 1)  # float32 may round up to T
    noise = torch.randn(x0.shape, generator=generator, device=device)
    return x0[rank::world], t[rank::world], noise[rank::world]


class LossLog:
    """Mean loss of each window of steps; synchronises with the device at its end only."""

    def __init__(self, every, label, device):
        self.every, self.label, self.means = every, label, []
        self.sum, self.count = torch.zeros((), device=device), 0

    def add(self, step, loss, last):
        self.sum, self.count = self.sum + loss.detach(), self.count + 1
        ends = (step + 1) % self.every == 0 or last
        if ends:
            self.means.append((step + 1, self.mean(step)))
            self.sum, self.count = torch.zeros_like(self.sum), 0
        return ends

    def mean(self, step):
        """Of the window so far; FloatingPointError for a loss that is not finite."""
        mean = self.sum.item() / max(self.count, 1)
        if not math.isfinite(mean):
            raise FloatingPointError(f"{self.label}: the loss became {mean} by step {step + 1}; "
                                     "try a lower --lr")
        return mean


def check_finite(model, step, label):
    """FloatingPointError, naming the run, when a weight is not a finite number."""
    if not all(bool(torch.isfinite(p).all()) for p in model.parameters()):
        raise FloatingPointError(f"{label}: a weight is not finite after step {step}; "
                                 "try a lower --lr")


def capture(step, model, ema, opt, log):
    """The state of training after `step` steps; FloatingPointError rather than a ruined one."""
    log.mean(step - 1)
    check_finite(model, step, log.label)
    return dict(step=step, model=model.state_dict(), ema=ema.model.state_dict(),
                ema_updates=ema.updates, optimizer=opt.state_dict(), losses=list(log.means),
                window=(log.sum.item(), log.count))


def restore(state, model, ema, opt, log):
    """Undo capture, to the bit; return the step to go on with. An optimizer of None stays new."""
    model.load_state_dict(state["model"])
    ema.model.load_state_dict(state["ema"])
    if state["optimizer"] is not None:
        opt.load_state_dict(state["optimizer"])
    for p, moments in opt.state.items():
        for name, value in moments.items():
            if torch.is_tensor(value):  # a copy; moments lie in memory as their weights do
                like = p if value.shape == p.shape else value
                moments[name] = torch.empty_like(like, dtype=value.dtype).copy_(value)
    ema.updates, log.means = state["ema_updates"], list(state["losses"])
    total, log.count = state["window"]
    log.sum = torch.full_like(log.sum, total)
    return state["step"]


def train(model, diffusion, images, *, steps, start=0, batch=128, lr=2e-4,
          lr_schedule="constant", warmup=100, optimizer="adam", beta2=0.999, clip=1.0,
          ema_decay=0.9999, flip=False, seed=0, precision="fp32", label="train",
          after_backward=None, after_step=None, state=None, checkpoint=None, rank=0, world=1):
    """Train `model` in place, steps start .. steps-1 of a schedule; return (EMA, [(step, loss)]).

    images: uint8 (N, C, H, W) on the model's device. after_backward(step, model) sees gradients
    before clipping; if it returns True, the step makes no update. after_step(step, model, opt,
    ema) follows the update. checkpoint(step, get_state) precedes the first step and follows each:
    get_state(), passed as `state`, goes on from there to the bit. rank of world trains on its share
    of the batches. FloatingPointError for a loss that is not finite.
    """
    device, T = images.device, diffusion.T
    opt = make_optimizer(optimizer, model.to(memory_format=LAST).train().parameters(), lr, beta2)
    ema, log = EMA(model, ema_decay, warmup=True), LossLog(max(1, steps // 100), label, device)
    first = start if state is None else restore(state, model, ema, opt, log)
    if checkpoint is not None:
        checkpoint(first, lambda: capture(first, model, ema, opt, log))
    generator, parallel = torch.Generator(device), torch.nn.parallel.DistributedDataParallel
    network = parallel(model) if world > 1 else model  # averages gradients over the ranks
    bar = tqdm(range(first, steps), label, unit="step", mininterval=0.5, leave=False,
               disable=True if rank else None)
    for step in bar:
        x0, t, noise = batch_at(images, step, seed, batch, flip, T, generator, rank, world)
        # Forward and backward pass.
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = diffusion.loss(network, x0.contiguous(memory_format=LAST), t, noise)
        loss.backward()
        # Update the weights.
        for group in opt.param_groups:
            group["lr"] = learning_rate(step, steps, lr, lr_schedule, warmup, start)
        if after_backward is None or not after_backward(step, model):
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            opt.step()
        opt.zero_grad()
        if after_step is not None:
            after_step(step, model, opt, ema)
        # Update the average.
        ema.update(model)
        if log.add(step, loss, last=step + 1 == steps):
            bar.set_postfix(loss=log.means[-1][1])
        if checkpoint is not None:
            checkpoint(step + 1, lambda: capture(step + 1, model, ema, opt, log))
    check_finite(model, steps, label)
    return ema, log.means


# --------------------------------------------------------------------------- drawing samples

SAMPLER_SEED = 900_000  # of a stochastic sampler's noise: no seed that x_T is drawn from


def denoiser(model, precision="fp32"):
    """`model` as a callable for sampling and validation: eval mode, no gradients, perhaps bf16."""
    model.eval()
    if precision == "bf16":  # cast once: without gradients autocast would cast at every evaluation
        model = copy.deepcopy(model).requires_grad_(False)
        for layer in model.modules():
            if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
                layer.bfloat16()

    @torch.inference_mode()
    def predict(x, t):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
            return model(x.clone(memory_format=LAST), t)
    return predict


def draw_samples(model, diffusion, x_T, precision="fp32", sampler="ddim", steps=50, batch=128,
                 seed=0, label="sample", decode=None, share=None):
    """uint8 images (N, C, H, W) on the CPU from noise x_T (N, C, H, W), batch by batch.

    Stochastic samplers draw their noise by seed and batch, the same for every model. decode: makes
    uint8 images of latents. share(function, items, label): a map that several processes divide.
    """
    predict, device = denoiser(model, precision), next(model.parameters()).device
    parts = list(enumerate(x_T.split(batch)))

    def draw(part):
        number, noise = part
        generator = torch.Generator().manual_seed(SAMPLER_SEED + 1000 * seed + number)
        x = sample(predict, diffusion, noise.to(device), sampler, steps, clip=decode is None,
                   generator=generator)
        return (decode or to_uint8)(x).cpu()

    if share is None:
        bar = tqdm(parts, desc=label, unit="batch", leave=False, delay=2, disable=None)
        return torch.cat([draw(part) for part in bar])
    return torch.cat(share(draw, parts, label))


# --------------------------------------------------------------------------- command line
def main(argv=None):
    """Train one dense DDPM, or go on with it, and draw samples; or draw from any finished file."""
    import prune
    from support import alone
    alone.main(argv, sys.modules[__name__], prune)


if __name__ == "__main__":
    main()
