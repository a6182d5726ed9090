"""Are the feature extractors right? FID of CIFAR-10's test images with Inception; the accuracy of a
domain classifier, trained anew.

    python -m checks.extractors --inception PATH     # about 3.15 is often quoted for CIFAR-10
    python -m checks.extractors --train mnist        # writes results/classifiers/mnist.pt
"""
if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module:  python -m checks.extractors")

import os

import metrics
from support import classifier, cli, data, quality, runs


def check_inception(args, device):
    """Print the FID of CIFAR-10's test images against its training images."""
    model = metrics.load_inception(args.inception, args.data_dir).to(device)
    train, _ = data.load_images("cifar10", args.data_dir)
    test, _ = data.load_images("cifar10", args.data_dir, "test")
    reference = quality.reference_statistics(metrics, model, train, "cifar10")
    value = metrics.fid(metrics.features(model, test), reference)
    print(f"CIFAR-10, FID of {len(test):,} test images against {len(train):,} training images: "
          f"{value:.4f} (about 3.15 is often quoted)")


def train_classifier(args, device):
    """Train the domain classifier of a data set, save it, print its test accuracy."""
    path = os.path.join(runs.HERE, "results", "classifiers", f"{args.train}.pt")
    images, labels = data.load_images(args.train, args.data_dir)
    model = classifier.train(images, labels, device=device, **classifier.options_of(args.train))
    runs.write_torch(path, classifier.half_state(model))
    test, labels = data.load_images(args.train, args.data_dir, "test")
    right = metrics.features(model, test, logits=True)[1].argmax(1) == labels
    print(f"{path}: {runs.weights_hash(model)}, test accuracy {right.double().mean():.4f}")


def main(argv=None):
    """The command line."""
    parser = cli.Parser(prog="checks.extractors", description=__doc__.split("\n")[0])
    parser.add_argument("--train", metavar="DATASET", choices=list(cli.DATASETS),
                        help="train and save results/classifiers/DATASET.pt")
    parser.add_argument("--inception", metavar="PATH", type=cli.path,
                        help=f"where {metrics.INCEPTION_FILE} is, if not in the data folder")
    cli.add_data_flags(parser)
    args = parser.parse_args(argv)
    with cli.one_line(parser):
        device, _ = cli.pick_device(args.device)
        (train_classifier if args.train else check_inception)(args, device)


if __name__ == "__main__":
    main()
