"""ddpm.py: the diffusion, the samplers, the training loop, sampling that must begin at noise.

Exact unless a tolerance is written beside the comparison.
"""
import io
import math

import pytest
import torch
from torch import nn

import ddpm
import lth_diffusion as lth
from ddpm import (Diffusion, batch_at, ddim_step, ddpm_step, dpm_step, draw_samples, learning_rate,
                  predict_x0, sample, sampling_times, train)
from support import runs
from unet import UNet

SCHEDULES = ("linear", "cosine")
MEAN, STD = 0.3, 0.5  # of the one-dimensional data whose score is known


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def net(seed=0, **changes):
    """A tiny U-Net as it is initialised."""
    torch.manual_seed(seed)
    return UNet(**dict(channels=1, base=8, mults=(1, 2), image_size=8) | changes)


class Tiny(nn.Module):
    """The smallest trainable denoiser: eps = a * x + b."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def forward(self, x, t):
        return self.a * x + self.b


def images(n=16, channels=1, size=8):
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (n, channels, size, size), generator=generator, dtype=torch.uint8)


def saved(get_state):
    """A state as it comes back from a file."""
    file = io.BytesIO()
    torch.save(get_state(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def flat(state, path=""):
    """{path: leaf} of nested dicts, lists and tuples."""
    if isinstance(state, (list, tuple)):
        state = dict(enumerate(state))
    if not isinstance(state, dict):
        return {path: state}
    return {p: leaf for key, value in state.items() for p, leaf in flat(value, f"{path}/{key}").items()}


def assert_same(a, b):
    """Two states are equal to the bit."""
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    for path in a:
        same = torch.equal(a[path], b[path]) if isinstance(a[path], torch.Tensor) else a[path] == b[path]
        assert same, path


# -------------------------------------------------------------------------------------------- forward process

@pytest.mark.parametrize("schedule", SCHEDULES)
def test_composed_steps_are_q(schedule):
    """q(x_t|x_{t-1}) applied t+1 times is N(sqrt(abar_t) x0, 1 - abar_t), to 1e-12; so is q_sample."""
    diffusion, mean, variance = Diffusion(schedule=schedule), 1.0, 0.0
    for t, beta in enumerate(diffusion.betas.tolist()):
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        abar = float(diffusion.alphas_bar[t])
        assert abs(mean - math.sqrt(abar)) < 1e-12 and abs(variance - (1 - abar)) < 1e-12
        if t % 111 == 0:
            one, at = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.tensor([t])
            assert abs(float(diffusion.q_sample(one, at, 0 * one)) - mean) < 1e-12
            assert abs(float(diffusion.q_sample(0 * one, at, one)) - math.sqrt(variance)) < 1e-12


def test_linear_schedule():
    diffusion = Diffusion()
    assert diffusion.betas[[0, -1]].tolist() == [1e-4, 0.02] and len(diffusion.betas) == 1000
    assert float(diffusion.betas[1] - diffusion.betas[0]) == pytest.approx(0.0199 / 999, rel=1e-9)
    short = Diffusion(T=100)  # a shorter chain destroys as much signal: log abar within 10 %
    assert float(short.alphas_bar[-1].log() / diffusion.alphas_bar[-1].log()) == pytest.approx(1, abs=0.1)


def test_cosine_schedule():
    """abar_t = f(t+1)/f(0), f(s) = cos^2((s/T + 0.008)/1.008 * pi/2), up to the clamped beta at the end."""
    diffusion = Diffusion(schedule="cosine")
    f = [math.cos((s / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for s in range(1001)]
    wanted = torch.tensor(f[1:], dtype=torch.float64) / f[0]
    torch.testing.assert_close(diffusion.alphas_bar[:-1], wanted[:-1], rtol=0, atol=1e-12)
    assert float(diffusion.betas[-1]) == 0.999 and float(diffusion.betas[-2]) < 0.999


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_tables_are_float64(schedule):
    diffusion = Diffusion(T=200, schedule=schedule)
    for table in (diffusion.betas, diffusion.alphas_bar, diffusion.posterior_variance):
        assert table.dtype == torch.float64 and table.shape == (200,)
    assert bool((diffusion.alphas_bar.diff() < 0).all())


def test_q_sample_broadcasts_over_the_batch_and_keeps_the_dtype():
    diffusion, t = Diffusion(), torch.tensor([0, 500, 999])
    x0, noise = normal(3, 2, 4, 4), normal(3, 2, 4, 4, seed=1)
    x = diffusion.q_sample(x0, t, noise)
    for i in range(3):
        abar = float(diffusion.alphas_bar[t[i]])
        wanted = math.sqrt(abar) * x0[i] + math.sqrt(1 - abar) * noise[i]
        torch.testing.assert_close(x[i], wanted, rtol=0, atol=1e-12)
    assert x.dtype == torch.float64
    single = diffusion.q_sample(x0.float(), t, noise.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), x, rtol=0, atol=1e-5)


def test_loss_is_the_mean_squared_error_on_eps():
    diffusion, t = Diffusion(), torch.tensor([3, 500, 999])
    x0, noise = normal(3, 1, 4, 4), normal(3, 1, 4, 4, seed=1)
    seen = []

    def model(x, t):
        seen.append((x, t))
        return 0.5 * x
    loss = diffusion.loss(model, x0.float(), t, noise.float())
    x_t = diffusion.q_sample(x0, t, noise)
    torch.testing.assert_close(seen[0][0].double(), x_t, rtol=0, atol=1e-5)
    assert torch.equal(seen[0][1], t) and loss.shape == ()
    assert float(loss) == pytest.approx(float(((0.5 * x_t - noise) ** 2).mean()), rel=1e-5)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_min_snr_weights_by_hand(prediction):
    """min(SNR, 5) / SNR on eps, min(SNR, 5) / (SNR + 1) on v; the weight on x0 is min(SNR, 5) in both."""
    diffusion = Diffusion(prediction=prediction, weighting="min-snr")
    x0, noise = normal(3, 1, 4, 4), normal(3, 1, 4, 4, seed=1)
    for t in (0, 200, 999):
        times = torch.full((3,), t)
        abar = float(diffusion.alphas_bar[t])
        snr = abar / (1 - abar)
        error = (noise if prediction == "eps" else
                 math.sqrt(abar) * noise - math.sqrt(1 - abar) * x0).square().mean().item()
        weight = min(snr, 5) / (snr + (prediction == "v"))
        found = diffusion.loss(lambda x, t: torch.zeros_like(x), x0, times, noise).item()
        assert found == pytest.approx(weight * error, rel=1e-5)
        assert weight * (snr if prediction == "eps" else snr + 1) == pytest.approx(min(snr, 5))
    plain = Diffusion(prediction=prediction).loss(lambda x, t: torch.zeros_like(x), x0, times, noise)
    assert plain.item() == pytest.approx(error, rel=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_predict_undoes_the_parametrisation(schedule):
    """A network that says v, or eps, of a known x_0 exactly: loss 0, and the same eps from both."""
    torch.manual_seed(0)
    x0, noise = torch.rand(6, 1, 4, 4) * 2 - 1, torch.randn(6, 1, 4, 4)
    for prediction in ("eps", "v"):
        diffusion = Diffusion(schedule=schedule, prediction=prediction)
        t = torch.linspace(0, diffusion.T - 1, 6).long()
        abar = diffusion.alphas_bar[t].float()[:, None, None, None]
        truth = noise if prediction == "eps" else abar.sqrt() * noise - (1 - abar).sqrt() * x0
        network = lambda x, t: truth
        assert diffusion.loss(network, x0, t, noise).item() < 1e-12
        assert diffusion.loss(lambda x, t: truth + 1, x0, t, noise).item() == pytest.approx(1, rel=1e-6)
        eps = diffusion.predict(network, diffusion.q_sample(x0, t, noise), t)
        torch.testing.assert_close(eps, noise, atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", [dict(schedule="sigma"), dict(prediction="x"), dict(T=10), dict(T=20)])
def test_bad_schedules_raise(options):
    with pytest.raises(ValueError) as caught:
        Diffusion(**options)
    assert "\n" not in str(caught.value)


# -------------------------------------------------------------------------------------------------- posterior

def test_posterior_variance_values():
    """At t = 0, 487, 999: 0, 0.00979, 0.02 to 1e-5."""
    variance = Diffusion().posterior_variance[[0, 487, 999]].tolist()
    assert variance == pytest.approx([0.0, 0.00979, 0.02], abs=1e-5) and variance[0] == 0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_posterior_mean_and_variance(schedule):
    """One ancestral step is c1 x0 + c2 x_t + sqrt(posterior variance) noise, to 1e-12, for every t, and
    c1 + c2 sqrt(abar) = sqrt(abar_prev): the posterior of a noiseless x_t is noiseless.

    x_t and eps are chosen so that the predicted x0 is 1: x_t = 0 leaves c1, eps = 0 leaves the identity.
    """
    diffusion, previous = Diffusion(schedule=schedule), 1.0
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    for t, abar in enumerate(diffusion.alphas_bar.tolist()):
        beta = float(diffusion.betas[t])
        c1 = math.sqrt(previous) * beta / (1 - abar)
        c2 = math.sqrt(1 - beta) * (1 - previous) / (1 - abar)
        got_c1 = float(ddpm_step(zero, -math.sqrt(abar / (1 - abar)) * one, abar, previous, noise=zero))
        whole = float(ddpm_step(math.sqrt(abar) * one, zero, abar, previous, noise=zero))
        assert got_c1 == pytest.approx(c1, abs=1e-12)
        assert whole == pytest.approx(math.sqrt(previous), abs=1e-12)
        assert c1 + c2 * math.sqrt(abar) == pytest.approx(math.sqrt(previous), abs=1e-12)
        kick = float(ddpm_step(zero, zero, abar, previous, noise=one))
        assert kick ** 2 == pytest.approx(float(diffusion.posterior_variance[t]), abs=1e-12)
        previous = abar


def test_clipping_rederives_eps():
    x, eps, abar = normal(64), normal(64, seed=1), 0.3
    x0, same = predict_x0(x, eps, abar, clip=False)
    torch.testing.assert_close(math.sqrt(abar) * x0 + math.sqrt(1 - abar) * eps, x, rtol=0, atol=1e-12)
    assert torch.equal(same, eps) and float(x0.abs().max()) > 1
    clipped, other = predict_x0(x, eps, abar, clip=True)
    assert torch.equal(clipped, x0.clamp(-1, 1))
    torch.testing.assert_close(math.sqrt(abar) * clipped + math.sqrt(1 - abar) * other, x, rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------------- samplers as identities

@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ddim_with_eta_1_is_the_ancestral_step(schedule, clip):
    """On consecutive steps and on long ones, to 1e-10."""
    abar = Diffusion(schedule=schedule).alphas_bar.tolist()
    x, eps, noise = normal(32), normal(32, seed=1), normal(32, seed=2)
    pairs = [(abar[t], abar[t - 1]) for t in range(1, 1000, 37)] + [(abar[0], 1.0), (abar[900], abar[100])]
    for a, b in pairs:
        ancestral = ddpm_step(x, eps, a, b, noise, clip)
        torch.testing.assert_close(ddim_step(x, eps, a, b, 1.0, noise, clip), ancestral, rtol=0, atol=1e-10)


def test_ddim_with_eta_0_is_dpm_solver_of_first_order():
    """To 1e-10, last step included; without noise and whatever the noise."""
    abar = Diffusion().alphas_bar.tolist()
    x, eps = normal(32), normal(32, seed=1)
    for a, b in [(abar[t], abar[t - 20]) for t in range(20, 1000, 49)] + [(abar[5], 1.0)]:
        x0, _ = predict_x0(x, eps, a, clip=False)
        torch.testing.assert_close(ddim_step(x, eps, a, b), dpm_step(x, x0, a, b), rtol=0, atol=1e-10)
    assert torch.equal(ddim_step(x, eps, 0.2, 0.4, 0.0, normal(32, seed=2)), ddim_step(x, eps, 0.2, 0.4))


def test_samplers_are_built_on_the_steps():
    """Whole loops, to 1e-10: DDIM eta=1 is the ancestral sampler; 2M is its steps, one after the other."""
    diffusion, x = Diffusion(T=100), normal(2, 1, 4, 4)

    def model(x, t):
        return torch.sin(x + t[:, None, None, None] / 30)
    same = [sample(model, diffusion, x, method, 25, eta, generator=torch.Generator().manual_seed(0))
            for method, eta in (("ddim", 1.0), ("ddpm", 0.0))]
    torch.testing.assert_close(*same, rtol=0, atol=1e-10)
    levels, y, before = [float(diffusion.alphas_bar[t]) for t in (75, 50, 25, 0)] + [1.0], x, (None, None)
    for t, a, b in zip((75, 50, 25, 0), levels, levels[1:]):
        x0, _ = predict_x0(y, model(y, torch.full((2,), t)), a, clip=True)
        y, before = dpm_step(y, x0, a, b, *before), (x0, a)
    torch.testing.assert_close(sample(model, diffusion, x, "dpm", 4), y, rtol=0, atol=1e-10)


def error_on_gaussian(solver, steps):
    """Largest distance to the exact flow on N(0.3, 0.5^2) with the exact score, on a uniform log-SNR grid.

    The flow keeps z = (x - sqrt(abar) m) / sqrt(abar s^2 + 1 - abar), so the end point is known."""
    levels = torch.sigmoid(2 * torch.linspace(-4, 3, steps + 1, dtype=torch.float64)).tolist()
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)

    def at(abar):
        return math.sqrt(abar) * MEAN + math.sqrt(abar * STD ** 2 + 1 - abar) * z
    x, before = at(levels[0]), (None, None)
    for a, b in zip(levels, levels[1:]):
        eps = math.sqrt(1 - a) * (x - math.sqrt(a) * MEAN) / (a * STD ** 2 + 1 - a)
        if solver == "ddim":
            x = ddim_step(x, eps, a, b)
        else:
            x0, _ = predict_x0(x, eps, a, clip=False)
            x, before = dpm_step(x, x0, a, b, *before), (x0, a)
    return float((x - at(levels[-1])).abs().max())


@pytest.mark.parametrize("solver, order", [("ddim", 1.0), ("dpm", 2.0)])
def test_order_of_convergence(solver, order):
    """40 -> 160 steps: error falls by 4**order, order to 0.15."""
    measured = math.log(error_on_gaussian(solver, 40) / error_on_gaussian(solver, 160), 4)
    assert measured == pytest.approx(order, abs=0.15)


def test_ancestral_sampling_reaches_the_data_distribution():
    """The exact score gives back N(0.3, 0.5^2): mean and deviation of 20,000 draws to 0.02 (5 s.e.)."""
    diffusion = Diffusion(T=200)

    def model(x, t):
        a = float(diffusion.alphas_bar[t[0]])
        return math.sqrt(1 - a) * (x - math.sqrt(a) * MEAN) / (a * STD ** 2 + 1 - a)
    generator = torch.Generator().manual_seed(1)
    x = sample(model, diffusion, normal(20_000), "ddpm", 200, clip=False, generator=generator)
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.02) and float(x.std()) == pytest.approx(STD, abs=0.02)


# ------------------------------------------------------------------------------------------ samplers as loops

@pytest.mark.parametrize("method, steps, total", [("ddim", 10, 172.0067), ("ddpm", 1000, 258.96)])
def test_golden_sums(method, steps, total):
    """Sum of absolute values after the whole loop with model(x, t) = x t/(t+1), to 1e-2."""
    x = (torch.arange(768) / 768).reshape(3, 8, 8, 4).permute(3, 0, 1, 2)

    def model(x, t):
        return x * (t / (t + 1)).reshape(-1, 1, 1, 1)
    out = sample(model, Diffusion(), x, method, steps, clip=True, generator=torch.Generator().manual_seed(0))
    assert float(out.abs().sum()) == pytest.approx(total, abs=1e-2)


@pytest.mark.parametrize("method", ["ddpm", "ddim", "dpm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_time_steps_dtype_and_the_last_step(method, dtype):
    """t = i * (T // steps) descending, one for every image; the last step goes to abar = 1, where x = x0."""
    diffusion, seen = Diffusion(), []

    def model(x, t):
        seen.append((x, t))
        return (0.1 * x).float()
    x_T = normal(3, 1, 2, 2).to(dtype)
    kept = x_T.clone()
    generator = torch.Generator().manual_seed(0)
    out = sample(model, diffusion, x_T, method, 7, eta=0.5, clip=False, generator=generator)
    assert [t.tolist() for _, t in seen] == [[142 * i] * 3 for i in range(6, -1, -1)]
    assert out.dtype == dtype and all(x.dtype == dtype for x, _ in seen)
    x, abar = seen[-1][0], float(diffusion.alphas_bar[0])
    wanted = (x - math.sqrt(1 - abar) * (0.1 * x).float().to(dtype)) / math.sqrt(abar)
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-12)
    assert torch.equal(x_T, kept)  # the starting noise is shared by all tickets


def test_noise_comes_from_the_generator_alone():
    diffusion, x = Diffusion(T=100), normal(2, 1, 4, 4)

    def run(seed, method="ddpm", eta=0.0):
        torch.manual_seed(seed + 100)
        generator = torch.Generator().manual_seed(seed)
        return sample(lambda x, t: 0.1 * x, diffusion, x, method, 5, eta, generator=generator)
    assert torch.equal(run(0), run(0)) and not torch.equal(run(0), run(1))
    assert torch.equal(run(0, "ddim"), run(1, "ddim")) and torch.equal(run(0, "dpm"), run(1, "dpm"))
    assert not torch.equal(run(0, "ddim", 0.5), run(1, "ddim", 0.5))


def test_clip_bounds_the_result():
    x = 3 * normal(2, 1, 4, 4)
    for method in ("ddpm", "ddim", "dpm"):
        low, high = (sample(lambda x, t: 0 * x, Diffusion(), x, method, 5, clip=clip).abs().max()
                     for clip in (True, False))
        assert float(low) <= 1 < float(high), method


@pytest.mark.parametrize("options", [dict(method="euler"), dict(steps=1001), dict(steps=0), dict(steps=-3)])
def test_bad_samplers_raise(options):
    with pytest.raises(ValueError) as caught:
        sample(lambda x, t: x, Diffusion(), normal(1, 1, 2, 2), **options)
    assert "\n" not in str(caught.value)


def test_drawn_samples_do_not_depend_on_the_batch():
    """uint8 images; DDIM draws the same ones, to one grey level, in batches of 2 and of 4."""
    model, diffusion = net(), Diffusion()
    nn.init.normal_(model.conv_out.weight, std=0.1)
    x_T = normal(4, 1, 8, 8).float()
    a, b = (draw_samples(model, diffusion, x_T, steps=4, batch=batch) for batch in (2, 4))
    assert a.dtype == torch.uint8 and a.shape == (4, 1, 8, 8) and len(a.unique()) > 10
    assert int((a.int() - b.int()).abs().max()) <= 1


def test_samples_of_a_batch_share_noise_over_networks_not_over_batches():
    """The ancestral sampler: the same noise for every network, another one for each batch."""
    model = net()  # predicts 0: what is drawn is the noise
    x_T = torch.zeros(4, 1, 8, 8)
    first, again = (draw_samples(model, Diffusion(), x_T, sampler="ddpm", batch=2) for _ in range(2))
    assert torch.equal(first, again) and not torch.equal(first[:2], first[2:])


def test_draw_samples_of_latents_are_decoded_and_not_clipped():
    seen = []

    def decode(x):
        seen.append(x)
        return ddpm.to_uint8(x / 100)
    x_T = 50 * normal(4, 1, 8, 8).float()
    out = draw_samples(net(), Diffusion(), x_T, batch=2, decode=decode)
    assert out.dtype == torch.uint8 and len(out) == 4 and [len(x) for x in seen] == [2, 2]
    assert float(torch.cat(seen).abs().max()) > 10


def test_shared_drawing_gives_the_same_images():
    """share maps in any order it likes, as several processes do."""
    def share(function, items, label):
        found = {i: function(items[i]) for i in reversed(range(len(items)))}
        return [found[i] for i in range(len(items))]
    model, x_T = net(), normal(5, 1, 8, 8).float()
    options = dict(sampler="ddpm", steps=10, batch=2)
    a, b = (draw_samples(model, Diffusion(), x_T, share=how, **options) for how in (None, share))
    assert torch.equal(a, b)


# ---------------------------------------------------------------------------------- sampling begins at noise

REFUSED = [("linear", 1, 4), ("linear", 2, 4), ("linear", 3, 4), ("cosine", 10, 18), ("cosine", 17, 18)]
ALLOWED = [("linear", 4), ("cosine", 18), ("cosine", 20), ("linear", 1000), ("cosine", 1000)]


def one_step(x, t):
    return 0 * x


@pytest.mark.parametrize("schedule, steps, least", REFUSED)
@pytest.mark.parametrize("method", ["ddpm", "ddim", "dpm"])
def test_too_few_evaluations_are_refused(schedule, steps, least, method):
    diffusion = Diffusion(schedule=schedule)
    for call in (lambda: sample(one_step, diffusion, normal(1, 1, 2, 2), method, steps),
                 lambda: draw_samples(net(), diffusion, normal(1, 1, 8, 8), sampler=method, steps=steps)):
        with pytest.raises(ValueError, match=rf"^{steps} evaluations? .* at least {least}$"):
            call()


@pytest.mark.parametrize("schedule, steps", ALLOWED[:3])
def test_enough_evaluations_are_allowed(schedule, steps):
    diffusion = Diffusion(schedule=schedule)
    assert sample(one_step, diffusion, normal(1, 1, 2, 2), "ddim", steps).shape == (1, 1, 2, 2)
    assert draw_samples(net(), diffusion, normal(2, 1, 8, 8).float(), steps=steps).shape == (2, 1, 8, 8)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("T", [100, 1000])
def test_the_number_that_is_named_is_the_next_that_works(schedule, T):
    """Every number of evaluations: those that work begin where abar <= 0.01, and T itself is one of them."""
    diffusion, works, named = Diffusion(T, schedule), [], {}
    for steps in range(1, T + 1):
        try:
            times = sampling_times(diffusion, steps)
        except ValueError as error:
            named[steps] = int(str(error).split()[-1])
            continue
        works.append(steps)
        assert times == [i * (T // steps) for i in range(steps)][::-1]
        assert float(diffusion.alphas_bar[times[0]]) <= 0.01
    assert T in works and 1 in named
    for steps, least in named.items():
        assert least == min(n for n in works if n > steps), steps


@pytest.mark.parametrize("program", [ddpm, lth], ids=["ddpm.py", "lth_diffusion.py"])
@pytest.mark.parametrize("schedule, steps, least", REFUSED)
def test_the_command_lines_refuse_too_few_evaluations(program, schedule, steps, least, tmp_path, capsys):
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        program.main(["--schedule", schedule, "--nfe", str(steps), "--out", str(out)])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1
    assert "argument --nfe: " in said and f"at least {least}" in said
    assert not (out / "results.csv").exists() and not list(out.glob("**/*.pt"))


@pytest.mark.parametrize("schedule, steps", ALLOWED)
def test_the_command_line_takes_enough_evaluations(schedule, steps):
    args, _ = lth.parse_args(["--schedule", schedule, "--nfe", str(steps)])
    assert args.nfe == steps


# ---------------------------------------------------------------------------------------- EMA, rates, batches

def test_ema_formula():
    """ema <- d ema + (1 - d) w, to 1e-6; with warm-up d = min(decay, (1+n)/(10+n)) at update n = 0, 1, .."""
    for warmup in (False, True):
        model = Tiny()
        ema, wanted = ddpm.EMA(model, 0.3, warmup), 0.0
        for n, value in enumerate([1.0, -2.0, 5.0, 4.0, 3.0]):
            nn.init.constant_(model.a, value)
            ema.update(model)
            d = min(0.3, (1 + n) / (10 + n)) if warmup else 0.3
            wanted = d * wanted + (1 - d) * value
            assert float(ema.model.a.detach()) == pytest.approx(wanted, abs=1e-6) and not ema.model.b.any()
        assert ema.updates == 5 and not ema.model.a.requires_grad and not ema.model.training


def test_ema_keeps_zeros_and_is_a_copy():
    model = net()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_().mul_(torch.rand(p.shape) < 0.5)
    ema, before = ddpm.EMA(model, 0.9), [p.clone() for p in model.parameters()]
    dead = [p == 0 for p in model.parameters()]
    for _ in range(5):
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.7)
        ema.update(model)
    for p, q, b, gone in zip(model.parameters(), ema.model.parameters(), before, dead):
        assert bool((q[gone] == 0).all()) and bool((q[~gone] != 0).all())
        assert not bool((p == q)[~gone].any()) and not bool((q == b)[~gone].any())
    assert sum(int(gone.sum()) for gone in dead) > 1000


def test_learning_rate():
    def rates(schedule, warmup=0):
        return [learning_rate(step, 100, 2.0, schedule, warmup) for step in range(100)]
    assert rates("constant") == [2.0] * 100
    assert rates("linear") == pytest.approx([2 - 0.02 * s for s in range(100)], abs=1e-12)
    assert rates("cosine") == pytest.approx([1 + math.cos(math.pi * s / 100) for s in range(100)], abs=1e-12)
    for schedule in ("constant", "linear", "cosine"):
        warm, cold = rates(schedule, 10), rates(schedule)
        assert warm[:10] == pytest.approx([c * (s + 1) / 10 for s, c in enumerate(cold[:10])], abs=1e-12)
        assert warm[9:] == cold[9:] and min(warm) > 0


def test_the_warm_up_begins_where_a_new_optimizer_does():
    rates = [learning_rate(step, 100, 2.0, "constant", 4, start=10) for step in range(10, 16)]
    assert rates == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    late = [learning_rate(step, 100, 2.0, "cosine", 4) for step in range(10, 16)]  # long over
    assert late == [learning_rate(step, 100, 2.0, "cosine", 0) for step in range(10, 16)]


def test_a_state_without_an_optimizer_starts_it_anew():
    """As `finetune` does: weights, average and its count are kept, Adam is new behind its warm-up."""
    states, options = [], dict(steps=8, batch=4, lr=1e-2, warmup=2)
    train(net(), Diffusion(), images(), checkpoint=lambda step, get: states.append(saved(get)), **options)
    model, seen, rates = net(seed=1), [], []
    fresh = states[4] | dict(optimizer=None)
    ema, _ = train(model, Diffusion(), images(), state=fresh, start=4, **options,
                   checkpoint=lambda step, get: seen.append(saved(get)),
                   after_step=lambda step, model, opt, ema: rates.append(opt.param_groups[0]["lr"]))
    assert rates == [0.005, 0.01, 0.01, 0.01] and ema.updates == 8
    assert seen[0]["optimizer"]["state"] == {} and [s["step"] for s in seen] == [4, 5, 6, 7, 8]
    assert_same(seen[0]["model"], states[4]["model"])
    assert_same(seen[0]["ema"], states[4]["ema"])
    assert all(float(one["step"]) == 4 for one in seen[-1]["optimizer"]["state"].values())


def test_batch_is_a_function_of_seed_and_step():
    data, generator = images(50), torch.Generator()

    def draw(seed, step, flip=True, generator=generator):
        return batch_at(data, step, seed, 6, flip, 1000, generator)
    first = draw(0, 5)
    draw(0, 6)
    torch.randn(3, generator=generator)
    for again in (draw(0, 5), draw(0, 5, generator=torch.Generator().manual_seed(9))):
        assert all(torch.equal(a, b) for a, b in zip(first, again))
    for other in (draw(0, 6), draw(1, 5)):
        assert not any(torch.equal(a, b) for a, b in zip(first, other))
    x0, t, noise = draw(0, 5, flip=False)
    assert x0.shape == noise.shape == (6, 1, 8, 8) and t.shape == (6,) and t.dtype == torch.int64
    wanted = ddpm.to_float(data).unbind()
    assert all(any(torch.equal(x, w) for w in wanted) for x in x0)


def test_flip_mirrors_about_half_and_moves_nothing_else():
    data, generator = images(50), torch.Generator()
    whole = ddpm.to_float(data)
    x0, _, _ = batch_at(data, 0, 0, 400, True, 1000, generator)
    plain = [any(torch.equal(x, w) for w in whole) for x in x0]
    mirrored = [any(torch.equal(x, w) for w in whole.flip(3)) for x in x0]
    assert all(a != b for a, b in zip(plain, mirrored)) and 150 < sum(mirrored) < 250  # 5 deviations


def test_batches_cover_images_and_times():
    data = torch.arange(16, dtype=torch.uint8)[:, None, None, None]
    x0, t, noise = batch_at(data, 3, 0, 4000, False, 10, torch.Generator())
    assert set(((x0.flatten() + 1) * 127.5).round().int().tolist()) == set(range(16))
    assert set(t.tolist()) == set(range(10))
    assert abs(float(noise.mean())) < 0.08 and abs(float(noise.std()) - 1) < 0.06  # 5 standard errors


# --------------------------------------------------------------------------------------------------- training

@pytest.mark.parametrize("options", [
    dict(), dict(optimizer="sgd", lr=1e-2, lr_schedule="linear"), dict(dropout=0.1),
    dict(flip=True, lr_schedule="cosine", warmup=3)], ids=["adam", "sgd", "dropout", "cosine"])
def test_stop_and_resume_changes_no_bit(options):
    """6 steps = 3 steps, through a file, + 3 steps: weights, EMA, optimizer and losses."""
    options = dict(options)
    shape = dict(dropout=options.pop("dropout", 0.0), attention=(4,))
    common = dict(steps=6, batch=4, seed=7, ema_decay=0.5) | options
    states = []
    model = net(**shape)
    ema, losses = train(model, Diffusion(), images(), **common,
                        checkpoint=lambda step, get: states.append(saved(get)))
    assert [s["step"] for s in states] == [0, 1, 2, 3, 4, 5, 6]
    torch.rand(17)  # a new process has another global generator
    other, resumed = net(seed=1, **shape), []
    other_ema, other_losses = train(other, Diffusion(), images(), state=states[3], **common,
                                    checkpoint=lambda step, get: resumed.append(saved(get)))
    assert [s["step"] for s in resumed] == [3, 4, 5, 6]
    assert_same(states[-1], resumed[-1])
    assert losses == other_losses and [step for step, _ in losses] == [1, 2, 3, 4, 5, 6]
    assert_same(model.state_dict(), other.state_dict())
    assert_same(ema.model.state_dict(), other_ema.model.state_dict())
    moments = [v for k, v in flat(resumed[-1]["optimizer"]["state"]).items() if isinstance(v, torch.Tensor)]
    assert sum(bool(v.any()) for v in moments) > len(moments) / 2  # they hold something


def test_dropout_does_not_depend_on_the_global_generator():
    final = []
    for seed in (1, 2):
        model = net(dropout=0.5)
        torch.manual_seed(seed)
        train(model, Diffusion(), images(), steps=3, batch=4)
        final.append(model.state_dict())
    assert_same(*final)


def test_resume_in_the_middle_of_a_window():
    """200 steps make windows of 2; a state of 193 steps carries the half-filled one."""
    states, options = {}, dict(start=190, steps=200, batch=4, lr=0.05)

    def keep(step, get):
        states[step] = saved(get)
    _, losses = train(Tiny(), Diffusion(), images(), checkpoint=keep, **options)
    assert [step for step, _ in losses] == [192, 194, 196, 198, 200] and states[193]["window"][1] == 1
    _, resumed = train(Tiny(), Diffusion(), images(), state=states[193], **options)
    assert losses == resumed


def test_start_takes_the_later_batches():
    """Steps 3, 4, 5 of a schedule are steps 3, 4, 5 of the whole: the loss of an untrained model tells."""
    common = dict(steps=6, batch=4, lr=0.0)
    _, whole = train(Tiny(), Diffusion(), images(), **common)
    _, late = train(Tiny(), Diffusion(), images(), start=3, **common)
    assert late == whole[3:] and len({mean for _, mean in whole}) == 6
    generator = torch.Generator()
    for step, mean in whole:  # a model that says 0 has the mean square of the noise as its loss
        _, _, noise = batch_at(images(), step - 1, 0, 4, False, 1000, generator)
        assert mean == pytest.approx(float(noise.square().mean()), rel=1e-5)


def test_after_backward_true_leaves_the_weights_alone():
    model, seen, history = net(), [], []

    def after_backward(step, model):
        seen.append(any(p.grad is not None and bool(p.grad.any()) for p in model.parameters()))
        return step == 2

    def after_step(step, model, *_):
        history.append([p.detach().clone() for p in model.parameters()])
    train(model, Diffusion(), images(), steps=4, batch=4, lr=0.1, warmup=0, after_backward=after_backward,
          after_step=after_step)
    before = list(net().parameters())
    equal = [all(torch.equal(a, b) for a, b in zip(x, y)) for x, y in zip([before] + history, history)]
    assert seen == [True] * 4 and equal == [False, False, True, False]


def test_gradients_are_fresh_every_step():
    """lr = 0 and the same step twice: what after_backward sees does not add up over steps."""
    def gradient_at(start):
        seen = []
        train(Tiny(), Diffusion(), images(), start=start, steps=5, batch=4, lr=0.0,
              after_backward=lambda step, model: seen.append(model.b.grad.clone()))
        return seen[-1]
    assert torch.equal(gradient_at(0), gradient_at(4))


def test_gradient_norm_is_clipped():
    """Plain first SGD step, no warm-up: the update is lr times a gradient of norm `clip`, to 1e-3 of it."""
    model = net()
    before = [p.detach().clone() for p in model.parameters()]
    train(model, Diffusion(), images(), steps=1, batch=4, lr=0.5, warmup=0, optimizer="sgd", clip=1e-2)
    moved = torch.cat([(p - b).flatten() for p, b in zip(model.parameters(), before)])
    assert float(moved.norm().detach()) == pytest.approx(0.5 * 1e-2, rel=1e-3)


def test_losses_are_window_means():
    singles = []

    class Recording(Diffusion):
        def loss(self, *args):
            singles.append(super().loss(*args))
            return singles[-1]
    _, losses = train(Tiny(), Recording(), images(), start=995, steps=1000, batch=4, lr=0.01)
    assert [step for step, _ in losses] == [1000]
    assert losses[0][1] == pytest.approx(sum(float(s.detach()) for s in singles) / 5, rel=1e-6)


@pytest.mark.parametrize("steps, start", [(8, 0), (800, 792)], ids=["every step logged", "windows of 8"])
def test_a_loss_that_is_not_finite_raises_and_is_never_saved(steps, start):
    """The weight becomes NaN after the fourth step: four states are handed out, none after."""
    states = []

    def ruin(step, model, *_):
        if step == start + 3:
            nn.init.constant_(model.b, math.nan)

    def checkpoint(step, get):
        try:
            states.append(saved(get))
        except FloatingPointError as error:
            assert "arm" in str(error)
    with pytest.raises(FloatingPointError, match="arm"):
        train(Tiny(), Diffusion(), images(), start=start, steps=steps, batch=4, after_step=ruin,
              checkpoint=checkpoint, label="arm")
    assert [s["step"] for s in states] == [start, start + 1, start + 2, start + 3]
    leaves = [v for s in states for v in flat(s).values() if isinstance(v, (float, torch.Tensor))]
    assert len(leaves) > 30 and all(bool(torch.isfinite(torch.as_tensor(v)).all()) for v in leaves)


def test_an_infinite_loss_is_named_with_its_step():
    model = Tiny()
    nn.init.constant_(model.b, math.inf)
    with pytest.raises(FloatingPointError, match="dense: the loss became inf by step 1;"):
        train(model, Diffusion(), images(), steps=3, batch=4, label="dense")


def test_training_learns_constant_images():
    """One grey level: eps is all there is to see. 60 steps bring the loss from 1 below 0.3."""
    model, data = net(), torch.full((8, 1, 8, 8), 150, dtype=torch.uint8)
    _, losses = train(model, Diffusion(), data, steps=60, batch=16, lr=1e-2, warmup=5)
    means = [mean for _, mean in losses]
    assert means[0] == pytest.approx(1, abs=0.2) and sum(means[-10:]) / 10 < 0.3


def test_bf16_trains_float32_weights():
    model = net()
    ema, losses = train(model, Diffusion(), images(), steps=3, batch=4, precision="bf16")
    assert all(p.dtype == torch.float32 for p in [*model.parameters(), *ema.model.parameters()])
    assert all(math.isfinite(mean) for _, mean in losses)


def test_the_command_trains_draws_and_goes_on(tmp_path, monkeypatch, capsys):
    """A folder with a finished model is not trained again; another flag is refused, --samples is not."""
    monkeypatch.setitem(ddpm.PRESETS, "tiny", dict(base=8, mults=(1,), patch=4))
    flags = f"--steps 6 --batch 4 --nfe 4 --samples 4 --out {tmp_path / 'run'}".split()
    ddpm.main(flags)
    assert "trained 6 steps" in capsys.readouterr().out
    state = runs.load_state(tmp_path / "run" / "model.pt", ("config", "model", "ema", "losses"))
    assert state["config"]["patch"] == 4 and state["losses"][-1][0] == 6
    ddpm.main([*flags, "--samples", "9"])
    said = capsys.readouterr().out
    assert "trained" not in said and "drew 9 images" in said
    assert (tmp_path / "run" / "samples.png").stat().st_size > 100
    with pytest.raises(SystemExit) as stop:
        ddpm.main([*flags, "--lr", "0.5"])
    assert stop.value.code == 2 and "--lr" in capsys.readouterr().err
