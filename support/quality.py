"""The quality columns of samples, in the features of each extractor, and what real images score."""
import functools

from support import cli, ranks, runs


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
        moments = metrics.reference_statistics(model, images, self.args.dataset)
        key = f"n{n}-{runs.images_hash(test)}-{runs.images_hash(images)}"
        scores = runs.cached(f"real-2-{key}-{runs.weights_hash(model)}.pt", lambda:
                             metrics.real_reference(model, moments, images, test, n, shares))
        self.reference |= {column + suffix: value for column, value in scores.items()}
        self.extractors[suffix] = model, moments, metrics.features(model, self.real), shares

    def find_inception(self, device):
        """Measure with Inception too, or say why its columns stay blank."""
        a = self.args
        if device.type == "cpu" and not a.inception:
            return f"blank: {len(self.images):,} images take long on a CPU; see --inception"
        try:
            model = self.metrics.load_inception(a.inception, a.data_dir).to(device)
        except OSError as error:
            if a.inception:  # asked for by name: going on without it would hide the mistake
                raise
            return f"blank: {error}"
        self.add("", model)
        return f"Inception; real images score {self.reference['fid']:.2f}"

    def __call__(self, samples):
        columns = dict(mean_pixel=samples.float().mean().item())
        extract = functools.partial(ranks.share_rows, self.metrics.features)
        with cli.memory_for("measuring samples", "lower --samples"):
            for suffix, (model, moments, real, shares) in self.extractors.items():
                found = self.metrics.quality(model, samples, real, moments, shares, extract)
                columns |= {column + suffix: value for column, value in found.items()}
        return columns
