"""The quality columns of samples, in the features of each extractor, and what real images score."""
import functools

import torch

from support import cli, ranks, runs

REAL_DRAWS = 5  # disjoint draws of test images behind the real-data reference
# Few points make large balls: against drawn digits or MNIST, in the features of either classifier,
# uniform noise scores a precision of up to 0.97 at n = 64, and of up to 0.02 at 250 (three draws).
ENOUGH = 250


def columns(metrics, model, images, real, reference, shares=None, extract=None):
    """{"fid", "precision", "recall"} of images uint8 [N, C, H, W] in a model's features; with
    Inception also "kid", "kid_error", "inception_score". Precision and recall stand beside FID
    because it can fall while images get worse. reference: (mu, sigma) of the training images, for
    FID; real: features [M, D] for the rest. shares [K] of the classes of real images, from a
    classifier of them: also "classes", the share of images that would have to change class to meet
    them (total variation). extract: metrics.features, or its like on many processes."""
    feats, logits = (extract or metrics.features)(model, images, logits=True)
    precision, recall = metrics.precision_recall(real, feats)
    found = dict(fid=metrics.fid(feats, reference), precision=precision, recall=recall)
    if shares is not None:
        seen = torch.bincount(logits.argmax(1), minlength=len(shares)) / len(logits)
        found["classes"] = (seen - shares).abs().sum().item() / 2
    if not isinstance(model, metrics.InceptionV3):
        return found
    size = min(1000, min(len(feats), len(real)) // 2)
    value, error = metrics.kid(feats, real, subset_size=size)
    logits = logits - model.fc.bias.cpu()  # left out in 1606.03498's code, and by torch-fidelity
    score, _ = metrics.inception_score(logits.softmax(1), min(10, len(logits)))
    return found | dict(kid=value, kid_error=error, inception_score=score)


def reference_statistics(metrics, model, images, dataset, cache=None):
    """(mu, sigma) of features of training images, cached by data set, images, extractor."""
    key = f"{dataset}-n{len(images)}-{runs.images_hash(images)}-{runs.weights_hash(model)}"

    def compute():
        return list(metrics.statistics(metrics.features(model, images)))
    return tuple(runs.cached(f"statistics-{key}.pt", compute, cache))


def real_reference(metrics, model, reference, train_images, test_images, n, shares=None):
    """The real-data reference: columns() of n test images uint8 [., C, H, W], the score of
    a perfect sampler; a mean over up to REAL_DRAWS disjoint draws. FID is against `reference`, of
    all training images, the rest against n of them. ValueError for fewer than n."""
    if not 2 <= n <= len(test_images):
        raise ValueError(f"n={n} must lie between 2 and the {len(test_images)} test images")
    count = n * min(REAL_DRAWS, len(test_images) // n)
    draws = metrics.random_draw(test_images, count).split(n)
    real = metrics.features(model, metrics.random_draw(train_images, n))
    found = [columns(metrics, model, draw, real, reference, shares) for draw in draws]
    return {name: sum(one[name] for one in found) / len(found) for name in found[0]}


class Quality:
    """quality(samples uint8 [N, C, H, W]) -> {column: value}.

    metrics: the module of that name. images, test: the training and test images uint8. reference:
    {column: the score of as many real test images}; real: these, one draw.
    """

    def __init__(self, metrics, args, images, test):
        self.metrics, self.args, self.images, self.test = metrics, args, images, test
        self.real = metrics.random_draw(test, min(args.samples, len(test)))
        self.reference, self.extractors = dict(mean_pixel=test.float().mean().item()), {}

    def add(self, suffix, model, shares=None):
        """Measure in this model's features too, in columns that end in suffix. shares: of the
        classes that the model tells apart, in the training images."""
        metrics, images, test, n = self.metrics, self.images, self.test, len(self.real)
        moments = reference_statistics(metrics, model, images, self.args.dataset)
        key = f"n{n}-{runs.images_hash(test)}-{runs.images_hash(images)}"
        scores = runs.cached(f"real-2-{key}-{runs.weights_hash(model)}.pt", lambda:
                             real_reference(metrics, model, moments, images, test, n, shares))
        self.reference |= self.named(scores, suffix)
        self.extractors[suffix] = model, moments, metrics.features(model, self.real), shares

    def find_inception(self, device):
        """Measure with Inception too, or say why its columns stay blank."""
        a = self.args
        if device.type == "cpu" and not a.inception:
            return "blank: off on a CPU, where it takes long, unless --inception names the file"
        try:
            model = self.metrics.load_inception(a.inception, a.data_dir).to(device)
        except OSError as error:
            if a.inception:  # asked for by name: going on without it would hide the mistake
                raise
            return f"blank: {error}"
        self.add("", model)
        return f"Inception; real images score {self.reference['fid']:.2f}"

    def __call__(self, samples):
        found = dict(mean_pixel=samples.float().mean().item())
        extract = functools.partial(ranks.share_rows, self.metrics.features)
        with cli.memory_for("measuring samples", "lower --samples"):
            for suffix, (model, moments, real, shares) in self.extractors.items():
                mine = columns(self.metrics, model, samples, real, moments, shares, extract)
                found |= self.named(mine, suffix)
        return found

    def named(self, scores, suffix):
        """{column: value} of an extractor; precision and recall where there are ENOUGH samples."""
        few = {"precision", "recall"} if len(self.real) < ENOUGH else ()
        return {name + suffix: value for name, value in scores.items() if name not in few}
